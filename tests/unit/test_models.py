import json

import pytest
import torch
from safetensors.torch import load_file

from mss_utils.config import MODELS, PROFILES, ROOT, WAVEFORM_MODELS, resolve_settings
from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.models import (
    build_model,
    count_parameters,
    load_model,
    receptive_field_s,
    upgrade_weights,
)
from mss_utils.models.demucs import Filters, Synthesis
from mss_utils.models.oracles import ORACLES, oracle, wiener
from mss_utils.training.checkpoints import write_tensors
from mss_utils.training.loop import snr_loss


@pytest.mark.parametrize("samples", [1, 12345])
def test_mask_is_soft_and_of_ones_returns_the_mixture(small_settings, monkeypatch, samples):
    model, audio = build_model("unet", small_settings).eval(), torch.randn(2, 1, samples)
    magnitude = torch.rand(2, 1, small_settings.n_fft // 2 + 1, 37)
    mask = model.mask(magnitude)
    assert mask.shape == magnitude.shape and mask.min() >= 0 and mask.max() <= 1
    monkeypatch.setattr(model, "mask", torch.ones_like)
    error = (model(audio) - audio).square().sum() / audio.square().sum()
    assert 10 * torch.log10(error) < -90


def test_baseline_has_2d_convolutions_only():
    layers = {type(layer) for layer in build_model("unet", resolve_settings("demo")).modules()}
    names = {layer.__name__ for layer in layers if layer.__module__.startswith("torch.")}
    others = {"ModuleList", "Sequential", "BatchNorm2d", "LeakyReLU", "ReLU", "GELU"}
    assert names == others | {"Conv2d", "ConvTranspose2d"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [1, 16000])
@pytest.mark.parametrize("channels", [1, 2])
def test_output_length_is_input_length(small_settings, name, samples, channels):
    model = build_model(name, small_settings.model_copy(update=dict(channels=channels))).eval()
    for audio in (torch.randn(2, channels, samples), torch.zeros(2, channels, samples)):
        estimate = model(audio)
        assert estimate.shape == audio.shape and estimate.isfinite().all()


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
def test_waveform_models_differ_in_bottlenecks_of_one_size(profile):
    settings = resolve_settings(profile)
    models = [build_model(name, settings, seed=5) for name in WAVEFORM_MODELS]
    sizes = [count_parameters(model.bottleneck) for model in models]
    assert max(sizes) < 1.02 * min(sizes)
    first, *others = (model.state_dict() for model in models)
    shared = [key for key in first if not key.startswith("bottleneck.core")]
    for other in others:
        assert shared == [key for key in other if not key.startswith("bottleneck.core")]
        assert all(torch.equal(first[key], other[key]) for key in shared)
    other = build_model("demucs_lstm", settings, seed=6).state_dict()
    assert not torch.equal(first["encoder.0.0.weight"], other["encoder.0.0.weight"])


@pytest.mark.parametrize("name", WAVEFORM_MODELS)
def test_only_sequence_models_connect_distant_frames(name, small_settings):
    model = build_model(name, small_settings).eval()
    audio = torch.randn(1, 1, 16000)
    other = torch.cat([audio[..., :4000].flip(-1), audio[..., 4000:]], dim=-1)  # same level
    first = 4000 + round(receptive_field_s(model, 16000) * 16000)
    with torch.no_grad():
        difference = (model(audio) - model(other))[..., first:].abs().max()
    assert (difference > 1e-4) == (name != "demucs_framewise")


@pytest.mark.parametrize(("sample_rate", "channels"), [(16000, 1), (22050, 2), (44100, 2)])
def test_filters_are_convolutions_that_reconstruct(sample_rate, channels):
    taps = resolve_settings("demo", overrides=f"sample_rate={sample_rate}").demucs_taps
    filters, synthesis = Filters(taps), Synthesis(taps)
    audio, scale = torch.randn(2, channels, 10 * taps), taps**0.5
    outputs = filters(audio)  # (batch, channels, frames, filters)
    weight = filters.weight[:, None] / scale
    expected = torch.nn.functional.conv1d(audio.flatten(0, 1)[:, None], weight, stride=filters.hop)
    assert torch.allclose(outputs.flatten(0, 1).mT, expected, atol=1e-4)
    weight = synthesis.weight[:, None] / scale
    expected = torch.nn.functional.conv_transpose1d(expected, weight, stride=filters.hop)
    estimate = synthesis(outputs)
    assert torch.allclose(estimate.flatten(0, 1), expected[:, 0], atol=1e-4)
    middle = slice(filters.hop, -filters.hop)  # where two frames overlap
    assert torch.allclose(estimate[..., middle], audio[..., middle], atol=1e-3)


def test_receptive_field_of_the_unet(small_settings):
    model = build_model("unet", small_settings).eval().double()
    samples = receptive_field_s(model, 16000) * 16000 - 2 * small_settings.n_fft
    frames, middle = round(samples / small_settings.hop) + 1, 2**model.depth * 16
    x = torch.randn(1, 1, small_settings.n_fft // 2, 2 * middle, dtype=torch.float64)
    model.logits(x.requires_grad_())[..., middle].sum().backward()
    first, last = x.grad.abs().sum(dim=(0, 1, 2)).nonzero()[[0, -1]].flatten() - middle
    assert -frames <= first < -frames // 8 and frames // 8 < last <= frames


def test_unknown_model_lists_the_models(small_settings):
    with pytest.raises(ValueError, match="unet, demucs_framewise, demucs_lstm, demucs_attention"):
        build_model("open_unmix", small_settings)


def test_committed_weights_load():
    """Those of model A have the names of an older version."""
    folders = [path.parent for path in (ROOT / "results" / "reference").rglob("*.safetensors")]
    assert len(folders) >= len(MODELS)
    for folder in folders:
        model = load_model(folder)
        stored = upgrade_weights(load_file(folder / "model.safetensors"))
        loaded = dict(model.state_dict())
        torch.testing.assert_close(loaded, stored, rtol=0, atol=0, check_dtype=False)
        assert model.sample_rate > 0 and not model.training


def test_unusable_weights_are_one_sentence(tmp_path, small_settings):
    other = build_model("demucs_lstm", small_settings).state_dict()
    settings = small_settings.model_dump(mode="json")
    description = dict(model="unet", target="piano", settings=settings)
    (tmp_path / "model.json").write_text(json.dumps(description))
    write_tensors(tmp_path / "model.safetensors", other)
    for _ in range(2):  # of another model, then pickled
        with pytest.raises(ValueError, match="is damaged or does not fit model.json") as error:
            load_model(tmp_path)
        assert "\n" not in str(error.value)
        torch.save(other, tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", ["", '{"a": 1}', "[" * 100_000])
def test_damaged_description_is_one_sentence(text, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json does not describe a model") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def random_spectra(*shape):
    generator = torch.manual_seed(0)
    return torch.randn(2, 1, *shape, dtype=torch.complex64, generator=generator)


def test_oracles_are_far_above_the_mixture(store, small_settings):
    mixture, stems = store.load(store.split("test")[0])
    target = stems[store.stem_index("piano")]
    for name in ORACLES:
        estimate = oracle(name, mixture, target, small_settings)
        assert estimate.shape == mixture.shape
        assert utterance_sdr(target.T, estimate.T) > utterance_sdr(target.T, mixture.T) + 3


@pytest.mark.parametrize("silent_from", [40, 10])  # digital silence does not weaken the filter
def test_mono_wiener_filter_is_the_power_ratio_mask(silent_from):
    spectra = random_spectra(1, 5, 40)
    spectra[0, ..., silent_from:] = 0
    powers, mixture = spectra.abs().square(), spectra.sum(dim=0)
    estimate = wiener(mixture, *spectra, bins_at_once=2)
    assert torch.allclose(estimate, powers[0] / powers.sum(dim=0) * mixture, atol=1e-3)


def test_stereo_wiener_filter_uses_the_position():
    """Separate one source on the left and one on the right that no mask could tell apart."""
    panning = torch.tensor([[1.0, 0.2], [0.2, 1.0]])  # source, channel
    left, right = random_spectra(1, 8, 50) * panning[:, None, :, None, None]
    error = wiener(left + right, left, right) - left
    assert error.abs().square().sum() < 0.02 * left.abs().square().sum()
