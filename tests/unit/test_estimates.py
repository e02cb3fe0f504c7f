import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from safetensors.torch import load_file, save_file

from mss_utils.config import MODELS, Run, resolve_settings
from mss_utils.data import open_store
from mss_utils.evaluation.scores import score
from mss_utils.separation import (
    read_all_estimates,
    read_estimate,
    read_estimates,
    separate,
    trained_model,
    write_estimates,
)
from mss_utils.separation.estimates import ROWS, estimate_paths


def change_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight * 1.01 for name, weight in weights.items()}, folder / "model.safetensors"
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
    for model, seed in [("unet", 0), ("unet", 1), ("demucs_lstm", 0)]:
        expected = separate(trained_model(run, "piano", model, seed), mixture, 16000)
        np.testing.assert_array_equal(estimates[model, seed], expected[None])
        path, residual = estimate_paths(run, track, "piano", model, seed)
        folder = run.folder / "estimates" / f"{model}-seed{seed}" / "test" / track.name
        assert path == folder / "piano.wav" and residual == folder / "no_piano.wav"
        rest = soundfile.read(residual, dtype="float32")[0]
        np.testing.assert_array_equal(rest, (mixture - expected)[0])
    np.testing.assert_array_equal(read_estimate(run, store, track, "piano", "mixture"), mixture)
    seed_1 = read_estimates(run, store, track, "piano", ("irm", "unet"), seed=1)
    np.testing.assert_array_equal(seed_1["irm"], estimates["irm", 0][0])
    np.testing.assert_array_equal(seed_1["unet"], estimates["unet", 1][0])


def test_only_estimates_of_changed_weights_are_written_again(run, store):
    write_estimates(run, store)
    before = written(run)
    write_estimates(run, store)
    assert written(run) == before
    change_weights(run.model_folder("piano", "unet", 1))
    write_estimates(run, store)
    changed = {name for name, time in written(run).items() if time != before[name]}
    assert changed == {name for name in before if "/unet-seed1/" in name}
    path, _ = estimate_paths(run, store.split("test")[0], "piano", "irm")
    path.unlink()
    write_estimates(run, store)
    assert path.is_file()


def test_interrupted_stage_leaves_no_stale_manifest(run, store, monkeypatch):
    write_estimates(run, store, ["unet"])
    change_weights(run.model_folder("piano", "unet"))
    monkeypatch.setattr("mss_utils.separation.estimates.separate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_estimates(run, store, ["unet"])
    assert not (run.folder / "estimates" / "unet-seed0" / "piano.json").exists()


def test_two_runs_never_mix_up(two_seed_run, run, store, tmp_path):
    change_weights(run.model_folder("piano", "unet"))
    copy, track = replace(run, folder=tmp_path / "copy"), store.split("test")[0]
    for source in (two_seed_run, run):
        write_estimates(copy, store, ["unet"], trained=source)
        expected = separate(trained_model(source, "piano", "unet"), store.load(track)[0], 16000)
        estimate = read_estimate(copy, store, track, "piano", "unet")
        np.testing.assert_array_equal(estimate, expected)


def test_missing_model_and_estimate_are_errors(small_settings, store, tmp_path):
    run = Run("run", small_settings, tmp_path)
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        write_estimates(run, store, ["unet"])
    with pytest.raises(FileNotFoundError, match="piano.wav: call write_estimates"):
        read_estimate(run, store, store.split("test")[0], "piano", "unet")


def test_hostile_track_names_stay_in_the_folder(run, store):
    track = store.split("test")[0]
    for name in ("..", "../../x", "/etc/x", "a\0b", "x" * 300):
        folder = estimate_paths(run, replace(track, name=name), "piano", "irm")[0].parent
        assert folder.parent == run.folder / "estimates" / "irm-seed0" / "test"
        assert folder.name not in ("", ".", "..") and "\0" not in folder.name


@pytest.fixture(scope="module")
def musdb_folder(tmp_path_factory):
    """A MUSDB18 in WAV with two short training tracks and one test track."""
    root, rng = tmp_path_factory.mktemp("musdb"), np.random.default_rng(0)
    for subset, n_tracks in (("train", 2), ("test", 1)):
        for i in range(n_tracks):
            folder = root / subset / f"Artist {i} - We'll see"
            folder.mkdir(parents=True)
            stems = {
                name: np.round(1000 * rng.standard_normal((33000, 1))) / 2**15
                for name in ("vocals", "drums", "bass", "other")
            }
            for name, audio in (stems | dict(mixture=sum(stems.values()))).items():
                soundfile.write(folder / f"{name}.wav", audio, 16000, subtype="PCM_16")
    (root / "mus.yaml").write_text('validation_tracks: ["Artist 0 - We\'ll see"]\n')
    return root


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_museval_evaluates_the_folder(musdb_folder, museval, tmp_path, monkeypatch):
    import musdb

    monkeypatch.setattr("mss_utils.evaluation.scores.MAX_SCORERS", 1)
    references = musdb.DB(root=str(musdb_folder), is_wav=True, subsets="test")
    for target in ("vocals", "drums"):
        settings = resolve_settings("smoke", str(musdb_folder), target)
        run, store = Run("run", settings, tmp_path / target), open_store(settings)
        write_estimates(run, store, ["irm"])
        museval.eval_mus_dir(references, str(run.folder / "estimates" / "irm-seed0"), str(tmp_path))

        def estimates_of(track, run=run, store=store, target=target):
            return {("irm", 0): read_estimate(run, store, track, target, "irm")[None]}

        frames = score(settings, store, estimates_of)["frames"]
        for track in store.split("test"):
            text = (tmp_path / "test" / f"{track.name}.json").read_text()
            scores = {entry["name"]: entry["frames"] for entry in json.loads(text)["targets"]}
            if target == "drums":
                assert not scores, "museval has no target no_drums and scores no target alone"
                continue
            ours = frames[frames["track"] == track.name]
            assert len(ours) == len(scores["vocals"]) == 2
            for metric in ("SDR", "ISR", "SIR", "SAR"):
                theirs = [frame["metrics"][metric] for frame in scores["vocals"]]
                np.testing.assert_allclose(ours[metric], theirs, atol=1e-3)
