"""The three models of the comparison: build one from settings, or load a trained one from its folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mss_utils.config import MODELS, Settings, is_valid_stem_name, upgrade_settings
from mss_utils.models.demucs import AttentionBottleneck, Demucs, LSTMBottleneck
from mss_utils.models.unet import UNet


def build_model(name: str, settings: Settings, seed: int = 0) -> torch.nn.Module:
    """Build `unet`, `demucs_lstm` or `demucs_attention` with the weights that `seed` stands for.

    Every model maps a mixture `(batch, channels, samples)` to an estimate of the target of the same shape. Each part
    draws its weights from a random stream of its own, so B1 and B2 start from the same encoder and decoder. Raises ValueError for
    another name, MemoryError for a model that this machine has no room for.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}; there are: {', '.join(MODELS)}.")
    try:
        return _built(name, settings, seed)
    except RuntimeError as error:  # torch's word for memory on a CPU
        reason = str(error).strip().splitlines()[0]
        raise MemoryError(
            f"{name} cannot be built with these settings ({reason[:200]}): make its channels, depth or n_fft smaller."
        ) from None


def _built(name: str, settings: Settings, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "unet":
            size = (
                settings.unet_channels,
                settings.unet_depth,
                settings.n_fft,
                settings.hop,
                settings.unet_full_band_channels,
            )
            return UNet(settings.channels, *size)
        demucs = Demucs(
            settings.channels,
            settings.demucs_channels,
            settings.demucs_max_channels,
            settings.demucs_strides,
        )
        torch.manual_seed(seed + 1_000_003)
        width = demucs.bottleneck_width
        demucs.bottleneck = (
            LSTMBottleneck(width)
            if name == "demucs_lstm"
            else AttentionBottleneck(width, settings.attention_heads)
        )
        return demucs


def load_model(folder: Path | str) -> torch.nn.Module:
    """Rebuild a trained model from `model.json` and `model.safetensors`; nothing is unpickled.

    The model has attributes `sample_rate`, `channels`, `segment_s` and `target` taken from model.json. Raises
    FileNotFoundError naming what a model folder holds when one of the two files is missing, ValueError for a description that is none,
    and for weights in another format or of another model.
    """
    folder = Path(folder)
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"No {name} in {folder}; a model folder looks like results/<run>/models/<target>/<model>/seed0."
            )
    model, settings, target = _described(folder / "model.json")
    weights = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(weights))
    except SafetensorError as error:
        raise ValueError(
            f"{weights} is no safetensors file ({error}): train the model again."
        ) from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{weights} does not fit the model that model.json beside it describes ({reason}): train it again."
        ) from None
    model.sample_rate, model.channels, model.segment_s = (
        settings.sample_rate,
        settings.channels,
        settings.segment_s,
    )
    model.target = target
    return model.eval()


def _described(path: Path) -> tuple[torch.nn.Module, Settings, str]:
    """The untrained model of a model.json, its settings and its target."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings.model_validate(upgrade_settings(description["settings"]))
        if not is_valid_stem_name(description["target"]):
            raise ValueError(f"the target cannot be called {description['target']!r}")
        return build_model(description["model"], settings), settings, description["target"]
    except (
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:  # pydantic's and json's errors are ValueErrors
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} does not describe a model ({type(error).__name__}: {reason}): train the model again."
        ) from None


def count_parameters(module: torch.nn.Module) -> int:
    """Number of trained values in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


def receptive_field_s(model: torch.nn.Module, sample_rate: int) -> float:
    """Seconds of input that one output sample can depend on through the convolutions alone (bottleneck left out).

    Each convolution widens the field by kernel - 1 steps of its input, times its dilation; each stride makes those steps longer.
    """
    reach, step = 1, 1  # in samples, or in STFT frames for a spectrogram model
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Conv2d)):
            reach += (layer.kernel_size[-1] - 1) * layer.dilation[-1] * step
            step *= layer.stride[-1]
        elif isinstance(layer, (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d)):
            reach += (math.ceil(layer.kernel_size[-1] / layer.stride[-1]) - 1) * step
            step //= layer.stride[-1]
    if isinstance(
        model, UNet
    ):  # frames to samples; a window at the STFT and another at its inverse
        reach = (reach - 1) * model.stft.hop + 2 * model.stft.n_fft
    return reach / sample_rate
