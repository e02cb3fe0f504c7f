"""The smoke profile through all six notebooks, what it leaves, and how it stops, skips and goes on."""

import json
import os
import shutil

import pytest
from conftest import command, little_run, write_notebook

import mss_utils.pipeline as pipeline
from mss_utils import analysis, evaluation, listening
from mss_utils.__main__ import main
from mss_utils.config import MODELS, ROOT, create_or_load_run
from mss_utils.pipeline import STAGES, StageError, is_finished, stage_key

CONTRACT = [
    "settings.json",
    "environment.json",
    "report.pdf",
    "listening.html",
    *(f"notebooks/{name}.ipynb" for name in STAGES),
    *(
        f"models/piano/{model}/seed0/{file}"
        for model in MODELS
        for file in ("model.safetensors", "model.json", "history.csv", "last.ckpt")
    ),
    *(f"tables/{name}.csv" for name in (*evaluation.TABLES, *analysis.TABLES, *listening.TABLES)),
    *(
        f"ablations/{name}/models/piano/unet/seed0/model.json"
        for name in ("random_mix", "curriculum")
    ),
]


def test_the_whole_line_runs_and_leaves_what_the_contract_names(smoke_run):
    done, folder = smoke_run
    assert done.returncode == 0, done.stderr[-3000:]
    missing = [path for path in CONTRACT if not (folder / path).stat().st_size]
    assert not missing
    assert (folder / "report.pdf").read_bytes().startswith(b"%PDF")
    for name in ("unet", "mixture", "reference"):
        assert list(folder.glob(f"audio/*/piano/{name}.mp3"))
    svgs = {path.stem for path in folder.glob("figures/*.svg")}
    assert svgs == {path.stem for path in folder.glob("figures/*.png")} and len(svgs) > 10


def test_nothing_half_written_is_left(smoke_run):
    _, folder = smoke_run
    assert not [path for path in folder.rglob("*") if ".part" in path.name]


def test_no_path_of_this_machine_is_in_the_tables_and_settings(smoke_run):
    _, folder = smoke_run
    for path in [*folder.rglob("*.json"), *folder.glob("tables/*.csv")]:
        assert str(ROOT) not in path.read_text(), path


def test_finished_stages_are_skipped(smoke_run):
    _, folder = smoke_run
    before = {path: path.stat().st_mtime_ns for path in folder.glob("notebooks/*.ipynb")}
    again = command("run", "--profile", "smoke")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {name for name in STAGES if f"{name:<18} unchanged" in again.stdout} == set(STAGES)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("notebooks/*.ipynb")} == before


def test_an_argument_that_contradicts_the_run_is_an_error(smoke_run, capsys):
    assert main(["run", "--profile", "smoke", "--set", "steps=99"]) == 1
    said = capsys.readouterr().err
    assert "steps=" in said and "99" in said


def test_a_trained_model_separates_a_song(smoke_run, tmp_path, own_folders):
    _, folder = smoke_run
    song = next((own_folders / "cache").glob("songs-*/test/*/mixture.flac"))
    assert (
        main(
            [
                "separate",
                str(song),
                "--model",
                str(folder / "models/piano/unet/seed0"),
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "mixture.piano.wav",
        "mixture.piano.residual.wav",
    }


def test_the_report_can_be_made_again(smoke_run, capsys):
    _, folder = smoke_run
    (folder / "report.pdf").unlink()
    assert main(["report", "--run", "smoke"]) == 0 and (folder / "report.pdf").exists()
    capsys.readouterr()
    assert main(["report", "--run", "nothing"]) == 1
    said = capsys.readouterr().err
    assert "No run 'nothing'" in said and "smoke" in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "--profile", "dmeo"], ["dmeo", "smoke, demo, musdb7, musdb18"]),
        (
            ["run", "--profile", "smoke", "--run", "x", "--target", "violin"],
            ["No stem 'violin'", "piano"],
        ),
        (
            ["run", "--profile", "smoke", "--run", "x", "--target", "piano,violin"],
            ["No stem 'violin'", "piano"],
        ),
        (
            ["run", "--profile", "smoke", "--run", "x", "--set", "stepz=1"],
            ["Unknown setting 'stepz'", "batch_size"],
        ),
        (
            ["run", "--profile", "smoke", "--run", "x", "--data", "no/such/folder"],
            ["No dataset folder", "no/such/folder"],
        ),
        (
            ["run", "--profile", "musdb18", "--run", "x"],
            ["musdb18 profile needs the dataset", "MUSDB_PATH"],
        ),
        (["separate", "no.wav", "--model", "nowhere"], ["No model.json in nowhere", "seed0"]),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, own_folders, monkeypatch, capsys):
    monkeypatch.setenv("MUSDB_PATH", "")
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    for word in words:
        assert word in said
    assert not (own_folders / "results" / "x").exists()


