"""The stem store: decoded once, kept exactly, resumed, safe with several builders, portable."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from conftest import write_dataset

from mss_utils.config import ROOT, resolve_settings
from mss_utils.data import build_store, check_target_exists, open_store, read_store
from mss_utils.data import store as store_module


@pytest.fixture
def decoded(monkeypatch):
    """Names of the tracks that are decoded during the test."""
    names, original = [], store_module.read_track
    spy = lambda source: names.append(source.name) or original(source)  # noqa: E731
    monkeypatch.setattr(store_module, "read_track", spy)
    return names


def test_content(dataset):
    store = build_store(dataset, 16000, 1)
    assert [len(store.split(split)) for split in ("train", "valid", "test")] == [4, 1, 2]
    track = store.split("test")[0]
    mixture, stems = store.load(track)
    for name, audio in zip(store.stems, stems, strict=True):
        expected, _ = soundfile.read(dataset / "test" / track.name / f"{name}.wav")
        np.testing.assert_allclose(audio[0], expected, atol=track.scale)
    np.testing.assert_allclose(stems.sum(axis=0), mixture, atol=3 * track.scale)
    assert isinstance(store.raw(track), np.memmap) and store.raw(track).dtype == np.int16
    assert track.source == str(dataset / "test" / track.name) and track.source_rates == (16000,)


def test_samples_beyond_full_scale(tmp_path):
    write_dataset(tmp_path, 2, 1, 1, seconds=1)
    for path in (tmp_path / "test" / "test song 0").iterdir():
        soundfile.write(path, np.full(16000, 0.9), 16000, subtype="FLOAT")
    store = build_store(tmp_path, 16000, 1)
    mixture, stems = store.load(store.split("test")[0])
    assert abs(mixture.max() - 3.6) < 1e-3 and abs(stems.max() - 0.9) < 1e-3


def test_target_may_be_a_group_but_not_a_grouped_stem():
    demo = resolve_settings("demo", target="band", overrides="groups=bass+drums->band")
    for target in ("band", "all"):
        check_target_exists(demo.model_copy(update=dict(target=target)))
    with pytest.raises(ValueError, match="No stem 'bass'.*band"):
        check_target_exists(demo.model_copy(update=dict(target="bass")))


def test_only_changed_songs_are_decoded_again(tmp_path, decoded):
    root = write_dataset(tmp_path / "data", 3, 1, 1, seconds=0.5)
    first = build_store(root, 16000, 1)
    assert len(decoded) == 5
    assert build_store(root, 16000, 1) == first and len(decoded) == 5
    assert build_store(root / ".." / "data", 16000, 1).sha == first.sha and len(decoded) == 5
    soundfile.write(root / "train" / "train song 0" / "bass.wav", np.zeros(8000), 16000)
    (first.folder / ".part-left.npy").write_bytes(b"what a killed build left")
    shutil.rmtree(root / "train" / "train song 1")
    second = build_store(root, 16000, 1)
    assert second.sha != first.sha and decoded[5:] == ["train song 0"]
    assert [track.name for track in second.split("train")] == ["train song 0", "train song 2"]
    files = {path.name for path in second.folder.iterdir()}
    assert files == {"index.json", ".lock", *(track.file for track in second.tracks)}
    damaged = second.folder / second.tracks[0].file
    damaged.write_bytes(damaged.read_bytes().replace(b"}", b"(", 1))  # in the header
    assert build_store(root, 16000, 1).sha == second.sha and len(decoded) == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from mss_utils.data import store
original, seen = store.read_track, []
def read_three(source):
    seen.append(source)
    return original(source) if len(seen) < 4 else os.kill(os.getpid(), signal.SIGKILL)
store.read_track = read_three
store.build_store(Path(sys.argv[1]), 16000, 1, n_jobs=1)
"""


def test_killed_build_resumes(tmp_path, monkeypatch, decoded):
    monkeypatch.setenv("MSS_CACHE", str(tmp_path / "cache"))
    root = write_dataset(tmp_path / "data", 6, 1, 1, seconds=0.2)
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not finished"):
        read_store(next(tmp_path.rglob("index.json")).parent)
    store = build_store(root, 16000, 1)
    assert len(store.tracks) == 8 and len(decoded) == 5
    assert [track.name for track in store.split("train")] == [f"train song {i}" for i in range(6)]


def test_builds_at_once(tmp_path, decoded):
    root = write_dataset(tmp_path, 4, 1, 1, seconds=0.2)
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: build_store(root, 16000, 1), range(3)))
    assert all(store == stores[0] for store in stores) and len(decoded) == 6


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
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment)
    assert open_store(small_settings.model_copy(update=dict(data=str(carried)))).sha == store.sha


def test_carried_store_that_does_not_fit(store, tmp_path):
    carried = shutil.copytree(store.folder, tmp_path / "carried")

    def assert_error(words, overrides=""):
        with pytest.raises(ValueError, match=words):
            open_store(resolve_settings("smoke", str(carried), "piano", overrides))

    assert_error("has sample_rate=16000, channels=1", "sample_rate=22050")
    assert_error("the stems bass, drums.*no groups", "groups=bass+drums->low")
    next(carried.glob("*.npy")).unlink()
    assert_error("lacks .*npy: copy the whole folder")
    index = (carried / "index.json").read_text()
    for hostile in (index.replace('"file":"', '"file":"../'), '{"format": 1}'):
        (carried / "index.json").write_text(hostile)
        assert_error("index.json is damaged")
