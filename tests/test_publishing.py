"""A collection is exported, set again without data, and scored again with its own weights."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import command
from safetensors.torch import load_file

from mss_utils import report
from mss_utils.config import MODELS, ROOT, collection_runs, results_folder
from mss_utils.listening import reencode
from mss_utils.listening.player import SOUND
from mss_utils.models import load_model
from mss_utils.report.collections import (
    collected,
    export,
    rescore,
    strip_heavy_outputs,
    write_report,
)

needs_pdftotext = pytest.mark.skipif(
    not shutil.which("pdftotext"), reason="pdftotext (poppler-utils) is not installed"
)


@pytest.fixture(scope="module")
def collection(smoke_run):
    """The smoke run twice: as it is, and as a run on a dataset of somebody's, whose sounds must not be passed on."""
    folder = results_folder() / "full"
    for name in ("own", "songs"):
        shutil.copytree(
            smoke_run[1], folder / name, ignore=shutil.ignore_patterns("ablations", "data_study")
        )
        path = folder / name / "settings.json"
        no_study = dict(ablations=[], data_study=False)  # a study's scores are no results
        path.write_text(
            json.dumps(
                json.loads(path.read_text())
                | no_study
                | (dict(data="somewhere") if name == "own" else {})
            )
        )
    (folder / "more_music.csv").write_text(
        "target,music,model,train_minutes,steps,best_step,valid_sdr\npiano,songs,unet,9.5,12,6,1.5\n"
    )
    return "full"


@pytest.fixture(scope="module")
def exported(collection):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            report, "MAX_TABLE", 5_000
        )  # frames.csv and phase.csv are longer, paired.csv is not
        return export(collection, "small", complete=["piano"])


def test_a_collection_is_a_folder_of_runs(collection):
    assert [run.name for run in collected(collection)] == ["full/own", "full/songs"], (
        "built-in songs last"
    )
    assert (
        collection_runs("smoke") == []
        and collection_runs("nothing") == []
        and collection_runs("") == []
    )
    with pytest.raises(ValueError, match="No collection 'smoke': expected runs under"):
        collected("smoke")


def test_what_is_exported_is_small_and_whole(collection, exported):
    full, small = results_folder() / "full" / "own", exported / "own"
    assert not [
        path for path in exported.rglob("*") if path.suffix in (".ckpt", ".png", ".mp3", ".pdf")
    ]
    for table in report.TABLES:
        before, after = (
            pd.read_csv(full / "tables" / f"{table}.csv"),
            pd.read_csv(*(small / "tables").glob(f"{table}.csv*")),
        )
        pd.testing.assert_frame_equal(before, after, rtol=1e-5, check_dtype=False)
    assert all(
        (small / "tables" / name).exists()
        for name in ("frames.csv.gz", "phase.csv.gz", "paired.csv")
    )
    kept = sorted(str(path.relative_to(exported)) for path in exported.rglob("model.safetensors"))
    assert kept == [
        f"own/models/piano/{model}/seed0/model.safetensors" for model in sorted(MODELS)
    ], "each target once, real music first"
    assert len(list(exported.rglob("model.json"))) == 2 * len(MODELS) and len(
        list(exported.rglob("history.csv"))
    ) == 2 * len(MODELS)
    for model in MODELS:
        place = Path("models/piano") / model / "seed0"
        whole, half = (load_file(folder / place / "model.safetensors") for folder in (full, small))
        assert {tensor.dtype for tensor in half.values() if tensor.is_floating_point()} == {
            torch.float16
        }
        for key, tensor in load_model(small / place).state_dict().items():
            torch.testing.assert_close(tensor, whole.get(key, tensor), rtol=1e-3, atol=1e-6)
    assert (exported / "more_music.csv").read_text().splitlines()[
        1
    ] == "piano,songs,unet,9.5,12,6,1.5"


def test_no_sound_of_somebody_elses_music_is_passed_on(exported):
    assert (exported / "songs" / "listening.html").exists() and not (
        exported / "own" / "listening.html"
    ).exists()
    page = (exported / "songs" / "listening.html").read_text()
    assert "Run <b>small/songs</b>" in page and '"run": "small/songs", "models": null' in page, (
        "answers are about what is exported"
    )
    for path in (exported / "own").rglob("*"):
        assert path.suffix not in (".html", ".mp3", ".wav") and not (
            path.is_file() and b"data:audio" in path.read_bytes()
        ), path


