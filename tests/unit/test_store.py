"""The stem store: decoded once, kept exactly, resumed, safe with several builders, portable."""

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

from mss_utils.config import ROOT, resolve_settings
from mss_utils.data import build_store, check_target_exists, open_store, read_store
from mss_utils.data import store as store_module


def stamps(store):
    return {track.file: (store.folder / track.file).stat().st_mtime_ns for track in store.tracks}


def test_content(dataset):
    store = build_store(dataset, 16000, 1)
    assert store.stems == STEMS
    assert [len(store.split(split)) for split in ("train", "valid", "test")] == [4, 1, 2]
    track = store.split("test")[0]
    mixture, stems = store.load(track)
    for name, audio in zip(store.stems, stems, strict=True):
        expected, _ = soundfile.read(dataset / "test" / track.name / f"{name}.wav")
        np.testing.assert_allclose(audio[0], expected, atol=track.scale)
    np.testing.assert_allclose(stems.sum(axis=0), mixture, atol=3 * track.scale)
    raw = store.raw(track)
    assert isinstance(raw, np.memmap) and raw.dtype == np.int16 and raw.shape == (5, 1, 48000)
    assert store.n_bytes == sum(store.raw(track).nbytes for track in store.tracks)
    assert track.source == str(dataset / "test" / track.name) and track.source_rates == (16000,)


def test_samples_beyond_full_scale(tmp_path):
    write_dataset(tmp_path, 2, 1, 1, seconds=1)
    loud = np.full((16000, 1), 0.9, np.float32)
    for stem in STEMS:
        path = tmp_path / "test" / "test song 0" / f"{stem}.wav"
        soundfile.write(path, loud, 16000, subtype="FLOAT")
    store = build_store(tmp_path, 16000, 1)
    mixture, stems = store.load(store.split("test")[0])
    assert abs(mixture.max() - 3.6) < 1e-3 and abs(stems.max() - 0.9) < 1e-3


def test_unknown_target(store, small_settings):
    with pytest.raises(ValueError, match="No stem 'violin'.*bass, drums, piano, vocals"):
        store.stem_index("violin")
    for settings in (small_settings, resolve_settings("demo")):
        with pytest.raises(ValueError, match="No stem 'violin'.*piano"):
            check_target_exists(settings.model_copy(update=dict(target="violin")))
    check_target_exists(resolve_settings("demo", target="all"))
    group = "groups=bass+drums->band"
    check_target_exists(resolve_settings("demo", target="band", overrides=group))
    with pytest.raises(ValueError, match="No stem 'bass'.*band"):
        check_target_exists(resolve_settings("demo", target="bass", overrides=group))


# --- decoded once


def test_only_changed_songs_are_decoded_again(tmp_path):
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=1)
    first = build_store(root, 16000, 1)
    before = stamps(first)
    assert build_store(root, 16000, 1) == first and stamps(first) == before
    assert stamps(build_store(root / ".." / "data", 16000, 1)) == before, "another path"
    soundfile.write(root / "train" / "train song 0" / "bass.wav", np.zeros(16000), 16000)
    changed = build_store(root, 16000, 1)
    assert changed.sha != first.sha
    assert sum(before[file] != stamp for file, stamp in stamps(changed).items()) == 1


def test_removed_song(tmp_path):
    root = write_dataset(tmp_path / "data", 3, 1, 1, seconds=0.5)
    first = build_store(root, 16000, 1)
    (first.folder / ".part-999-1-left.npy").write_bytes(b"what a killed build left")
    shutil.rmtree(root / "train" / "train song 1")
    second = build_store(root, 16000, 1)
    assert [track.name for track in second.split("train")] == ["train song 0", "train song 2"]
    files = {path.name for path in second.folder.iterdir()}
    assert files == {"index.json", ".lock", *(track.file for track in second.tracks)}


def test_many_tracks_open_fast(tmp_path):
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


