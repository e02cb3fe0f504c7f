"""Shared by the tests: one small store, one folder for results and cache, one finished smoke run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mss_utils.metrics import museval_works
from mss_utils.settings import ROOT, open_run, resolve

STEMS = ("bass", "drums", "piano", "vocals")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """Results and cache of the tests never touch the user's."""
    folder = tmp_path_factory.mktemp("mss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(folder / "results"))
        patch.setenv("MSS_CACHE", str(folder / "cache"))
        yield folder


def write_dataset(root: Path, n_train=4, n_valid=1, n_test=2, seconds=3.0, rate=16000, channels=1, suffix=".wav") -> Path:
    """A folder dataset of noise bursts and tones, every stem at a level of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", n_train), ("valid", n_valid), ("test", n_test)):
        for index in range(count):
            folder = root / split / f"{split} song {index}"
            folder.mkdir(parents=True)
            for row, stem in enumerate(STEMS):
                audio = rng.standard_normal((round(seconds * rate), channels)) * 0.02 * (row + 1)
                soundfile.write(folder / f"{stem}{suffix}", audio, rate)
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def small_settings(dataset):
    """Smoke settings on the noise dataset: models of a few thousand weights, segments of half a second."""
    return resolve("smoke", str(dataset), "piano", "segment_s=0.5 valid_s=2 steps=6 valid_every=3 excerpt_s=1")


@pytest.fixture(scope="session")
def store(small_settings):
    from mss_utils.data import open_store

    return open_store(small_settings)


@pytest.fixture(scope="session")
def songs_store():
    """The built-in songs of the smoke profile with models of the demo's size: (store, settings)."""
    from mss_utils.data import open_store

    return open_store(resolve("smoke")), resolve("demo", overrides="segment_s=1.5 batch_size=2")


@pytest.fixture(scope="session")
def museval():
    """museval, which cannot be imported without ffmpeg on the path."""
    if not museval_works():
        pytest.skip("museval needs ffmpeg and ffprobe")
    return pytest.importorskip("museval")


@pytest.fixture
def small_run(small_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    return open_run("smoke", "small", small_settings.data, "piano", "segment_s=0.5 valid_s=2 steps=6 valid_every=3 excerpt_s=1")


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    """`python -m mss_utils ...` as a user runs it."""
    return subprocess.run(_command(arguments), capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


def _command(arguments) -> list[str]:
    return [sys.executable, "-m", "mss_utils", *arguments]


@pytest.fixture(scope="session")
def smoke_run(own_folders):
    """The whole smoke pipeline: killed when its second notebook is done, then called again.

    Returns what the killed call had printed, the finished second call, and the run's folder.
    """
    killed = subprocess.Popen(_command(["run", "--profile", "smoke"]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    printed = []
    for line in killed.stdout:
        printed.append(line)
        if line.startswith("02_baseline_unet"):
            killed.kill()
    killed.wait()
    return "".join(printed), command("run", "--profile", "smoke"), own_folders / "results" / "smoke"
