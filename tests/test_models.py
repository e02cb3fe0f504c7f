import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mss_utils.config import MODELS, PROFILES, resolve_settings
from mss_utils.models import build_model, count_parameters, load_model, receptive_field_s
from mss_utils.models.demucs import sinusoidal_positions
from mss_utils.models.unet import STFT
from mss_utils.training.loop import snr_loss

WAVE_MODELS = ("demucs_lstm", "demucs_attention")


def error_db(estimate, wanted):
    return 10 * torch.log10((estimate - wanted).square().sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("n_fft, hop", [(1024, 256), (2048, 512)])
@pytest.mark.parametrize("samples", [1, 255, 16000, 48001])
def test_the_inverse_stft_returns_the_signal(n_fft, hop, samples):
    audio = torch.randn(2, 2, samples)
    stft = STFT(n_fft, hop)
    assert error_db(stft.inverse(stft(audio), samples), audio) < -90


def test_a_mask_of_ones_returns_the_mixture(small_settings, monkeypatch):
    model, audio = build_model("unet", small_settings), torch.randn(1, 1, 12345)
    monkeypatch.setattr(model, "mask", lambda magnitude: torch.ones_like(magnitude))
    assert error_db(model(audio), audio) < -90


def test_the_mask_is_soft_and_covers_every_bin(small_settings):
    model = build_model("unet", small_settings).eval()
    magnitude = torch.rand(2, 1, small_settings.n_fft // 2 + 1, 37)
    mask = model.mask(magnitude)
    assert mask.shape == magnitude.shape
    assert 0 <= mask.min() and mask.max() <= 1


def test_the_baseline_has_no_recurrence_and_no_attention():
    kinds = {
        type(layer).__name__ for layer in build_model("unet", resolve_settings("demo")).modules()
    }
    own = {"UNet", "TallPath", "STFT", "Level", "Down", "Up"}
    assert kinds <= own | {
        "ModuleList",
        "Sequential",
        "Conv2d",
        "ConvTranspose2d",
        "BatchNorm2d",
        "LeakyReLU",
        "ReLU",
        "GELU",
    }


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
def test_one_batch_can_be_learnt_by_heart(small_settings, name):
    """The cheapest honest end-to-end test: two fixed sines, one of them wanted."""
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
def test_the_two_bottlenecks_cost_the_same(profile):
    sizes = [
        count_parameters(build_model(name, resolve_settings(profile)).bottleneck)
        for name in WAVE_MODELS
    ]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


def test_b1_and_b2_start_from_the_same_encoder_and_decoder():
    lstm, attention = (
        build_model(name, resolve_settings("demo"), seed=5).state_dict() for name in WAVE_MODELS
    )
    shared = [key for key in lstm if not key.startswith("bottleneck")]
    assert shared == [key for key in attention if not key.startswith("bottleneck")]
    assert all(torch.equal(lstm[key], attention[key]) for key in shared)
    again = build_model("demucs_lstm", resolve_settings("demo"), seed=6).state_dict()
    assert not torch.equal(lstm["encoder.0.0.weight"], again["encoder.0.0.weight"])


def test_building_a_model_leaves_the_random_stream_alone(small_settings):
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    build_model("demucs_attention", small_settings)
    assert torch.equal(torch.rand(1), wanted)


def test_attention_reaches_the_whole_segment_and_the_convolutions_do_not(small_settings):
    model = build_model("demucs_attention", small_settings).eval()
    frames = torch.randn(1, 16, model.bottleneck_width, requires_grad=True)
    model.bottleneck(frames)[0, 0, 0].backward()
    assert frames.grad[0, -1].abs().max() > 0
    assert receptive_field_s(model, 16000) * 16000 < 16 * model.total_stride


def changes(network, x, outside):
    """Whether the middle output changes when everything `outside` samples or frames from the middle changes its sign."""
    middle, flipped = x.shape[-1] // 2, x.clone()
    flipped[..., : middle - outside] *= -1
    flipped[..., middle + outside + 1 :] *= -1
    with torch.no_grad():
        return (network(x)[..., middle] - network(flipped)[..., middle]).abs().max() > 1e-15


def test_the_receptive_field_of_the_waveform_convolutions(small_settings):
    model = (
        build_model("demucs_lstm", small_settings).eval().double()
    )  # untrained, the deep layers add next to nothing
    model.bottleneck = torch.nn.Identity()
    for layer in model.modules():
        if isinstance(layer, torch.nn.GroupNorm):  # its statistics reach everywhere
            layer.forward = lambda x: x
    field = round(receptive_field_s(model, 16000) * 16000)
    audio = torch.randn(1, 1, 16 * model.total_stride, dtype=torch.float64)
    assert not changes(model, audio, field)
    assert changes(model, audio, field // 4)


def test_the_receptive_field_of_the_unet(small_settings):
    model = build_model("unet", small_settings).eval().double()
    reach = receptive_field_s(model, 16000) * 16000 - 2 * small_settings.n_fft
    frames = round(reach / small_settings.hop) + 1
    bins = small_settings.n_fft // 2
    x = torch.randn(1, 1, bins, 2**model.depth * 32, dtype=torch.float64)
    assert not changes(model._logits, x, frames)
    assert changes(model._logits, x, frames // 8)


def test_positions_differ_and_have_unit_pairs():
    table = sinusoidal_positions(200, 16)
    assert table.shape == (200, 16)
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 1e-2
    torch.testing.assert_close(table[:, 0::2] ** 2 + table[:, 1::2] ** 2, torch.ones(200, 8))


def test_an_unknown_model_lists_the_models(small_settings):
    with pytest.raises(ValueError, match="unet, demucs_lstm, demucs_attention"):
        build_model("open_unmix", small_settings)


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json.*results/<run>/models"):
        load_model(tmp_path)


def test_a_pickle_is_no_weights_file(tmp_path, small_settings):
    torch.save(build_model("unet", small_settings).state_dict(), tmp_path / "model.safetensors")
    description = dict(
        model="unet", target="piano", settings=small_settings.model_dump(mode="json")
    )
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        '{"a": 1}',
        "[]",
        '{"model": "unet", "settings": {"what": 1}, "target": "piano"}',
    ],
)
def test_a_description_that_is_none_is_one_sentence(text, tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match="model.json does not describe a model") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_one_sentence(small_settings, tmp_path):
    save_file(
        build_model("demucs_lstm", small_settings).state_dict(), tmp_path / "model.safetensors"
    )
    (tmp_path / "model.json").write_text(
        json.dumps(
            dict(model="unet", target="piano", settings=small_settings.model_dump(mode="json"))
        )
    )
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_the_loss_is_the_negative_snr():
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.standard_normal((3, 1, 1000))).float()
    mixture = target + torch.from_numpy(rng.standard_normal((3, 1, 1000))).float()
    assert abs(snr_loss(torch.zeros_like(target), target, mixture).item()) < 1e-4
    assert snr_loss(target, target, mixture) < -26
    assert abs(snr_loss(1.1 * target, target, mixture, floor_db=-200).item() + 20) < 0.1
    silent = torch.zeros_like(target)
    assert snr_loss(silent, silent, mixture) == 0 and snr_loss(mixture, silent, mixture) > 25
    levels = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    loud = snr_loss(levels * mixture, levels * target, levels * mixture)
    torch.testing.assert_close(loud, snr_loss(mixture, target, mixture), rtol=1e-2, atol=1e-2)
