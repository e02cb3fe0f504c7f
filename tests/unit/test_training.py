import json
import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mss_utils.training.loop as loop
import mss_utils.training.monitor as monitor
from mss_utils.config import MODELS, WAVEFORM_MODELS, Run
from mss_utils.data import Store
from mss_utils.mixing import Mixer
from mss_utils.training import load_history, train
from mss_utils.training.loop import learning_rate, snr_loss, update_ema
from mss_utils.training.monitor import collapsed_output


def changed(run, **changes):
    return Run(run.name, run.settings.model_copy(update=changes), run.folder)


def weights_of(run, name):
    return load_file(run.model_folder("piano", name) / "model.safetensors")


def test_loss_is_the_negative_snr():
    generator = torch.manual_seed(0)
    target, residual = torch.randn(2, 3, 1, 1000, generator=generator)
    mixture, silence = target + residual, torch.zeros_like(target)
    assert abs(snr_loss(silence, target, mixture).item()) < 1e-4
    assert snr_loss(target, target, mixture) < -26
    assert abs(snr_loss(1.1 * target, target, mixture, floor_db=-200).item() + 20) < 0.1
    assert snr_loss(silence, silence, mixture) == 0
    assert snr_loss(mixture, silence, mixture) > 25
    levels = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    loud = snr_loss(levels * mixture, levels * target, levels * mixture)
    torch.testing.assert_close(loud, snr_loss(mixture, target, mixture), rtol=1e-2, atol=1e-2)


def test_learning_rate_rises_and_falls(small_settings):
    settings = small_settings.model_copy(update=dict(warmup_steps=10, steps=110))
    rates = [learning_rate(step, settings, 1.0) for step in range(111)]
    assert rates[0] == 0.1 and max(rates) == 1.0 == rates[10]
    assert math.isclose(rates[60], 0.505) and math.isclose(rates[110], 0.01)


def test_ema_moves_towards_the_weights():
    average, network = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    network.weight.data.fill_(3.0)
    network.running_mean.fill_(1.0)
    update_ema(average, network, 0.9)
    torch.testing.assert_close(average.weight.data, torch.full((2,), 1.2))
    torch.testing.assert_close(average.running_mean, torch.full((2,), 0.1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_training_records_its_course(small_run, store, name, precision):
    histories, run = [], changed(small_run, precision=precision)
    model = train(run, store, "piano", name, on_validation=histories.append)
    folder = run.model_folder("piano", name)
    description = json.loads((folder / "model.json").read_text())
    assert description["steps"] == 6 and description["train_s"] > 0
    assert description["peak_memory_mb"] > 50 and description["processes"] == 1
    history = load_history(folder)
    assert list(history["step"]) == [3, 6] and len(histories) == 2
    assert description["valid_sdr"] == pytest.approx(history["valid_sdr_db"].max())
    assert description["best_step"] == history.loc[history["valid_sdr_db"].idxmax(), "step"]
    assert np.isfinite(history["valid_sdr_db"]).all()
    assert not model.training and model.target == "piano"
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights_of(run, name).values())


def test_trained_model_is_loaded_unless_settings_changed(small_run, store, monkeypatch):
    train(small_run, store, "piano", "unet")
    monkeypatch.setattr(loop, "fit", lambda *_: pytest.fail("trained again"))
    train(small_run, store, "piano", "unet")
    train(changed(small_run, excerpt_s=2.0), store, "piano", "unet")
    with pytest.raises(pytest.fail.Exception):
        train(changed(small_run, unet_lr=1e-4), store, "piano", "unet")


def test_waveform_models_get_the_same_batches(small_run, store, monkeypatch):
    batches, assemble = [], Mixer.assemble
    monkeypatch.setattr(Mixer, "assemble", lambda *a: batches.append(assemble(*a)) or batches[-1])
    for name in WAVEFORM_MODELS:
        train(small_run, store, "piano", name)
    assert len(batches) == 18
    for same in zip(batches[:6], batches[6:12], batches[12:], strict=True):
        assert torch.equal(same[0].stems, same[1].stems)
        assert torch.equal(same[0].stems, same[2].stems)


def test_batch_that_cannot_be_shared_is_refused(small_run, store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size=2 is no multiple of the 3 processes"):
        train(small_run, store, "piano", "unet")


def test_silent_validation_is_refused_before_training(small_run, store, monkeypatch):
    stems = np.array([[[1.0]], [[1.0]], [[0.0]], [[1.0]]])  # the piano is silent
    monkeypatch.setattr(Store, "load", lambda *_: (np.ones((1, 100)), stems))
    with pytest.raises(ValueError, match="piano is silent in the middle 2 s.*raise valid_s"):
        train(small_run, store, "piano", "unet")
    assert not small_run.folder.exists()


def test_nan_loss_stops_the_training(small_run, store, monkeypatch):
    losses = torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(loop, "train_step", Mock(side_effect=losses))
    with pytest.raises(FloatingPointError, match="demucs_lstm is nan at step 1: lower its"):
        train(small_run, store, "piano", "demucs_lstm")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("not enough memory: 1")])
def test_out_of_memory_names_the_settings(small_run, store, monkeypatch, error):
    monkeypatch.setattr(loop, "train_step", Mock(side_effect=error))
    with pytest.raises(MemoryError, match="lower batch_size=2 or segment_s=0.5"):
        train(small_run, store, "piano", "demucs_lstm")


@pytest.mark.parametrize("output, gain", [("the mixture", 1.0), ("silence", 0.0)])
def test_collapse_is_detected(small_settings, store, output, gain):
    batch = Mixer(store, small_settings, "piano").batch(0)
    network = torch.nn.Conv1d(1, 1, 1, bias=False)
    torch.nn.init.constant_(network.weight, gain + 0.01)
    assert collapsed_output(network, batch) == output
    correct = replace(batch, target=gain * batch.mixture)
    torch.nn.init.constant_(network.weight, gain)
    assert collapsed_output(network, correct) is None
    torch.nn.init.constant_(network.weight, 0.5)
    assert collapsed_output(network, batch) is None


def test_collapse_causes_a_warning(small_run, store, monkeypatch):
    monkeypatch.setattr(monitor, "collapsed_output", lambda *_: "the mixture")
    with pytest.warns(UserWarning, match="unet returns the mixture for every example"):
        train(small_run, store, "piano", "unet")


def test_training_starts_from_another_run(small_run, store):
    train(small_run, store, "piano", "unet")
    settings = small_run.settings.model_copy(update=dict(start_from="small"))
    run = Run("started", settings, small_run.folder.parent / "started")
    train(changed(run, unet_lr=1e-12, warmup_steps=0), store, "piano", "unet")
    before, after = weights_of(small_run, "unet"), weights_of(run, "unet")
    learned = [key for key in before if "running" not in key and "tracked" not in key]
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in learned)
    with pytest.raises(ValueError, match="Cannot start from .*small.*size mismatch"):
        train(changed(run, unet_channels=8), store, "piano", "unet")
    other = settings.model_copy(update=dict(sample_rate=22050))
    with pytest.raises(ValueError, match="Cannot start from .*small.*sample_rate is 16000"):
        loop.load_pretrained_weights(torch.nn.Identity(), other, "piano", "unet", 0)
