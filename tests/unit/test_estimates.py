import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from mss_utils.config import MODELS, Run, resolve_settings
from mss_utils.data import open_store
from mss_utils.evaluation.scores import score
from mss_utils.models import load_model
from mss_utils.separation import (
    ROWS,
    estimate_paths,
    read_all_estimates,
    read_estimate,
    separate,
    write_estimates,
)


def written(run):
    """Every file of the estimates with the time at which it was written."""
    files = (run.folder / "estimates").rglob("*.*")
    return {str(path.relative_to(run.folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture
def run(two_seed_run, tmp_path):
    shutil.copytree(two_seed_run.folder, tmp_path / "run")
    return replace(two_seed_run, folder=tmp_path / "run")


def test_estimates_are_those_of_the_models(run, store):
    write_estimates(run, store)
    track = store.split("test")[1]
    mixture, _ = store.load(track)
    estimates = read_all_estimates(run, store, track)
    assert list(estimates) == [(row, 0) for row in ROWS] + [(model, 1) for model in MODELS]
    np.testing.assert_array_equal(estimates["mixture", 0], mixture[None])
    for model, seed in [("unet", 0), ("unet", 1), ("demucs_lstm", 0)]:
        expected = separate(load_model(run.model_folder("piano", model, seed)), mixture, 16000)
        np.testing.assert_array_equal(estimates[model, seed], expected[None])
        path, residual = estimate_paths(run, track, "piano", model, seed)
        folder = run.folder / "estimates" / f"{model}-seed{seed}" / "test" / track.name
        assert path == folder / "piano.wav" and residual == folder / "no_piano.wav"
        rest = soundfile.read(residual, dtype="float32")[0]
        np.testing.assert_array_equal(rest, (mixture - expected)[0])


def test_only_estimates_of_changed_weights_are_written_again(two_seed_run, run, store, monkeypatch):
    write_estimates(run, store)
    before = written(run)
    write_estimates(run, store)
    assert written(run) == before
    weights = [run.model_folder("piano", "unet", s) / "model.safetensors" for s in range(2)]
    shutil.copy(*weights)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("mss_utils.separation.separate", lambda *_: 1 / 0)
        write_estimates(run, store)
    write_estimates(run, store, trained=two_seed_run)  # an interrupted stage is never up to date
    changed = {name for name, time in written(run).items() if time != before[name]}
    assert changed == {name for name in before if "/unet-seed1/" in name}
    path, _ = estimate_paths(run, store.split("test")[0], "piano", "irm")
    path.unlink()
    write_estimates(run, store, ["irm"])
    assert path.is_file()


def test_missing_model_and_estimate_are_errors(small_settings, store, tmp_path):
    run = Run("run", small_settings, tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        write_estimates(run, store, ["unet"])
    with pytest.raises(FileNotFoundError, match="piano.wav: call write_estimates"):
        read_estimate(run, store, store.split("test")[0], "piano", "unet")


@pytest.mark.parametrize("name", ["..", "../../x", "/etc/x", "a\0b", "x" * 300])
def test_hostile_track_names_stay_in_the_folder(name, run, store):
    track = replace(store.split("test")[0], name=name)
    folder = estimate_paths(run, track, "piano", "irm")[0].parent
    assert folder.parent == run.folder / "estimates" / "irm-seed0" / "test"
    assert folder.name not in ("", ".", "..") and "\0" not in folder.name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_museval_evaluates_the_folder(museval, tmp_path, monkeypatch):
    import musdb

    rng, root = np.random.default_rng(0), tmp_path / "musdb"
    for name in ("train/a", "valid/b", "test/We'll see"):
        (root / name).mkdir(parents=True)
        stems = {
            stem: np.round(1000 * rng.standard_normal((33000, 1))) / 2**15
            for stem in ("vocals", "drums", "bass", "other")
        }
        for stem, audio in (stems | dict(mixture=sum(stems.values()))).items():
            soundfile.write(root / name / f"{stem}.wav", audio, 16000, subtype="PCM_16")
    settings = resolve_settings("smoke", str(root), "vocals")
    run, store = Run("run", settings, tmp_path / "run"), open_store(settings)
    write_estimates(run, store, ["irm"])
    references = musdb.DB(root=str(root), is_wav=True, subsets="test")
    museval.eval_mus_dir(references, str(run.folder / "estimates" / "irm-seed0"), str(tmp_path))
    [target, _] = json.loads((tmp_path / "test" / "We'll see.json").read_text())["targets"]
    assert target["name"] == "vocals" and len(target["frames"]) == 2

    def estimates_of(track):
        return {("irm", 0): read_estimate(run, store, track, "vocals", "irm")[None]}

    monkeypatch.setattr("mss_utils.evaluation.scores.MAX_SCORERS", 1)
    frames = score(settings, store, estimates_of)["frames"]
    for metric in ("SDR", "ISR", "SIR", "SAR"):
        theirs = [frame["metrics"][metric] for frame in target["frames"]]
        np.testing.assert_allclose(frames[metric], theirs, atol=1e-3)
