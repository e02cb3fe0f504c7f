import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import mss_utils.training as training
from mss_utils.data import Store
from mss_utils.mixing import Mixer
from mss_utils.settings import MODELS, Run
from mss_utils.training import is_trained, learning_rate, reconstruction_check, train


def test_the_learning_rate_rises_and_falls(small_settings):
    settings = small_settings.model_copy(update=dict(warmup_steps=10, steps=110))
    rates = [learning_rate(step, settings, 1.0) for step in range(111)]
    assert rates[0] == 0.1 and max(rates) == 1.0 == rates[10]
    assert math.isclose(rates[60], 0.505) and math.isclose(rates[110], 0.01)


@pytest.mark.parametrize("name", MODELS)
def test_training_writes_what_the_contract_names(small_run, store, name):
    heard = []
    model = train(small_run, store, "piano", name, on_validation=heard.append)
    folder = small_run.model_folder("piano", name)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.json", "history.csv", "last.ckpt"}
    description = json.loads((folder / "model.json").read_text())
    assert description["steps"] == 6 and description["train_s"] > 0 and description["peak_memory_mb"] > 50
    history = pd.read_csv(folder / "history.csv")
    assert list(history["step"]) == [3, 6] and len(heard) == 2
    assert description["valid_sdr"] == pytest.approx(history["valid_sdr_db"].max())
    assert description["best_step"] == history.loc[history["valid_sdr_db"].idxmax(), "step"]
    assert not model.training and model.target == "piano"


def test_a_trained_model_is_loaded_unless_settings_or_data_changed(small_run, store, monkeypatch):
    train(small_run, store, "piano", "unet")
    monkeypatch.setattr(training, "fit", lambda *_: pytest.fail("trained again"))
    train(small_run, store, "piano", "unet")
    changed = Run(small_run.name, small_run.settings.model_copy(update=dict(unet_lr=1e-4)), small_run.folder)
    with pytest.raises(pytest.fail.Exception):
        train(changed, store, "piano", "unet")
    folder = small_run.model_folder("piano", "unet")
    identity = dict(model="unet", target="piano", seed=0, data="other music", settings=small_run.settings.model_dump(mode="json"))
    assert not is_trained(folder, identity)
    assert is_trained(folder, identity | dict(data=store.sha))


class Interrupted(Exception):
    pass


def test_an_interrupted_training_ends_with_the_same_weights(small_run, store, tmp_path):
    whole = Run("whole", small_run.settings, tmp_path / "whole")
    train(whole, store, "piano", "demucs_attention")

    def stop(history):
        raise Interrupted

    with pytest.raises(Interrupted):
        train(small_run, store, "piano", "demucs_attention", on_validation=stop)
    assert not (small_run.model_folder("piano", "demucs_attention") / "model.json").exists()
    train(small_run, store, "piano", "demucs_attention")
    one, other = (run.model_folder("piano", "demucs_attention") for run in (whole, small_run))
    a, b = (torch.load(folder / "last.ckpt", weights_only=True)["model"] for folder in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_b1_and_b2_see_the_same_batches(small_run, store, monkeypatch):
    seen = {}
    for name in ("demucs_lstm", "demucs_attention"):
        batches = seen[name] = []
        original = Mixer.assemble
        monkeypatch.setattr(Mixer, "assemble", lambda *given, original=original, batches=batches: batches.append(b := original(*given)) or b)
        train(small_run, store, "piano", name)
        monkeypatch.undo()
        monkeypatch.setenv("MSS_RESULTS", str(small_run.folder.parent))
    assert len(seen["demucs_lstm"]) == 6
    assert all(torch.equal(a.stems, b.stems) for a, b in zip(seen["demucs_lstm"], seen["demucs_attention"], strict=True))


def test_validation_tracks_without_the_target_are_noticed_before_the_training(small_run, store, monkeypatch):
    monkeypatch.setattr(Store, "load", lambda self, *given: (np.ones((1, 100)), np.array([[[1.0]], [[1.0]], [[0.0]], [[1.0]]])))
    with pytest.raises(ValueError, match="piano is silent in the middle 2 s of every validation track.*set valid_s higher"):
        train(small_run, store, "piano", "unet")
    assert not small_run.folder.exists()


def test_a_loss_that_is_not_finite_stops_the_training(small_run, store, monkeypatch):
    monkeypatch.setattr(training, "descend", lambda *_: math.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0: set demucs_lr lower"):
        train(small_run, store, "piano", "demucs_lstm")


@pytest.mark.parametrize("name", ["demucs_lstm", "demucs_attention"])
def test_the_waveform_models_can_reconstruct_an_unseen_song(name, songs_store):
    """Week 2 of the plan: with the mixture as target, 20 dB on an unseen song within a few hundred steps."""
    store, settings = songs_store
    table = reconstruction_check(name, store, settings, n_steps=300)
    assert table["sdr_db"].max() >= 20
