"""The stem store: decoded once, kept exactly, resumed after an interruption, safe with several builders, read alone."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from conftest import STEMS, write_dataset

from mss_utils.__main__ import main
from mss_utils.config import ROOT, resolve_settings
from mss_utils.data import (
    audit,
    audit_warnings,
    build_store,
    co_activity,
    level_db,
    open_store,
    read_store,
)
from mss_utils.data import store as store_module


def stamps(store):
    return {track.file: (store.folder / track.file).stat().st_mtime_ns for track in store.tracks}


def test_the_store_holds_what_the_files_hold(dataset):
    store = build_store(dataset, 16000, 1)
    assert store.stems == STEMS
    assert [len(store.split(split)) for split in ("train", "valid", "test")] == [4, 1, 2]
    track = store.split("test")[0]
    mixture, stems = store.load(track)
    for name, audio in zip(store.stems, stems):
        wanted, _ = soundfile.read(dataset / "test" / track.name / f"{name}.wav", dtype="float32")
        np.testing.assert_allclose(audio[0], wanted, atol=track.scale)
    np.testing.assert_allclose(stems.sum(axis=0), mixture, atol=3 * track.scale)
    raw = store.raw(track)
    assert isinstance(raw, np.memmap) and raw.dtype == np.int16 and raw.shape == (5, 1, 48000)
    assert store.n_bytes == sum(np.load(store.folder / track.file).nbytes for track in store.tracks)


def test_the_index_says_where_everything_comes_from(dataset):
    store = build_store(dataset, 16000, 1)
    track = store.split("test")[1]
    assert (
        track.source == str(dataset / "test" / "test song 1")
        and track.samples == 48000
        and track.source_rates == (16000,)
    )
    assert [round(20 * np.log10(rms)) for rms in track.rms[1:]] == [
        round(20 * np.log10(0.02 * (row + 1))) for row in range(4)
    ]


def test_samples_beyond_full_scale_are_kept(tmp_path):
    write_dataset(tmp_path, 2, 1, 1, seconds=1)
    loud = np.full((16000, 1), 0.9, np.float32)
    for stem in STEMS:
        soundfile.write(
            tmp_path / "test" / "test song 0" / f"{stem}.wav", loud, 16000, subtype="FLOAT"
        )
    mixture, stems = (store := build_store(tmp_path, 16000, 1)).load(store.split("test")[0])
    assert abs(mixture.max() - 3.6) < 1e-3 and abs(stems.max() - 0.9) < 1e-3


# --- once


def test_a_second_call_decodes_nothing_and_a_changed_song_is_decoded_again(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=1)
    first = build_store(root, 16000, 1)
    before = stamps(first)
    assert build_store(root, 16000, 1) == first and stamps(first) == before
    assert stamps(build_store(root / ".." / "data", 16000, 1)) == before, (
        "the same folder by another path"
    )
    soundfile.write(root / "train" / "train song 0" / "bass.wav", np.zeros(16000), 16000)
    changed = build_store(root, 16000, 1)
    assert changed.sha != first.sha
    assert sum(a != b for a, b in zip(first.tracks, changed.tracks)) == 1
    assert sum(before[file] != stamp for file, stamp in stamps(changed).items()) == 1


def test_a_song_that_left_the_dataset_leaves_the_store(tmp_path):
    root = write_dataset(tmp_path / "data", 3, 1, 1, seconds=0.5)
    first = build_store(root, 16000, 1)
    (first.folder / ".part-999-1-left.npy").write_bytes(b"what a killed build left")
    shutil.rmtree(root / "train" / "train song 1")
    second = build_store(root, 16000, 1)
    assert [track.name for track in second.split("train")] == ["train song 0", "train song 2"]
    assert {path.name for path in second.folder.iterdir()} == {
        "index.json",
        ".lock",
        *(track.file for track in second.tracks),
    }


def test_a_hundred_and_fifty_tracks_are_opened_in_less_than_a_second(tmp_path):
    root = write_dataset(tmp_path, 100, 0, 50, seconds=0.05)
    build_store(root, 16000, 1)
    started = time.perf_counter()
    assert len(build_store(root, 16000, 1).tracks) == 150
    assert time.perf_counter() - started < 1


# --- interrupted, several at once, disk full

HELD = """
import sys, time
from pathlib import Path
from mss_utils.data import store
original, seen = store.read_track, []
def held(source):
    seen.append(source)
    while len(seen) > 3 and not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    return original(source)
