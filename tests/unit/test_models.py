import json

import pytest
import torch
from safetensors.torch import load_file

from mss_utils.config import MODELS, PROFILES, ROOT, WAVEFORM_MODELS, resolve_settings
from mss_utils.models import (
    build_model,
    count_parameters,
    load_model,
    receptive_field_s,
    upgrade_weights,
)
from mss_utils.models.unet import STFT
from mss_utils.training.checkpoints import write_tensors
from mss_utils.training.loop import snr_loss


def error_db(estimate, reference):
    error = (estimate - reference).square().sum() / reference.square().sum()
    return 10 * torch.log10(error).item()


@pytest.mark.parametrize("n_fft, hop", [(1024, 256), (2048, 512)])
@pytest.mark.parametrize("samples", [1, 255, 16000, 48001])
def test_inverse_stft_returns_the_signal(n_fft, hop, samples):
    audio, stft = torch.randn(2, 2, samples), STFT(n_fft, hop)
    assert error_db(stft.inverse(stft(audio), samples), audio) < -90


def test_mask_of_ones_returns_the_mixture(small_settings, monkeypatch):
    model, audio = build_model("unet", small_settings), torch.randn(1, 1, 12345)
    monkeypatch.setattr(model, "mask", torch.ones_like)
    assert error_db(model(audio), audio) < -90


def test_mask_is_soft_and_covers_every_bin(small_settings):
    model = build_model("unet", small_settings).eval()
    magnitude = torch.rand(2, 1, small_settings.n_fft // 2 + 1, 37)
    mask = model.mask(magnitude)
    assert mask.shape == magnitude.shape
    assert mask.min() >= 0 and mask.max() <= 1


def test_baseline_has_2d_convolutions_only():
    layers = {type(layer) for layer in build_model("unet", resolve_settings("demo")).modules()}
    names = {layer.__name__ for layer in layers if layer.__module__.startswith("torch.")}
    others = {"ModuleList", "Sequential", "BatchNorm2d", "LeakyReLU", "ReLU", "GELU"}
    assert names == others | {"Conv2d", "ConvTranspose2d"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [1, 777, 16000])
@pytest.mark.parametrize("channels", [1, 2])
def test_output_length_is_input_length(small_settings, name, samples, channels):
    model = build_model(name, small_settings.model_copy(update=dict(channels=channels))).eval()
    for audio in (torch.randn(2, channels, samples), torch.zeros(2, channels, samples)):
        estimate = model(audio)
        assert estimate.shape == audio.shape
        assert estimate.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_model_overfits_one_batch(small_settings, name):
    t = torch.arange(8000) / 16000
    target = torch.sin(2 * torch.pi * 440 * t)[None, None]
    mixture = target + torch.sin(2 * torch.pi * 2000 * t)[None, None]
    model = build_model(name, small_settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = snr_loss(model(mixture), target, mixture)
        loss.backward()
        optimizer.step()
    assert loss.item() < -8


@pytest.mark.parametrize("profile", PROFILES)
def test_bottlenecks_have_the_same_size(profile):
    settings = resolve_settings(profile)
    b1, b2 = (count_parameters(build_model(name, settings).bottleneck) for name in WAVEFORM_MODELS)
    assert abs(b1 - b2) < 0.02 * b1


def test_b1_and_b2_start_with_the_same_weights(small_settings):
    b1, b2 = (build_model(name, small_settings, seed=5).state_dict() for name in WAVEFORM_MODELS)
    shared = [key for key in b1 if not key.startswith("bottleneck")]
    assert shared == [key for key in b2 if not key.startswith("bottleneck")]
    assert all(torch.equal(b1[key], b2[key]) for key in shared)
    other = build_model("demucs_lstm", small_settings, seed=6).state_dict()
    assert not torch.equal(b1["encoder.0.0.weight"], other["encoder.0.0.weight"])


def test_attention_spans_the_segment_and_convolutions_do_not(small_settings):
    model = build_model("demucs_attention", small_settings).eval()
    frames = torch.randn(1, 16, model.bottleneck_width, requires_grad=True)
    model.bottleneck(frames)[0, 0, 0].backward()
    assert frames.grad[0, -1].abs().max() > 0
    assert receptive_field_s(model, 16000) * 16000 < 16 * model.total_stride


def depends_on(network, x, distance):
    """Return whether the middle output depends on inputs more than `distance` away."""
    middle, changed = x.shape[-1] // 2, x.clone()
    changed[..., : middle - distance] *= -1
    changed[..., middle + distance + 1 :] *= -1
    with torch.no_grad():
        return (network(x)[..., middle] - network(changed)[..., middle]).abs().max() > 1e-15


def test_receptive_field_of_the_unet(small_settings):
    model = build_model("unet", small_settings).eval().double()
    samples = receptive_field_s(model, 16000) * 16000 - 2 * small_settings.n_fft
    frames = round(samples / small_settings.hop) + 1
    x = torch.randn(1, 1, small_settings.n_fft // 2, 2**model.depth * 32, dtype=torch.float64)
    assert not depends_on(model.logits, x, frames)
    assert depends_on(model.logits, x, frames // 8)


def test_unknown_model_lists_the_models(small_settings):
    with pytest.raises(ValueError, match="unet, demucs_lstm, demucs_attention"):
        build_model("open_unmix", small_settings)


def write_model(folder, settings, weights):
    description = dict(model="unet", target="piano", settings=settings.model_dump(mode="json"))
    (folder / "model.json").write_text(json.dumps(description))
    write_tensors(folder / "model.safetensors", weights)


def test_old_weights_load_under_new_names(tmp_path, small_settings):
    weights = build_model("unet", small_settings, seed=3).state_dict()
    old = {key.replace("full_band.", "tall."): tensor for key, tensor in weights.items()}
    assert old.keys() != weights.keys()
    write_model(tmp_path, small_settings, old)
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_committed_weights_load():
    folders = [path.parent for path in (ROOT / "results").rglob("model.safetensors")]
    assert len(folders) >= len(MODELS)
    for folder in folders:
        model = load_model(folder)
        loaded, stored = model.state_dict(), load_file(folder / "model.safetensors")
        assert loaded.keys() == upgrade_weights(stored).keys()
        assert model.sample_rate > 0 and not model.training


def test_missing_model_folder_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json.*results/<run>/models"):
        load_model(tmp_path)


def test_unusable_weights_are_one_sentence(tmp_path, small_settings):
    other = build_model("demucs_lstm", small_settings).state_dict()
    write_model(tmp_path, small_settings, other)
    for _ in range(2):  # of another model, then pickled
        with pytest.raises(ValueError, match="is damaged or does not fit model.json") as error:
            load_model(tmp_path)
        assert "\n" not in str(error.value)
        torch.save(other, tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["", "no json", '{"a": 1}', "[]", "[" * 100_000])
def test_damaged_description_is_one_sentence(text, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json does not describe a model") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