def test_notebooks_keep_words_and_lose_weight(exported):
    texts = ""
    for path in sorted((exported / "songs" / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        assert path.stat().st_size < 150_000
        outputs = [
            output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
        ]
        assert not [
            kind
            for output in outputs
            for kind in output.get("data", {})
            if kind.startswith("image/")
        ]
        texts += json.dumps([output.get("data", {}).get("text/markdown", "") for output in outputs])
        assert str(ROOT) not in path.read_text() and str(results_folder()) not in path.read_text()
    assert "test tracks; of" in texts and "Median SDR on **piano**" in texts
    heavy = nbformat.v4.new_code_cell(
        outputs=[nbformat.v4.new_output("display_data", data={"text/html": "x" * 30_000})]
    )
    assert strip_heavy_outputs(nbformat.v4.new_notebook(cells=[heavy])).cells[0].outputs == []


def test_an_export_loses_no_answers_and_overwrites_no_run(collection, exported, smoke_run):
    (exported / "songs" / "answers").mkdir(exist_ok=True)
    (exported / "songs" / "answers" / "somebody.json").write_text("{}")
    done = command("export", "--run", collection, "--to", "small", "--complete", "piano")
    assert (
        done.returncode == 0
        and done.stdout.startswith(f"{exported}: ")
        and done.stdout.endswith(" MB\n")
    ), done.stderr
    assert (exported / "songs" / "answers" / "somebody.json").read_text() == "{}"
    shutil.rmtree(exported / "songs" / "answers")
    for name, reason in (
        ("smoke", "is there and no collection"),
        (collection, "is the collection itself"),
        ("", "may hold"),
        (".", "may hold"),
        ("full/", "may hold"),
    ):
        with pytest.raises(ValueError, match=reason):
            export(collection, name)
    assert len(list((results_folder() / "smoke").iterdir())) > 5 and len(collected(collection)) == 2
    with pytest.raises(
        ValueError, match="No run of 'full' has the target 'flute'; there are: piano"
    ):
        export(collection, "small", heard=["flute"])


def test_a_run_that_is_not_finished_stops_the_export(collection, tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    begun = tmp_path / "begun" / "run"
    begun.mkdir(parents=True)
    (begun / "settings.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="'begun/run' lacks .*environment.json: finish it first"
    ):
        export("begun", "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun"]


@needs_pdftotext
def test_a_collection_is_reported_from_its_files_alone(exported, monkeypatch):
    """No data, no training: the figures are drawn again from the tables, and a changed table is a changed sentence."""
    monkeypatch.setenv("MSS_CACHE", "/nonexistent")
    done = command("run", "--run", "small", MSS_CACHE="/nonexistent")
    assert done.returncode == 0, done.stderr
    pdf, page = map(Path, done.stdout.split())
    assert (pdf, page) == (exported / "report.pdf", exported / "report.html")
    text = subprocess.run(
        ["pdftotext", pdf, "-"], capture_output=True, text=True, check=True
    ).stdout
    html = page.read_text()
    assert (
        html.count("<iframe srcdoc=") == 1
        and "data:audio/mpeg" in html
        and 'id="players"' not in html
    )
    figure = exported / "figures" / "phase.svg"
    figure.write_text("old")
    table = exported / "own" / "tables" / "summary.csv"
    before = table.read_text()
    rows = pd.read_csv(table)
    rows.loc[(rows["model"] == "mixture") & (rows["metric"] == "SDR"), "median"] = -43.21
    rows.to_csv(table, index=False)
    write_report("small")
    again = subprocess.run(
        ["pdftotext", pdf, "-"], capture_output=True, text=True, check=True
    ).stdout
    assert "−43.21" in again and "−43.21" not in text and figure.read_text() != "old"
    table.write_text(before)


def test_a_collection_is_no_run(exported):
    done = command("train", "--run", "small", "--profile", "smoke")
    assert (
        done.returncode == 1
        and "'small' is a collection of runs (small/own, small/songs): name one of them"
        in done.stderr
    )


def test_a_collection_takes_no_settings(exported):
    done = command("run", "--run", "small", "--set", "steps=3")
    assert (
        done.returncode == 1
        and "'small' is a collection of finished runs (small/own, small/songs)" in done.stderr
    )


def test_weights_in_half_precision_score_as_before(collection, exported):
    """Of built-in songs the test songs are rendered; whatever dataset the others had must be given, and be the right one."""
    own = exported / "own" / "settings.json"
    before = own.read_text()
    with pytest.raises(FileNotFoundError, match="No dataset folder"):
        rescore("small", "/no/such/folder")
    own.write_text(
        json.dumps(json.loads(before) | dict(data=None))
    )  # the test songs of the smoke profile after all
    table = rescore("small", "")
    tracks = exported / "own" / "tables" / "tracks.csv"
    scores = tracks.read_text()
    pd.read_csv(tracks).assign(frames=99).to_csv(tracks, index=False)
    with pytest.raises(
        ValueError, match="are not those that run 'small/own' was scored on"
    ):  # the same names, another length
        rescore("small", "")
    tracks.write_text(scores)
    own.write_text(before)
    assert (
        table["model"].tolist() == list(MODELS)
        and (table["tracks"] == 3).all()
        and set(table["run"]) == {"own"}
    )
    assert (table["largest_median_db"] < 0.05).all() and (table["largest_track_db"] < 0.2).all(), (
        table
    )
    assert (table["largest_track_db"] > 0).all(), "half precision is not quite the same"
    assert (results_folder() / "small-rescored" / "own" / "tables" / "tracks.csv").exists()


def test_other_test_tracks_are_noticed(exported, dataset):
    with pytest.raises(
        ValueError, match="test tracks of .* are not those that run 'small/own' was scored on"
    ):
        rescore("small", str(dataset))


def test_exported_weights_separate_a_song(exported, tmp_path):
    song = tmp_path / "song.wav"
    soundfile.write(song, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    folder = exported / "own" / "models" / "piano" / "demucs_lstm" / "seed0"
    done = command("separate", str(song), "--model", str(folder), "--out", str(tmp_path))
    assert done.returncode == 0 and len(list(tmp_path.glob("song.*piano*"))) >= 1, done.stderr


def test_sounds_coded_smaller_keep_length_level_and_step(smoke_run):
    page = (smoke_run[1] / "listening.html").read_text()
    smaller = reencode(page, 0.5)
    assert len(smaller) < 0.8 * len(page)
    sounds = lambda text: [
        soundfile.read(io.BytesIO(base64.b64decode(code)), dtype="float32")[0]
        for code in re.findall(SOUND + "([A-Za-z0-9+/=]+)", text)[:12]
    ]
    for before, after in zip(sounds(page), sounds(smaller), strict=True):
        assert (
            len(before) == len(after)
            and abs(10 * np.log10(np.mean(after**2) / np.mean(before**2))) < 0.2
        )
        lags = [np.sum(before[10:-10] * np.roll(after, lag)[10:-10]) for lag in range(-5, 6)]
        assert np.argmax(lags) == 5, "moved by a sample or more"
