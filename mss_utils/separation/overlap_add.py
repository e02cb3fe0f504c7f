"""Overlap-add: separate audio of any length chunk by chunk. See notebook 02.

Neighbouring chunks overlap by a quarter. The estimate of each chunk is multiplied by weights that
rise and fall over the overlap, the products are added, and the sum is divided by the sum of the
weights. A model that returns its input therefore returns the whole song.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import firwin, resample_poly
from tqdm.auto import tqdm

CONTEXT_S = 0.1  # extra context on each side of a chunk, discarded: windows have edge artifacts
OVERLAP = 0.25  # share of a chunk that it has in common with the next one
MAX_RATIO = 20_000  # of two sample rates: exact for all usual ones, else off by under one sample


def separate(
    model: torch.nn.Module,
    mixture: np.ndarray,
    sample_rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Separate a mixture in memory by overlap-add of chunks.

    Parameters
    ----------
    model : torch.nn.Module
        Maps `(batch, channels, samples)` to the same shape. Its attributes `sample_rate` and
        `channels`, if it has them, must fit the mixture.
    mixture : np.ndarray, shape (channels, samples)
    sample_rate : int
        Hz.
    chunk_s : float, optional
        Seconds; by default a chunk with its context is as long as a training segment.
    progress : bool

    Returns
    -------
    np.ndarray, shape (channels, samples), float32
        The estimate of the target.
    """
    mixture = np.ascontiguousarray(mixture, dtype=np.float32)
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(f"The mixture has shape {mixture.shape}; expected (channels, samples).")
    for name, value in (("sample_rate", sample_rate), ("channels", len(mixture))):
        expected = getattr(model, name, value)
        if value != expected:
            raise ValueError(f"The mixture has {name} {value}, the model {expected}: convert it.")
    if not np.isfinite(mixture).all():
        raise ValueError("The mixture holds NaN or infinite samples: repair the file.")
    samples = mixture.shape[1]
    blocks = separated_blocks(
        model, lambda start, stop: mixture[:, start:stop], samples, sample_rate, chunk_s, progress
    )
    return np.concatenate(list(blocks), axis=1)


def separated_blocks(
    model: torch.nn.Module,
    read: Callable[[int, int], np.ndarray],
    samples: int,
    sample_rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the estimate in blocks `(channels, any)`, `samples` long in all, in constant memory.

    `read(start, stop)` returns a part of the mixture, `(channels, stop - start)` float32, at any
    rate and with any number of channels. The model is applied to windows: a chunk with context on
    both sides. All are equally long; the first begins and the last ends with the audio.
    """
    if chunk_s is not None and not chunk_s > 0:
        raise ValueError(f"chunk_s is {chunk_s}; expected seconds above 0.")
    segment_s = max(getattr(model, "segment_s", 0.0), 4 * CONTEXT_S)  # the chunk is at least half
    window_s = chunk_s + 2 * CONTEXT_S if chunk_s else segment_s
    context = round(CONTEXT_S * sample_rate)
    window = min(max(round(window_s * sample_rate), 2 * context + 1), samples)
    chunk = max(1, window - 2 * context)
    overlap = int(OVERLAP * chunk)
    rise = np.clip((np.arange(window, dtype=np.float32) + 1 - context) / (overlap + 1), 0, 1)
    starts = [*range(0, samples - window, chunk - overlap), samples - window]
    # Sums of weighted estimates, and of weights, where the next window also covers the audio.
    pending, pending_weight = np.zeros((1, 0), np.float32), np.zeros(0, np.float32)
    for i, start in enumerate(tqdm(starts, "Separating", unit="window", disable=not progress)):
        first, last = i == 0, i == len(starts) - 1
        kept = slice(0 if first else context, window if last else window - context)
        weight = (np.maximum(rise, first) * np.maximum(rise[::-1], last))[kept]
        total = _estimate(model, read(start, start + window), sample_rate)[:, kept] * weight
        total[:, : pending.shape[1]] += pending
        weight[: len(pending_weight)] += pending_weight
        finished = len(weight) if last else starts[i + 1] + context - start - kept.start
        yield total[:, :finished] / weight[:finished]
        pending, pending_weight = total[:, finished:], weight[finished:]


def _estimate(model: torch.nn.Module, window: np.ndarray, sample_rate: int) -> np.ndarray:
    """Apply the model to one window `(channels, samples)` of any sample rate.

    Channels are split into groups of `model.channels`; the last channel is repeated to fill the
    last group, and its estimates are averaged.
    """
    model_rate = getattr(model, "sample_rate", sample_rate)
    model_channels = getattr(model, "channels", len(window))
    n_groups = math.ceil(len(window) / model_channels)
    channel_index = np.minimum(np.arange(n_groups * model_channels), len(window) - 1)
    model_input = torch.from_numpy(_resample(window, sample_rate, model_rate)[channel_index])
    model_input = model_input.unflatten(0, (n_groups, model_channels))  # (groups, channels, n)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            device = next(iter(model.parameters()), model_input).device
            output = model(model_input.to(device)).flatten(0, 1).cpu().numpy()
    finally:
        model.train(was_training)
    channels = [output[channel_index == channel].mean(axis=0) for channel in range(len(window))]
    return _resample(np.stack(channels), model_rate, sample_rate)[:, : window.shape[1]]


def _resample(audio: np.ndarray, old_rate: int, new_rate: int) -> np.ndarray:
    """Resample `(channels, samples)`; torchaudio would need much memory for odd ratios."""
    if old_rate == new_rate:
        return audio
    low, high = sorted((old_rate, new_rate))
    ratio = Fraction(low, high).limit_denominator(MAX_RATIO)
    small, large = ratio.numerator, ratio.denominator
    up, down = (large, small) if new_rate > old_rate else (small, large)
    return resample_poly(audio, up, down, axis=1, window=_low_pass(large))


@lru_cache(maxsize=2)
def _low_pass(factor: int) -> np.ndarray:
    """Filter that keeps 93 % of the band; there and back the error is below -100 dB."""
    taps = firwin(128 * factor + 1, 1 / factor, window=("kaiser", 10.0))  # pyright: ignore
    return np.asarray(taps, np.float32)
