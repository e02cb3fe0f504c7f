"""Shared by the tests: one small store, one folder for results and cache, one finished smoke run, and the count of faults."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests run side by side, one a core, and threads that wait for a busy core only spin

import nbformat
import numpy as np
import pytest
import soundfile

from mss_utils.config import ROOT, create_or_load_run, resolve_settings
from mss_utils.evaluation.bsseval import museval_is_available
from mss_utils.files import file_lock

MSS_UTILS = (sys.executable, "-m", "mss_utils")
STEMS = ("bass", "drums", "piano", "vocals")


SMALL = "segment_s=0.5 valid_s=2 steps=6 valid_every=3 excerpt_s=1"  # models of a few thousand weights, segments of half a second


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="the long form of the faults: more kills, more cases, longer files, clean environments",
    )


@pytest.fixture(scope="session")
def long_form(request):
    """Whether `--long` was given."""
    return request.config.getoption("--long")


@pytest.fixture
def count(record_property):
    """A function that adds to what the last lines of the tests sum up: `count("kills", 5)`."""
    return lambda what, number=1: record_property(f"count of {what}", number)


def pytest_terminal_summary(terminalreporter):
    """Say how many kills, faults and cases the tests have gone through."""
    totals = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, number in report.user_properties:
            totals[name.removeprefix("count of ")] += number
    if totals:
        terminalreporter.write_line(
            "survived: " + ", ".join(f"{number} {what}" for what, number in sorted(totals.items()))
        )


def pytest_collection_modifyitems(items):
    """The longest file first, then those that do not wait for the smoke run that it makes."""
    waiting = {item.module.__name__ for item in items if "smoke_run" in item.fixturenames}
    items.sort(
        key=lambda item: (
            (item.module.__name__ in waiting) - 2 * (item.module.__name__ == "test_kills")
        )
    )


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """Results and cache of the tests never touch the user's."""
    folder = tmp_path_factory.mktemp("mss")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSS_RESULTS", str(folder / "results"))
        patch.setenv("MSS_CACHE", str(folder / "cache"))
        yield folder


def write_dataset(
    root: Path, n_train=4, n_valid=1, n_test=2, seconds=3.0, rate=16000, channels=1, suffix=".wav"
) -> Path:
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
    """Smoke settings on the noise dataset."""
    return resolve_settings("smoke", str(dataset), "piano", SMALL)


@pytest.fixture(scope="session")
def store(small_settings):
    from mss_utils.data import open_store

    return open_store(small_settings)


@pytest.fixture(scope="session")
def songs_store():
    """The built-in songs of the smoke profile with models of the demo's size: (store, settings)."""
    from mss_utils.data import open_store

    return open_store(resolve_settings("smoke")), resolve_settings(
        "demo", overrides="segment_s=1.5 batch_size=2"
    )


@pytest.fixture(scope="session")
def museval():
    """museval, which cannot be imported without ffmpeg on the path."""
    if not museval_is_available():
        pytest.skip("museval needs ffmpeg and ffprobe")
    return pytest.importorskip("museval")


@pytest.fixture
def small_run(small_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    return create_or_load_run("smoke", "small", small_settings.data, "piano", SMALL)


def command(*arguments, **environment) -> subprocess.CompletedProcess:
    """`python -m mss_utils ...` as a user runs it."""
    return subprocess.run(
        [*MSS_UTILS, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.fixture(scope="session")
def smoke_run(own_folders, tmp_path_factory):
    """The whole smoke pipeline, undisturbed: the finished call, and the run's folder.

    Of the processes that the tests run in, one makes it and every one has a copy.
    """
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smoke_run"
    with file_lock(shared):
        if not (shared / "call.json").exists():
            done = command(
                "run",
                "--profile",
                "smoke",
                MSS_RESULTS=str(shared / "results"),
                MSS_CACHE=str(shared / "cache"),
            )
            (shared / "call.json").write_text(
                json.dumps(dict(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr))
            )
    for folder in ("results", "cache"):
        shutil.copytree(shared / folder, own_folders / folder, dirs_exist_ok=True)
    return SimpleNamespace(
        **json.loads((shared / "call.json").read_text())
    ), own_folders / "results" / "smoke"


def little_run(folder: Path, monkeypatch):
    """A run of two made-up stages, `one` and `two` (which reads `one`), with notebooks and results in `folder`."""
    from mss_utils import pipeline

    notebooks = folder / "notebooks"
    notebooks.mkdir()
    monkeypatch.setattr(pipeline, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(pipeline, "STAGES", {"one": (), "two": ("one",)})
    monkeypatch.setattr(pipeline, "PRODUCTS", {"one": ("one.txt",), "two": ()})
    monkeypatch.setattr(pipeline, "build_report", lambda run: None)
    monkeypatch.setattr(pipeline, "open_store", lambda settings: None)
    monkeypatch.setenv("MSS_RESULTS", str(folder / "results"))
    run = create_or_load_run("smoke", "little")
    write_notebook(
        notebooks / "one.ipynb",
        f"from pathlib import Path\nwith Path({str(run.folder)!r}, 'one.txt').open('a') as f: f.write('ran ')",
    )
    write_notebook(notebooks / "two.ipynb", "1 + 1")
    return run


def notebook_text(*sources: str, parameters: str = 'profile: str = "demo"\nrun: str = ""') -> str:
    """A notebook with a cell of parameters and one of each source."""
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=kernel))


def write_notebook(path: Path, *sources: str, **parameters: str) -> None:
    path.write_text(notebook_text(*sources, **parameters))
