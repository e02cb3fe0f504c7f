import json
import pickle
import warnings

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import mss_utils.training.loop as loop
from mss_utils.config import MODELS, Run
from mss_utils.models import build_model
from mss_utils.training import load_history, train
from mss_utils.training.checkpoints import is_trained, resume, save_checkpoint
from mss_utils.training.loop import training_identity

STATE = dict(step=1, train_s=1.0, best=0.0, best_step=0, best_weights="raw", losses=[], history=[])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", MODELS)
def test_resumed_training_equals_uninterrupted(small_run, store, tmp_path, name):
    whole = Run("whole", small_run.settings, tmp_path / "whole")
    train(whole, store, "piano", name)

    def interrupt(history):
        raise Interrupted

    for step in (3, 6):
        with pytest.raises(Interrupted):
            train(small_run, store, "piano", name, on_validation=interrupt)
        assert load_history(small_run.model_folder("piano", name))["step"].iloc[-1] == step
    assert not (small_run.model_folder("piano", name) / "model.json").exists()
    with warnings.catch_warnings(action="error", category=UserWarning):
        train(small_run, store, "piano", name)
    a, b = (run.model_folder("piano", name) for run in (whole, small_run))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    parts = [torch.load(path / "last.ckpt", weights_only=True)["parts"] for path in (a, b)]
    states = [(part["raw"], part["ema"], part["optimizer"]["state"]) for part in parts]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    columns = ["step", "train_loss_db", "raw_sdr_db", "ema_sdr_db", "lr"]
    pd.testing.assert_frame_equal(load_history(a)[columns], load_history(b)[columns])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def training(small_settings, store):
    """Parts of a training with changed weights, and its identity."""
    network = build_model("unet", small_settings)
    parts = {"raw": network, "optimizer": torch.optim.AdamW(network.parameters())}
    network.head.bias.data += 1
    return parts, training_identity(small_settings, store, "piano", "unet", 0)


def assert_restarts(folder, parts, identity, reason):
    parts["raw"].head.bias.data.zero_()
    before = {key: tensor.clone() for key, tensor in parts["raw"].state_dict().items()}
    message = f"Cannot resume from .*last.ckpt: .*{reason}.* Training restarts from step 0."
    with pytest.warns(UserWarning, match=message) as caught:
        assert resume(folder, parts, identity)["step"] == 0
    assert len(caught) == 1
    torch.testing.assert_close(parts["raw"].state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("pickled", [pickle.dump, torch.save])
def test_malicious_pickle_is_not_executed(training, tmp_path, pickled):
    with (tmp_path / "last.ckpt").open("wb") as file:
        pickled({"identity": Malicious(tmp_path / "executed")}, file)
    assert_restarts(tmp_path, *training, "not a checkpoint")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoint_restarts_with_a_warning(training, tmp_path, damage):
    save_checkpoint(tmp_path, training[0], STATE, training[1])
    data = bytearray((tmp_path / "last.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage]
    (tmp_path / "last.ckpt").write_bytes(damaged)
    assert_restarts(tmp_path, *training, "damaged")


def test_other_checkpoint_restarts_with_a_warning(training, tmp_path, small_settings):
    parts, identity = training
    (tmp_path / "model.json").touch()
    save_checkpoint(tmp_path, parts, STATE, identity | dict(data="other"))
    assert_restarts(tmp_path, parts, identity, "other settings or data")
    assert not (tmp_path / "model.json").exists()  # it would describe other weights
    smaller = build_model("unet", small_settings.model_copy(update=dict(unet_channels=8)))
    save_checkpoint(tmp_path, parts | {"raw": smaller}, STATE, identity)
    assert_restarts(tmp_path, parts, identity, "do not fit")


def test_better_of_raw_and_averaged_weights_is_kept(small_run, store, monkeypatch):
    scores = iter([1.0, 2.0, 3.0, 0.0])  # raw and averaged at step 3, then at step 6
    monkeypatch.setattr(loop, "validate", lambda *_: next(scores))
    train(small_run, store, "piano", "demucs_lstm")
    folder = small_run.model_folder("piano", "demucs_lstm")
    description = json.loads((folder / "model.json").read_text())
    assert description["best_weights"] == "raw" and description["best_step"] == 6
    parts = torch.load(folder / "last.ckpt", weights_only=True)["parts"]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, parts["raw"][key]) for key, tensor in weights.items())
    assert not all(torch.equal(tensor, parts["ema"][key]) for key, tensor in weights.items())


def test_new_setting_had_its_default_in_an_old_training(store, small_settings, tmp_path):
    identity = training_identity(small_settings, store, "piano", "unet", 0)
    settings = identity["settings"]
    older = {key: value for key, value in settings.items() if key != "train_share"}
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(identity | dict(settings=older)))
    assert is_trained(tmp_path, identity)
    assert not is_trained(tmp_path, identity | dict(settings=settings | dict(train_share=0.5)))
    assert not is_trained(tmp_path, identity | dict(data="other"))
