"""The models of the comparison: build one from settings, or load a trained one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mss_utils.config import MODELS, Settings, is_valid_stem_name
from mss_utils.models.demucs import AttentionCore, Bottleneck, Demucs, FramewiseCore, LSTMCore
from mss_utils.models.unet import UNet


def build_model(name: str, settings: Settings, seed: int = 0) -> torch.nn.Module:
    """Build a model with random weights; B0, B1 and B2 start with the same encoder and decoder.

    Parameters
    ----------
    name : str
        One of `config.MODELS`; ValueError for another one.
    settings : Settings
    seed : int
        Of the initial weights. The global random state does not change.

    Returns
    -------
    Module
        Maps a mixture `(batch, channels, samples)` to an estimate of the target, same shape.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}; there are: {', '.join(MODELS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "unet":
            sizes = (settings.unet_channels, settings.unet_depth, settings.n_fft, settings.hop)
            return UNet(settings.channels, *sizes, settings.unet_full_band_channels)
        width = settings.demucs_bottleneck_width
        sizes = (settings.channels, settings.demucs_taps, settings.demucs_width, width)
        model = Demucs(*sizes)
        torch.manual_seed(seed + 1_000_003)  # B0, B1 and B2 draw all other weights alike
        if name == "demucs_attention":
            core = AttentionCore(width, settings.demucs_heads)
        else:
            core = LSTMCore(width) if name == "demucs_lstm" else FramewiseCore(width)
        model.bottleneck = Bottleneck(width, core)
        return model


def load_model(folder: Path | str) -> torch.nn.Module:
    """Load a trained model from `model.json` and `model.safetensors`; nothing is unpickled.

    Parameters
    ----------
    folder : Path or str
        Such as `results/<run>/models/<target>/<model>/seed0`.

    Returns
    -------
    Module
        In evaluation mode, with the attributes `sample_rate`, `channels`, `segment_s`, `target`.

    Raises
    ------
    FileNotFoundError, ValueError
        One of the two files is missing, damaged or of another model.
    """
    folder = Path(folder)
    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            expected = "results/<run>/models/<target>/<model>/seed0"
            raise FileNotFoundError(f"No {name} in {folder}. Expected a folder like {expected}.")
    model, settings, target = _read_description(folder / "model.json")
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(upgrade_weights(load_file(path)))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path} is damaged or does not fit model.json ({reason}): delete both and train again."
        ) from None
    attributes = settings.model_dump(include={"sample_rate", "channels", "segment_s"})
    vars(model).update(attributes, target=target)
    return model.eval()


def upgrade_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of weights that an older version of the code saved."""
    return {re.sub(r"^tall\.", "full_band.", key): tensor for key, tensor in weights.items()}


def _read_description(path: Path) -> tuple[torch.nn.Module, Settings, str]:
    """Build the untrained model that a model.json describes."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        name, target = description["model"], description["target"]
        settings = Settings.model_validate(description["settings"])
        if not is_valid_stem_name(target):
            raise ValueError(f"invalid target {target!r}")
        return build_model(name, settings), settings, target
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(repr(error).split())[:200]
        raise ValueError(f"{path} does not describe a model: {reason}.") from None


def count_parameters(module: torch.nn.Module) -> int:
    """Count the trained values in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


def receptive_field_s(model: torch.nn.Module, sample_rate: int) -> float:
    """Return the receptive field of the convolutions in seconds, without the bottleneck."""
    if isinstance(model, Demucs):  # a sample lies in two frames of filters that overlap by half
        return 1.5 * model.filters.taps / sample_rate
    field, step = 1, 1  # in frames
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            field += (layer.kernel_size[-1] - 1) * layer.dilation[-1] * step
            step *= layer.stride[-1]
        elif isinstance(layer, torch.nn.ConvTranspose2d):
            field += (math.ceil(layer.kernel_size[-1] / layer.stride[-1]) - 1) * step
            step //= layer.stride[-1]
    if isinstance(model, UNet):  # to samples, with the windows of the STFT and its inverse
        field = (field - 1) * model.stft.hop + 2 * model.stft.n_fft
    return field / sample_rate
