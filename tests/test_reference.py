"""The reference run in the repository: small, of nobody's music, and true to its own tables."""

import os
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from mss_utils.config import MODELS, ROOT, expand_path, results_folder
from mss_utils.data import open_store
from mss_utils.report.collections import (
    REFERENCE,
    collected,
    is_study,
    kept_models,
    score_again,
    table_of,
    targets_of,
    write_report,
)

FOLDER = ROOT / "results" / REFERENCE
needs_pdftotext = pytest.mark.skipif(
    not shutil.which("pdftotext"), reason="pdftotext (poppler-utils) is not installed"
)


@pytest.fixture(scope="module")
def reference(own_folders):
    """A copy under the results of the tests, so that nothing in the repository is written."""
    copy = results_folder() / REFERENCE
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("notebooks"))
    return copy


def files(suffix=""):
    return [path for path in FOLDER.rglob("*") if path.is_file() and path.name.endswith(suffix)]


def test_it_is_small():
    assert sum(path.stat().st_size for path in files()) < 40e6
    assert all(path.stat().st_size < 8e6 for path in files("listening.html"))
    assert not files(".ckpt") and not files(".png")


def test_its_weights_are_in_half_precision_and_enough_for_each_target(reference):
    kept = {}
    for path in files("model.safetensors"):
        kept.setdefault(path.parts[-4], set()).add(path.parts[-3])
        assert {
            tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()
        } == {torch.float16}
    results = [run for run in collected(REFERENCE) if not is_study(run)]
    assert set(kept) == {target for run in results for target in targets_of(run)}
    assert kept["vocals"] == set(MODELS)


def test_no_sound_of_musdb_and_no_path_of_a_machine_is_in_it():
    for path in files():
        text = path.read_bytes()
        assert b"data:audio" not in text or path == FOLDER / "demo" / "listening.html", path
        assert path.suffix not in (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4")
        if path.suffix in (".json", ".csv", ".ipynb"):
            assert not re.search(rb"(?<![\w.<>])/(?:tmp|root|home|work|Users|content)/", text), path


@needs_pdftotext
def test_its_report_is_the_one_its_tables_make(reference, tmp_path, monkeypatch):
    """Whoever changes a table or the text has to run `make report RUN=reference`."""
    monkeypatch.setattr(
        "mss_utils.publishing.REFERENCE", "another name"
    )  # then the report stays in the copy's folder
    pdf, page = write_report(REFERENCE)
    words = lambda path: (
        subprocess.run(["pdftotext", path, "-"], capture_output=True, text=True, check=True).stdout
    )
    assert words(pdf) == words(ROOT / "report" / "report.pdf")
    # Pictures may differ by a last digit from one processor to another.
    without_pictures = lambda path: re.sub(r'data:image/[^"]+', "", path.read_text())
    assert without_pictures(page) == without_pictures(ROOT / "report" / "report.html")
    assert {path.name for path in (reference / "figures").iterdir()} == {
        path.name for path in (FOLDER / "figures").iterdir()
    }


def assert_scores_stay(name, store):
    """The weights that are there give some of the test tracks the scores of the committed table."""
    run = next(run for run in collected(REFERENCE) if run.folder.name == name)
    keys, metrics = ["target", "track", "model", "seed"], ["SDR", "utterance_SDR", "SI_SDR"]
    for target, models in kept_models(run).items():
        again = score_again(run, store, target, models)
        both = again.merge(
            table_of(run, "tracks"), on=keys, suffixes=("", " there"), validate="one_to_one"
        )
        assert len(both) == len(models) * len(store.split("test"))
        for metric in metrics:
            moved = (both[metric] - both[f"{metric} there"]).abs()
            assert moved.max() < 0.05, both[[*keys, metric, f"{metric} there"]]


@pytest.mark.skipif(
    not os.environ.get("MUSDB_PATH"), reason="MUSDB_PATH names no folder of MUSDB18"
)
def test_scores_of_musdb_excerpts_stay(reference, tmp_path):
    dataset = expand_path(os.environ["MUSDB_PATH"])
    for split, count in (("train", 2), ("test", 4)):
        (tmp_path / split).mkdir()
        for path in sorted((dataset / split).glob("*.stem.mp4"))[:count]:
            (tmp_path / split / path.name).symlink_to(path.resolve())
    assert_scores_stay("musdb7", open_store(settings_of("musdb7", data=str(tmp_path))))


def test_scores_of_built_in_songs_stay(reference):
    assert_scores_stay(
        "demo", open_store(settings_of("demo", n_train_songs=1, n_valid_songs=1, n_test_songs=2))
    )


def settings_of(name, **changes):
    return next(run for run in collected(REFERENCE) if run.folder.name == name).settings.model_copy(
        update=changes
    )