store.read_track = held
print(len(store.build_store(Path(sys.argv[1]), 16000, 1, n_jobs=1).tracks))
"""


def held_build(root, go, **options):
    """A build that stops after three tracks until the file `go` is there."""
    return subprocess.Popen(
        [sys.executable, "-c", HELD, str(root), str(go)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def indexed(folder):
    """Names of the tracks that a store under `folder` knows so far."""
    return [
        track["name"]
        for index in folder.rglob("index.json")
        for track in json.loads(index.read_text())["tracks"]
    ]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 8, 1, 1, seconds=0.2)
    build = held_build(root, tmp_path / "never")
    wait_for(lambda: len(indexed(tmp_path)) == 3)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    with pytest.raises(ValueError, match="is not finished"):
        read_store(next(tmp_path.rglob("index.json")).parent)
    decoded = []
    original = store_module.read_track
    monkeypatch.setattr(
        store_module, "read_track", lambda source: decoded.append(source.name) or original(source)
    )
    store = build_store(root, 16000, 1)
    assert len(store.tracks) == 10 and len(decoded) == 7
    assert [track.name for track in store.split("train")] == sorted(
        track.name for track in store.split("train")
    )


def test_two_builds_at_once_decode_each_track_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 6, 1, 1, seconds=0.2)
    first = held_build(root, tmp_path / "go")
    wait_for(lambda: len(indexed(tmp_path)) == 3)
    second = held_build(root, tmp_path / "go")
    assert "Another process is working in" in second.stderr.readline()
    written = {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}
    (tmp_path / "go").touch()
    assert (first.communicate()[0], second.communicate()[0]) == ("8\n", "8\n")
    assert (
        len(written) == 3
        and written.items()
        <= {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}.items()
    ), "written twice"


def test_many_threads_may_build_the_same_store(tmp_path):
    root = write_dataset(tmp_path, 4, 1, 1, seconds=0.2)
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: build_store(root, 16000, 1), range(6)))
    assert all(store == stores[0] for store in stores)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    """No file may grow over 20 kB: what a full disk does to every write, and every user may ask for."""
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=0.1)
    write_dataset(tmp_path / "long", 1, 0, 0, seconds=5)
    shutil.move(tmp_path / "long" / "train" / "train song 0", root / "train" / "much too long")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    (tmp_path / "go").touch()
    full = held_build(root, tmp_path / "go", preexec_fn=limit)
    assert full.wait() == 1
    error = full.stderr.read()
    assert (
        "No room left to write" in error
        and "the same command goes on: free space there" in error
        and "MSS_CACHE" in error
    )
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]
    assert len(indexed(tmp_path)) == len(list(tmp_path.rglob("*.npy"))) >= 1
    assert len(build_store(root, 16000, 1).tracks) == 5, "the same command goes on"


# --- read alone


def test_training_and_separation_read_the_store_alone(small_settings, store, tmp_path):
    """Nothing is decoded, so neither musdb nor ffmpeg is touched, and the dataset may be gone: the store is carried elsewhere."""
    carried = shutil.copytree(store.folder, tmp_path / "carried")
    script = f"""
