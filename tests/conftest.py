"""Fixtures of all tests: a small dataset, its store, and one finished smoke run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; waiting threads only spin

import nbformat
import numpy as np
import pytest
import soundfile

from mss_utils.config import MODELS, ROOT, Run, create_or_load_run, resolve_settings
from mss_utils.data import open_store
from mss_utils.evaluation.bsseval import museval_is_available
from mss_utils.files import file_lock
from mss_utils.training import train

STEMS = ("bass", "drums", "piano", "vocals")
SMALL = "segment_s=0.5 valid_s=2 steps=6 valid_every=3 excerpt_s=1"  # trains in a second


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """Keep results and cache of the tests away from the user's."""
    folder = tmp_path_factory.mktemp("mss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(folder / "results"))
        patch.setenv("MSS_CACHE", str(folder / "cache"))
        yield folder


def write_dataset(
    root, n_train=4, n_valid=1, n_test=2, seconds=3.0, rate=16000, channels=1, suffix=".wav"
):
    """Write a folder dataset of noise, each stem at its own level; return its root."""
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
    return resolve_settings("smoke", str(dataset), "piano", SMALL)


@pytest.fixture(scope="session")
def store(small_settings):
    return open_store(small_settings)


@pytest.fixture(scope="session")
def songs_store():
    """Built-in songs of the smoke profile, and settings with models of the demo's size."""
    settings = resolve_settings("demo", overrides="segment_s=1.5 batch_size=2")
    return open_store(resolve_settings("smoke")), settings


@pytest.fixture(scope="session")
def museval():
    if not museval_is_available():
        pytest.skip("museval needs ffmpeg and ffprobe")
    return pytest.importorskip("museval")


@pytest.fixture(scope="session")
def two_seed_run(small_settings, store, tmp_path_factory):
    """Return a run with every model trained in two seeds; tests that write use a copy."""
    settings = small_settings.model_copy(update=dict(seeds=2))
    run = Run("two-seeds", settings, tmp_path_factory.mktemp("two-seeds"))
    for model in MODELS:
        for seed in range(2):
            train(run, store, "piano", model, seed)
    return run


@pytest.fixture
def small_run(small_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    return create_or_load_run("smoke", "small", small_settings.data, "piano", SMALL)


def command(*arguments, **environment):
    """Run `python -m mss_utils ...` as a user does."""
    variables = os.environ | environment
    call = [sys.executable, "-m", "mss_utils", *arguments]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=variables)


def start(*arguments, **environment):
    """`python -m ...` in the background."""
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    variables = os.environ | environment
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=variables, **pipes)


@pytest.fixture(scope="session")
def smoke_run(own_folders, tmp_path_factory):
    """Finished process and folder of the whole smoke pipeline; made once for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "smoke_run"
    with file_lock(shared):
        result = shared / "result.json"
        if not result.exists():
            places = dict(MSS_RESULTS=str(shared / "results"), MSS_CACHE=str(shared / "cache"))
            done = command("run", "--profile", "smoke", **places)
            result.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    for name in ("results", "cache"):
        shutil.copytree(shared / name, own_folders / name, dirs_exist_ok=True)
    returncode, stdout, stderr = json.loads(result.read_text())
    assert returncode == 0, stderr[-3000:]
    process = SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
    return process, own_folders / "results" / "smoke"


def little_run(folder: Path, monkeypatch):
    """Return a run of two small stages, `one` and `two` (which depends on `one`)."""
    from mss_utils import pipeline

    notebooks = folder / "notebooks"
    notebooks.mkdir()
    monkeypatch.setattr(pipeline, "NOTEBOOKS", notebooks)
    stages = {"one": ((), ("one.txt",)), "two": (("one",), ())}
    monkeypatch.setattr(pipeline, "STAGES", stages)
    monkeypatch.setattr(pipeline, "build_report", lambda run: None)
    monkeypatch.setattr(pipeline, "open_store", lambda settings: None)
    monkeypatch.setenv("MSS_RESULTS", str(folder / "results"))
    run = create_or_load_run("smoke", "little")
    source = f"with open({str(run.folder / 'one.txt')!r}, 'a') as file: file.write('ran ')"
    write_notebook(notebooks / "one.ipynb", source)
    write_notebook(notebooks / "two.ipynb", "1 + 1")
    return run


def notebook_text(*sources, parameters='profile: str = "demo"\nrun: str = ""'):
    """Return a notebook with a cell of parameters and one cell per source."""
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel))


def write_notebook(path, *sources, **parameters):
    path.write_text(notebook_text(*sources, **parameters))