def start_build(root, go, **options):
    """Start a build that stops after three tracks until the file `go` exists."""
    call = [sys.executable, "-c", HELD, str(root), str(go)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(call, text=True, cwd=ROOT, **pipes, **options)


def indexed(folder):
    """Return the names of the tracks in the index of the store under `folder`."""
    indices = [json.loads(path.read_text()) for path in folder.rglob("index.json")]
    return [track["name"] for index in indices for track in index["tracks"]]


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def eight_tracks(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    return write_dataset(tmp_path / "data", 6, 1, 1, seconds=0.2)


def test_killed_build_resumes(tmp_path, eight_tracks, monkeypatch):
    build = start_build(eight_tracks, tmp_path / "never")
    wait_for(lambda: len(indexed(tmp_path)) == 3)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    with pytest.raises(ValueError, match="is not finished"):
        read_store(next(tmp_path.rglob("index.json")).parent)
    decoded, original = [], store_module.read_track
    spy = lambda source: decoded.append(source.name) or original(source)  # noqa: E731
    monkeypatch.setattr(store_module, "read_track", spy)
    store = build_store(eight_tracks, 16000, 1)
    assert len(store.tracks) == 8 and len(decoded) == 5
    names = [track.name for track in store.split("train")]
    assert names == sorted(names)


def test_second_build_waits(tmp_path, eight_tracks):
    builds = [start_build(eight_tracks, tmp_path / "go")]
    wait_for(lambda: len(indexed(tmp_path)) == 3)
    builds.append(start_build(eight_tracks, tmp_path / "go"))
    assert "nother process" in builds[1].stderr.readline()
    written = {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}
    (tmp_path / "go").touch()
    assert [build.communicate()[0] for build in builds] == ["8\n", "8\n"]
    after = {path: path.stat().st_ino for path in tmp_path.rglob("*.npy")}
    assert len(written) == 3 and written.items() <= after.items(), "written twice"


def test_many_threads(tmp_path):
    root = write_dataset(tmp_path, 4, 1, 1, seconds=0.2)
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: build_store(root, 16000, 1), range(6)))
    assert all(store == stores[0] for store in stores)


def test_full_disk(tmp_path, monkeypatch):
    """A limit of 20 kB per file does to a write what a full disk does."""
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 2, 1, 1, seconds=0.1)
    write_dataset(tmp_path / "long", 1, 0, 0, seconds=5)
    shutil.move(tmp_path / "long" / "train" / "train song 0", root / "train" / "much too long")
    limits = (20_000, 20_000)
    (tmp_path / "go").touch()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)  # noqa: E731
    build = start_build(root, tmp_path / "go", preexec_fn=limit)
    _, error = build.communicate()
    assert build.returncode == 1
    assert "No space left to write" in error and "run the same command again" in error
    assert not [path for path in tmp_path.rglob("*") if ".part" in path.name]
    assert len(indexed(tmp_path)) == len(list(tmp_path.rglob("*.npy"))) >= 1
    assert len(build_store(root, 16000, 1).tracks) == 5, "the same command resumes"


# --- portable


def test_carried_store_needs_no_decoder(small_settings, store, tmp_path):
    """Training and separation import neither musdb nor museval, and need no ffmpeg."""
    carried = shutil.copytree(store.folder, tmp_path / "carried")
    settings = "segment_s=0.5 valid_s=1 steps=2 valid_every=2"
    script = f"""
import sys
from mss_utils.config import create_or_load_run
from mss_utils.data import open_store
from mss_utils.separation import separate
from mss_utils.training import train
run = create_or_load_run("smoke", "carried", {str(carried)!r}, "piano", "{settings}")
store = open_store(run.settings)
model = train(run, store, "piano", "unet")
mixture, _ = store.load(store.split("test")[0])
assert separate(model, mixture, 16000).shape == mixture.shape
assert not {{"musdb", "stempeg", "museval"}} & set(sys.modules), "imported"
"""
    places = dict(MSS_RESULTS=str(tmp_path / "results"), MSS_CACHE=str(tmp_path / "cache"))
    environment = os.environ | places | dict(PATH=str(tmp_path))
    call = [sys.executable, "-c", script]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert open_store(small_settings.model_copy(update=dict(data=str(carried)))).sha == store.sha


def test_carried_store_that_does_not_fit(store, tmp_path):
    carried = shutil.copytree(store.folder, tmp_path / "carried")

    def assert_error(words, overrides=""):
        with pytest.raises(ValueError, match=words):
            open_store(resolve_settings("smoke", str(carried), "piano", overrides))

    assert_error("has sample_rate=16000, the run asks for 22050", "sample_rate=22050")
    assert_error("has the stems bass, drums.*leave groups out", "groups=bass+drums->low")
    next(carried.glob("*.npy")).unlink()
    assert_error("lacks .*npy: copy the whole folder")
    (carried / "index.json").write_text('{"format": 1}')
    assert_error("index.json is damaged")
