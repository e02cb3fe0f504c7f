"""From a song of any length to the target in it: overlapping windows, faded and added.

Taught in notebook 02.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import firwin, resample_poly
from tqdm.auto import tqdm

CONTEXT_S = 0.1  # heard on both sides of a chunk for its sake alone: at the ends of a window models pad and resamplers ring
FADE = 0.25  # share of a chunk over which it fades in, and again out
BLOCK = 2**20  # samples of every channel that are copied at once
MAX_RATIO = (
    20_000  # all usual rates are met exactly; of the others a window is off by less than a sample
)
PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"[playlist]")  # ffmpeg would open whatever stands in them
FLAC_HZ = 655350
WAV_BYTES = 2**32 - 2**16  # a WAV header cannot count further; an RF64 header can
Read = Callable[
    [int, int], np.ndarray
]  # (start, stop) in samples -> (channels, stop - start) float32


# --- in memory ----------------------------------------------------------------------------------------------------------


def separate(
    model: torch.nn.Module,
    mixture: np.ndarray,
    sample_rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Target estimate `(channels, samples)` for a mixture of that shape; float32, same length.

    The windows are those of `separated_blocks`; a mixture no longer than one is heard in one piece. Raises ValueError for a
    wrong shape, rate or number of channels, and for samples that are not finite.
    """
    mixture = _checked(model, mixture, sample_rate)
    blocks = separated_blocks(
        model,
        lambda start, stop: mixture[:, start:stop],
        mixture.shape[1],
        sample_rate,
        chunk_s,
        progress,
    )
    return np.concatenate(list(blocks), axis=1)


def _checked(model: torch.nn.Module, mixture: np.ndarray, sample_rate: int) -> np.ndarray:
    mixture = np.ascontiguousarray(mixture, dtype=np.float32)
    if mixture.ndim != 2 or mixture.shape[1] == 0:
        raise ValueError(
            f"The mixture has shape {mixture.shape}; expected (channels, samples) with at least one sample."
        )
    for name, found in (("sample_rate", sample_rate), ("channels", mixture.shape[0])):
        expected = getattr(model, name, found)
        if found != expected:
            raise ValueError(
                f"The mixture has {name} {found}, the model was trained with {expected}: convert the mixture first."
            )
    if not np.isfinite(mixture).all():
        raise ValueError(
            "The mixture holds NaN or infinite samples; expected finite ones: mend the file."
        )
    return mixture


# --- window by window ---------------------------------------------------------------------------------------------------


def separated_blocks(
    model: torch.nn.Module,
    read: Read,
    samples: int,
    rate: int,
    chunk_s: float | None = None,
    progress: bool = False,
) -> Iterator[np.ndarray]:
    """The target in a song of any length and rate, block after block: each `(channels, any number)`, together `samples` long.

    The model hears windows: a chunk of `chunk_s` and CONTEXT_S on either side, of which the estimate is thrown away. By
    default a window is as long as the segments of the training. Chunks overlap by a quarter; each is weighted by a trapezium
    and the sum divided by the sum of the weights, so an identity returns its input. The first window begins and the last
    one ends with the song, all are full, and no more is held than two of them. Raises ValueError for a chunk that is not positive.
    """
    window, context = _lengths(model, rate, chunk_s)
    window = min(
        window, samples
    )  # with one window there is no seam, and `context` and `hop` no longer matter
    chunk = max(1, window - 2 * context)
    hop = chunk - int(FADE * chunk)
    last = samples - window
    held, held_weight = (
        np.float32(0),
        np.zeros(0, np.float32),
    )  # what earlier windows say of samples that are not finished
    for start in tqdm(
        range(0, last + hop, hop), desc="Separating", unit="window", disable=not progress
    ):
        start = min(start, last)
        weight = _weight(window, context, chunk - hop, start == 0, start == last)
        kept = np.flatnonzero(weight)  # a run of samples that begins where the finished ones end
        total, weight = (
            estimate(model, read(start, start + window), rate)[:, kept] * weight[kept],
            weight[kept],
        )
        total[:, : len(held_weight)] += held
        weight[: len(held_weight)] += held_weight
        finished = (
            len(kept) if start == last else min(start + hop, last) + context - start - kept[0]
        )
        yield total[:, :finished] / weight[:finished]
        held, held_weight = total[:, finished:], weight[finished:]


def _lengths(model: torch.nn.Module, rate: int, chunk_s: float | None) -> tuple[int, int]:
    """Samples of a window and of the context on either side."""
    if chunk_s is not None and not chunk_s > 0:
        raise ValueError(
            f"chunk_s is {chunk_s}; expected seconds above 0, or none for the length the model was trained on."
        )
    window_s = (
        chunk_s + 2 * CONTEXT_S if chunk_s else max(model.segment_s, 4 * CONTEXT_S)
    )  # at least half of it is kept
    context = round(CONTEXT_S * rate)
    return max(round(window_s * rate), 2 * context + 1), context


def _weight(window: int, context: int, fade: int, first: bool, last: bool) -> np.ndarray:
    """Weights of a window `(samples,)`: none in the context, a rise over `fade`, 1, and the same backwards; 1 to the song's ends."""
    rise = np.clip((np.arange(window, dtype=np.float32) + 1 - context) / (fade + 1), 0, 1)
    return np.maximum(rise, first) * np.maximum(rise[::-1], last)


def estimate(model: torch.nn.Module, window: np.ndarray, rate: int) -> np.ndarray:
    """What the model makes of one window `(channels, samples)` of any rate and number of channels: same shape, float32.

    The channels are seated in groups as large as the model's, in their order; the last one also takes what seats are left.
    So a model of one channel hears each by itself, one of two channels hears a mono song doubled and 5.1 pair by pair.
    """
    model_rate, n_heard = (
        getattr(model, "sample_rate", rate),
        getattr(model, "channels", len(window)),
    )
    seats = np.minimum(np.arange(math.ceil(len(window) / n_heard) * n_heard), len(window) - 1)
    heard = _resampled(window, rate, model_rate)[seats]
    batch = torch.from_numpy(heard).unflatten(
        0, (-1, n_heard)
    )  # (groups, model's channels, samples)
    with _evaluating(model), torch.inference_mode():
        found = (
            model(batch.to(next(iter(model.parameters()), batch).device))
            .flatten(0, 1)
            .cpu()
            .numpy()
        )  # (seats, samples)
    found = np.stack([found[seats == channel].mean(axis=0) for channel in range(len(window))])
    return _resampled(found, model_rate, rate)[:, : window.shape[1]]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _resampled(audio: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """`(channels, samples)` at another rate; any two rates, in little memory, which torchaudio's kernels are not."""
    if rate == new_rate:
        return audio
    ratio = Fraction(min(rate, new_rate), max(rate, new_rate)).limit_denominator(MAX_RATIO)
    up, down = (ratio.numerator, ratio.denominator)[:: 1 if new_rate < rate else -1]
    return resample_poly(audio, up, down, axis=1, window=_low_pass(max(up, down)))


@lru_cache(maxsize=2)
def _low_pass(factor: int, zero_crossings: int = 64) -> np.ndarray:
    """Keeps what lies under 0.93 of half the lower rate, there and back within -100 dB; reaches 64 of its samples far, 4 ms at 16 kHz."""
    return firwin(2 * zero_crossings * factor + 1, 1 / factor, window=("kaiser", 10.0)).astype(
        np.float32
    )
