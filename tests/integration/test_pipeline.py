"""The smoke profile through all stages: results, skipping, resuming, failing."""

import json
import shutil

import pytest
from conftest import command, little_run, write_notebook

from mss_utils import pipeline
from mss_utils.__main__ import main
from mss_utils.config import MODELS, ROOT
from mss_utils.pipeline import STAGES, TABLES, is_finished, stage_key

MODEL_FILES = ("model.safetensors", "model.json", "history.csv", "last.ckpt")
RESULTS = [
    "settings.json",
    "environment.json",
    "facts.json",
    "report.pdf",
    "listening.html",
    *(f"notebooks/{name}.ipynb" for name in STAGES),
    *(f"tables/{name}.csv" for name in TABLES),
    *(f"models/piano/{model}/seed0/{file}" for model in MODELS for file in MODEL_FILES),
    "ablations/random_mix/models/piano/unet/seed0/model.json",
]


def test_run_leaves_the_files_of_the_contract(smoke_run):
    _, folder = smoke_run
    assert not [path for path in RESULTS if not (folder / path).is_file()]
    assert list(folder.glob("audio/*/piano/unet.mp3"))
    assert list(folder.glob("estimates/unet-seed0/test/*/piano.wav"))
    svgs = {path.stem for path in folder.glob("figures/*.svg")}
    assert svgs == {path.stem for path in folder.glob("figures/*.png")} and len(svgs) > 10
    assert not list(folder.rglob(".part-*"))
    for path in [*folder.glob("*.json"), *folder.glob("tables/*.csv")]:
        assert str(ROOT) not in path.read_text(), path  # no folder of this machine
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["dataset"]["tracks"] == {"train": 3, "valid": 1, "test": 3}
    if shutil.which("git") and (ROOT / ".git").exists():
        assert len(environment["git_commit"]) == 40


def test_finished_stages_are_skipped(smoke_run):
    _, folder = smoke_run
    before = {path: path.stat().st_mtime_ns for path in folder.glob("notebooks/*.ipynb")}
    again = command("run", "--profile", "smoke")
    assert again.returncode == 0, again.stderr[-3000:]
    assert all(f"{name:<18} unchanged" in again.stdout for name in STAGES)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("notebooks/*.ipynb")} == before


def test_trained_model_separates_a_song(smoke_run, tmp_path, own_folders):
    song = next((own_folders / "cache").glob("songs-*/test/*/mixture.flac"))
    model = smoke_run[1] / "models/piano/unet/seed0"
    out = ["--out", str(tmp_path), "--flac"]
    assert main(["separate", str(song), "--model", str(model), *out]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mixture.piano.flac", "mixture.piano.residual.flac"}


def test_report_command_writes_the_report_again(smoke_run):
    report = smoke_run[1] / "report.pdf"
    report.unlink()
    assert main(["report", "--run", "smoke"]) == 0 and report.exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    return little_run(tmp_path, monkeypatch)


def ran_once(run):
    return (run.folder / "one.txt").read_text() == "ran "


def test_stage_runs_again_if_its_inputs_change(run):
    for _ in range(2):
        pipeline.run_pipeline(run)
    assert ran_once(run)
    write_notebook(pipeline.NOTEBOOKS / "two.ipynb", "2 + 2")
    pipeline.run_pipeline(run)
    assert ran_once(run)
    write_notebook(pipeline.NOTEBOOKS / "one.ipynb", "3 + 3")
    assert not is_finished(run, "one") and not is_finished(run, "two")
    pipeline.run_pipeline(run)
    (run.folder / "notebooks" / "two.ipynb").write_text("")  # damaged
    assert is_finished(run, "one") and not is_finished(run, "two")


@pytest.mark.parametrize("name", ["room.py", "web/page.html"])
def test_every_kind_of_package_file_counts(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    before = stage_key(run, "one")
    (tmp_path / "mss_utils" / name).parent.mkdir(parents=True)
    (tmp_path / "mss_utils" / name).write_text("changed")
    assert stage_key(run, "one") != before


def test_missing_result_is_made_again(run):
    pipeline.run_pipeline(run)
    (run.folder / "one.txt").unlink()
    pipeline.run_pipeline(run)
    assert ran_once(run)


def test_failed_notebook_is_named_and_resumed(run):
    write_notebook(pipeline.NOTEBOOKS / "two.ipynb", "raise KeyError('the snare')")
    with pytest.raises(ChildProcessError) as error:
        pipeline.run_pipeline(run)
    lines = str(error.value).splitlines()
    assert "two failed in cell 3" in lines[0] and "KeyError: 'the snare'" in lines[1]
    assert (run.folder / "notebooks" / "two.ipynb").exists() and "two.ipynb" in lines[2]
    write_notebook(pipeline.NOTEBOOKS / "two.ipynb", "1 + 1")
    pipeline.run_pipeline(run)
    assert ran_once(run)


def test_interrupted_notebook_is_kept_and_runs_again(run, monkeypatch):
    def interrupt(name, executed, _parameters):
        shutil.copy(pipeline.NOTEBOOKS / f"{name}.ipynb", executed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "_run_notebook", interrupt)
        pipeline.run_pipeline(run)
    assert (run.folder / "notebooks" / "one.ipynb").exists()
    pipeline.run_pipeline(run)
    assert ran_once(run)


def test_undeclared_parameter_is_an_error(run):
    write_notebook(pipeline.NOTEBOOKS / "one.ipynb", "1", parameters='profile: str = "demo"')
    with pytest.raises(ValueError, match="one has no cell tagged parameters with 'run'"):
        pipeline.run_pipeline(run)