def test_a_mistake_in_a_process_of_its_own_is_a_sentence_too():
    done = command("run", "--profile", "dmeo")
    assert (
        done.returncode == 1
        and done.stderr
        == "mss_utils run: Unknown profile 'dmeo'; there are: smoke, demo, musdb7, musdb18.\n"
    )


def test_check_prints_what_it_found(dataset, capsys):
    assert main(["check", "--profile", "smoke", "--data", str(dataset), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tracks"] == {"train": 4, "valid": 1, "test": 2}
    assert found["stems"] == ["bass", "drums", "piano", "vocals"]


# --- a little pipeline of made-up notebooks: one per way to fail -------------------------------------------------------


@pytest.fixture
def little(tmp_path, monkeypatch):
    return little_run(tmp_path, monkeypatch), pipeline.NOTEBOOKS


def test_stages_run_once_and_again_when_their_inputs_change(little, capsys):
    run, notebooks = little
    for _ in range(2):
        pipeline.run_pipeline(run)
    assert (run.folder / "one.txt").read_text() == "ran "
    write_notebook(notebooks / "two.ipynb", "2 + 2")
    pipeline.run_pipeline(run)
    assert (run.folder / "one.txt").read_text() == "ran ", "one does not read two"
    key = stage_key(run, "two")
    write_notebook(notebooks / "one.ipynb", "3 + 3")
    assert stage_key(run, "two") != key, "two reads one"
    assert not is_finished(run, "one", stage_key(run, "one"))


def test_a_lost_product_is_made_again(little, capsys):
    run, _ = little
    pipeline.run_pipeline(run)
    (run.folder / "one.txt").unlink()
    capsys.readouterr()
    pipeline.run_pipeline(run)
    assert (run.folder / "one.txt").read_text() == "ran "
    assert "two                unchanged, skipped" in capsys.readouterr().out


def test_a_failed_notebook_stops_the_run_in_three_lines(little):
    run, notebooks = little
    write_notebook(notebooks / "two.ipynb", "raise KeyError('the snare')")
    with pytest.raises(StageError) as error:
        pipeline.run_pipeline(run)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    # papermill adds a cell with the parameters it was given after the declared ones
    assert (
        "Notebook two failed in cell 3" in lines[0]
        and "KeyError: 'the snare'" in lines[1]
        and "two.ipynb" in lines[2]
    )
    assert (run.folder / "notebooks" / "two.ipynb").exists()
    assert not is_finished(run, "two", stage_key(run, "two"))
    write_notebook(notebooks / "two.ipynb", "1 + 1")
    pipeline.run_pipeline(run)
    assert (run.folder / "one.txt").read_text() == "ran ", "the finished stage is not repeated"


def test_an_interrupted_notebook_stays_for_reading_and_runs_again(little, monkeypatch):
    run, notebooks = little

    def interrupted(name, part, _values):
        shutil.copy(notebooks / f"{name}.ipynb", part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_failure_of", interrupted)
        pipeline.run_pipeline(run)
    assert (run.folder / "notebooks" / "one.ipynb").exists() and not is_finished(
        run, "one", stage_key(run, "one")
    )
    pipeline.run_pipeline(run)
    assert (run.folder / "one.txt").read_text() == "ran "


def test_a_parameter_that_a_notebook_does_not_declare_is_an_error(little):
    run, notebooks = little
    write_notebook(notebooks / "one.ipynb", "1", parameters='profile: str = "demo"')
    with pytest.raises(ValueError, match="one has no parameter 'run'.*profile"):
        pipeline.run_pipeline(run)


def test_the_report_says_what_a_run_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("MSS_RESULTS", str(tmp_path))
    run = create_or_load_run("smoke", "begun")
    run.write_settings()
    with pytest.raises(FileNotFoundError, match="environment.json.*finish the run"):
        pipeline.build_report(run)


@pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git checkout"
)
def test_the_environment_names_the_commit(smoke_run):
    _, folder = smoke_run
    found = json.loads((folder / "environment.json").read_text())
    assert len(found["git_commit"]) == 40 and found["dataset"]["tracks"] == {
        "train": 3,
        "valid": 1,
        "test": 3,
    }
    assert found["cores"] == os.cpu_count()