import sys
from mss_utils.settings import create_or_load_run
from mss_utils.data import open_store
from mss_utils.training import train
from mss_utils.separation import separate
run = create_or_load_run("smoke", "carried", {str(carried)!r}, "piano", "segment_s=0.5 valid_s=1 steps=2 valid_every=2")
store = open_store(run.settings)
model = train(run, store, "piano", "unet")
mixture, _ = store.load(store.split("test")[0])
assert separate(model, mixture, 16000).shape == mixture.shape
assert not {{"musdb", "stempeg", "museval"}} & set(sys.modules), "imported"
"""
    environment = os.environ | dict(
        PATH=str(tmp_path), MSS_RESULTS=str(tmp_path / "results"), MSS_CACHE=str(tmp_path / "cache")
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert open_store(small_settings.model_copy(update=dict(data=str(carried)))).sha == store.sha


def test_a_carried_store_that_does_not_fit_says_so(store, tmp_path):
    carried = shutil.copytree(store.folder, tmp_path / "carried")
    for overrides, words in (
        ("sample_rate=22050", "has sample_rate=16000, the run asks for 22050"),
        ("groups=bass+drums->low", "decoded already, into bass, drums"),
    ):
        with pytest.raises(ValueError, match=words):
            open_store(resolve_settings("smoke", str(carried), "piano", overrides))
    next(carried.glob("*.npy")).unlink()
    with pytest.raises(ValueError, match="lacks 1 files"):
        open_store(resolve_settings("smoke", str(carried), "piano"))
    (carried / "index.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="no index of a stem store of format 2"):
        open_store(resolve_settings("smoke", str(carried), "piano"))


# --- the audit


def audited(tmp_path):
    root = write_dataset(tmp_path, 2, 1, 1, seconds=0.6)
    soundfile.write(root / "train" / "train song 1" / "drums.wav", np.zeros(9600), 16000)
    soundfile.write(root / "train" / "train song 0" / "mixture.wav", np.full(9600, 0.5), 16000)
    return build_store(root, 16000, 1)


def test_the_audit_finds_what_is_wrong(tmp_path):
    store = audited(tmp_path)
    table = audit(store)
    assert len(table) == 4 * 5
    silent = table[(table["stem"] == "drums") & (table["track"] == "train song 1")].iloc[0]
    assert silent["silent_share"] == 1 and silent["level_db"] == -np.inf
    found = audit_warnings(store, segment_s=1.5)
    assert found[0].startswith(
        "1 track whose stems do not add up to the mixture: train song 0 (off by "
    )
    assert "1 track shorter than a second, scored as one frame: test song 0 (0.60 s)" in found
    assert (
        "2 tracks shorter than a training segment of 1.5 s, not used: train song 0 (0.60 s), train song 1 (0.60 s)"
        in found
    )
    assert "1 stem silent throughout: drums of train song 1" in found


def test_the_audit_is_what_the_samples_say(store):
    table = audit(store).set_index(["split", "track", "stem"])
    for track in store.tracks:
        mixture, stems = store.load(track)
        for name, audio in zip(("mixture", *store.stems), (mixture, *stems)):
            row = table.loc[(track.split, track.name, name)]
            assert (
                abs(row["level_db"] - level_db(audio)) < 0.01
                and abs(row["peak"] - np.abs(audio).max()) < 2 * track.scale
            )
        residual_db = level_db(mixture - stems.sum(axis=0)) - level_db(mixture)
        found = table.loc[(track.split, track.name, "mixture"), "residual_db"]
        assert (
            abs(max(found, -100) - max(residual_db, -100)) < 0.5
        )  # further down is the rounding of floats


def test_leaks_between_the_splits_are_named(tmp_path):
    root = write_dataset(tmp_path, 3, 1, 2, seconds=0.5)
    shutil.copytree(root / "train" / "train song 0", root / "test" / "a copy")
    for path, name in (
        ("train/train song 1", "Ada - One"),
        ("valid/valid song 0", "Bob feat. Ada - Two"),
        ("test/test song 0", "Ada feat. Bob - Three"),
        ("test/test song 1", "Bob - Four"),
    ):
        (root / path).rename((root / path).with_name(name))
    found = audit_warnings(build_store(root, 16000, 1))
    assert "1 recording more than once: train/train song 0, test/a copy" in found
    assert "2 artists on both sides of the split, in test and in train or valid: Ada, Bob" in found


def test_co_activity_counts_who_plays_together(tmp_path):
    """Bass plays always, drums in the first half, the piano in the second, vocals never."""
    root = write_dataset(tmp_path, 2, 1, 1, seconds=2)
    loud = np.full(32000, 0.1)
    half = np.where(np.arange(32000) < 16000, 0.1, 0)
    for folder in root.glob("*/*"):
        for stem, audio in zip(STEMS, (loud, half, 0.1 - half, 0 * loud)):
            soundfile.write(folder / f"{stem}.wav", audio, 16000)
    shares = co_activity(build_store(root, 16000, 1))
    assert shares.loc["bass"].tolist() == [1, 0.5, 0.5, 0]
    assert shares.loc["drums"].tolist() == [1, 1, 0, 0] and shares.loc["piano"].tolist() == [
        1,
        0,
        1,
        0,
    ]
    assert shares.loc["vocals"].isna().all()


def test_check_prints_the_audit_and_stops_at_what_would_stop_a_run(tmp_path, capsys):
    root = write_dataset(tmp_path / "data", 3, 1, 2, seconds=0.6)
    assert main(["check", "--data", str(root)]) == 0
    printed = capsys.readouterr().out
    assert (
        "tracks       train 3, valid 1, test 2" in printed
        and "warning      2 tracks shorter than a second" in printed
    )
    assert main(["check", "--data", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["tracks"] == {"train": 3, "valid": 1, "test": 2}
        and found["source_rates"] == [16000]
        and len(found["warnings"]) == 2
    )
    (root / "test" / "test song 0" / "bass.wav").write_bytes(b"")
    assert main(["check", "--data", str(root)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("mss_utils check: Cannot read ")
