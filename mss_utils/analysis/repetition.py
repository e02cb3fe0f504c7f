"""Does attention use what comes again? How far a model looks, where attention looks, and what a repeat is worth.

    reach            gradient of one output sample --> share of its energy by distance
    attention        weights of the bottleneck --> average by lag, at the bar
    damaged repeat   a loop with one repetition covered --> SDR with the repeat, with other music, and with nothing around it
    repetitiveness   autocorrelation of onset strength at the bar, one number a track

Taught in notebook 05, heard in notebook 06.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from mss_utils.analysis.onsets import onset_strength
from mss_utils.analysis.phase import ratio_db
from mss_utils.models.level import Level

SHARES = (0.5, 0.9, 0.99)
FAR_S = 0.5  # what is further away than this is far
N_POSITIONS = 4  # of the output sample whose gradient is looked at
LAGS_S = (1.0, 2.0, 4.0)
LONG_LAG_S = 8.0  # asked only where training segments are longer than twice that
CONDITIONS = ("repeat", "different", "silent")  # what is around the damaged repetition
BURST_DB = -10.0  # level of the target relative to the interference that covers it
FADE_S = 0.005
NEAR = 0.25  # of a bar, to either side of it


# --- reach --------------------------------------------------------------------------------------------------------------


def reach_profile(model: nn.Module, window: np.ndarray, block: int) -> np.ndarray:
    """Share of the squared gradient of an output sample that lies in the k-th block of samples away from it: `(blocks,)`.

    `window` is a mixture `(channels, samples)`; the average is over output samples near its middle, of the first channel.
    Distances to the past and to the future are put together. Statistics of the input are held constant, see
    `constant_statistics`. After W. Luo et al., "Understanding the effective receptive field in deep convolutional neural
    networks", NeurIPS 2016, section 2.
    """
    samples = window.shape[1]
    positions = np.linspace(0.4, 0.6, N_POSITIONS) * (samples - 1)
    positions = torch.from_numpy(positions.round().astype(int))
    mixture = (
        torch.from_numpy(np.ascontiguousarray(window)).repeat(N_POSITIONS, 1, 1).requires_grad_()
    )
    with constant_statistics(model):
        estimate = model(mixture)
    gradient = torch.autograd.grad(
        estimate[torch.arange(N_POSITIONS), 0, positions].sum(), mixture
    )[0]
    energy = gradient.square().sum(dim=1, dtype=torch.float64)  # (positions, samples)
    away = (torch.arange(samples) - positions[:, None]).abs() // block
    profile = torch.zeros(N_POSITIONS, -(-samples // block), dtype=torch.float64).scatter_add_(
        1, away, energy
    )
    total = profile.sum(dim=1, keepdim=True)
    return (profile / total)[total[:, 0] > 0].mean(dim=0).numpy()


def radius_s(profile: np.ndarray, share: float, block_s: float) -> float:
    """Distance in seconds, in whole blocks, within which that share of a `reach_profile` lies."""
    if not np.isfinite(profile).all():
        return np.nan
    return block_s * (1 + int(np.searchsorted(np.cumsum(profile), share * (1 - 1e-9))))


@contextmanager
def constant_statistics(model: nn.Module) -> Iterator[None]:
    """Gradients take the level of the input and the statistics of group normalisation as constants.

    Both depend on every sample there is: through them each output would reach everywhere, by very little. Batch normalisation
    has constant statistics in evaluation, and layer normalisation those of one frame only.
    """
    hooks = [
        layer.register_forward_hook(_detached)
        for layer in model.modules()
        if isinstance(layer, Level)
    ]
    hooks += [
        layer.register_forward_hook(_normalised)
        for layer in model.modules()
        if isinstance(layer, nn.GroupNorm)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _detached(_layer: nn.Module, _inputs: tuple, level: torch.Tensor) -> torch.Tensor:
    return level.detach()


def _normalised(
    layer: nn.GroupNorm, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """What the layer made of its input `(batch, channels, ...)`, with mean and variance detached."""
    grouped = (
        inputs[0].unflatten(1, (layer.num_groups, -1)).flatten(2)
    )  # (batch, groups, everything else)
    mean, variance = (
        grouped.mean(2, keepdim=True).detach(),
        grouped.var(2, unbiased=False, keepdim=True).detach(),
    )
    shape = [1, -1] + [1] * (output.ndim - 2)
    normalised = ((grouped - mean) / (variance + layer.eps).sqrt()).reshape(output.shape)
    return normalised * layer.weight.view(shape) + layer.bias.view(shape)


# --- attention ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def attention_by_lag(model: nn.Module, windows: np.ndarray) -> np.ndarray:
    """Attention at the bottleneck of B2 by lag in frames, as a multiple of uniform attention: `(layers, frames)`.

    The average over `windows` of mixture `(n, channels, samples)`, over heads, over both directions and over all pairs of
    frames that far apart; uniform attention gives 1 everywhere.
    """
    caught = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, inputs: caught.append(attention_weights(layer, inputs[0]))
        )
        for layer in model.bottleneck.layers
    ]
    try:
        model(torch.from_numpy(np.ascontiguousarray(windows)))
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack([by_lag(weights) for weights in caught])


def attention_weights(layer: nn.TransformerEncoderLayer, x: torch.Tensor) -> torch.Tensor:
    """Weights of a pre-norm layer on its input `(batch, frames, width)`: `(batch, heads, frames, frames)`."""
    x = layer.norm1(x)
    return layer.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1]


def by_lag(weights: torch.Tensor) -> np.ndarray:
    """Mean of `(..., frames, frames)` by distance of the two frames, as a multiple of the uniform weight: `(frames,)`."""
    mean = weights.flatten(0, -3).mean(dim=0).double().numpy()
    frames = len(mean)
    both = lambda lag: np.concatenate([mean.diagonal(lag), mean.diagonal(-lag)]).mean()
    return frames * np.array([both(lag) for lag in range(frames)])


def at_the_bar_db(profile: np.ndarray, bar_s: float, frame_s: float) -> float:
    """How much more attention there is at a lag of one bar, to a frame either way, than within a quarter of a bar around it.

    `profile` is by lag in frames, see `by_lag`. NaN where a bar and a quarter do not fit, or the bar is too short to tell.
    """
    bar = bar_s / frame_s
    lags = np.arange(len(profile))
    at, near = abs(lags - bar) <= 1, (abs(lags - bar) > 1) & (abs(lags - bar) <= NEAR * bar)
    if not (bar * (1 + NEAR) <= len(profile) - 1 and at.any() and near.any()):
        return np.nan
    return 10 * np.log10(profile[at].mean() / profile[near].mean())


# --- the damaged repeat -------------------------------------------------------------------------------------------------


def lags_s(segment_s: float) -> tuple[float, ...]:
    """The lags that are asked of models trained on segments so long; `askable` says which have an answer."""
    return LAGS_S + ((LONG_LAG_S,) if segment_s > 2 * LONG_LAG_S else ())


def askable(lag_s: float, segment_s: float) -> bool:
    """Whether both repetitions fit into a training segment: what a model never saw together it cannot have learnt to use."""
    return segment_s >= 2 * lag_s


def loop_starts(target: np.ndarray, residual: np.ndarray, lag: int) -> list[int]:
    """Where in a track, `(channels, samples)` both, loops of `lag` samples can be cut: places side by side.

    At a place target and residual are within 20 dB of the loudest place of theirs, and there is other music to put around it.
    """
    starts = np.arange(0, target.shape[1] - lag + 1, lag)
    if len(starts) < 3:
        return []
    powers = [
        np.array([_power(signal[:, start : start + lag]) for start in starts])
        for signal in (target, residual)
    ]
    good = starts[
        np.logical_and(*((power > 0) & (power >= 0.01 * power.max()) for power in powers))
    ]
    return good.tolist() if len(good) >= 3 else []


def spread(places: list, count: int) -> list:
    """At most `count` of these places, from the first to the last in even steps."""
    return [
        places[index]
        for index in np.unique(
            np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
        )
    ]


def least_alike(target: np.ndarray, start: int, lag: int, count: int) -> list[int]:
    """Starts of the `count` stretches of `lag` samples that are least like the one at `start`, itself not among them.

    Likeness is the cosine between magnitude spectrograms. Stretches begin on a grid of a quarter of the lag, have at least a hundredth
    of the power and share no sample with the one at `start`. Empty when there are fewer than two.
    """
    spectrum = _magnitudes(target, lag)
    grid = max(1, lag // 4)
    here, at_least = spectrum(start), 0.01 * _power(target[:, start : start + lag])
    places = [
        place for place in range(0, target.shape[1] - lag + 1, grid) if abs(place - start) >= lag
    ]
    places = [place for place in places if _power(target[:, place : place + lag]) >= at_least]
    if len(places) < 2:
        return []
    order = sorted(places, key=lambda place: float((spectrum(place) * here).sum()))
    return [order[index % len(order)] for index in range(count)]


def _magnitudes(target: np.ndarray, lag: int):
    """A function from the start of a stretch to its magnitude spectrogram of unit norm."""
    n_fft, hop = 512, 256
    mono = torch.from_numpy(target.mean(axis=0))
    whole = torch.stft(mono, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True).abs()
    frames = max(1, lag // hop)

    def spectrum(start: int) -> torch.Tensor:
        cells = whole[:, start // hop : start // hop + frames]
        cells = nn.functional.pad(cells, (0, frames - cells.shape[1]))
        return cells / (cells.norm() + 1e-12)

    return spectrum


def damaged_repeat(
    target: np.ndarray, residual: np.ndarray, start: int, lag: int, samples: int, sample_rate: int
) -> dict[str, tuple[np.ndarray, np.ndarray, slice]]:
    """For each of `CONDITIONS` a mixture and its target, `(channels, samples)`, and where in it the damaged repetition lies.

    The `lag` samples of the target at `start` stand in the middle, covered by the residual of the same place, 10 dB louder.
    Around them stands nothing but target: the same samples again and again (`repeat`), the stretches of the track least like
    them (`different`, brought to the same power), or nothing (`silent`). Empty when the track has no other stretches.
    """
    begin = (samples - lag) // 2
    n_side = -(-begin // lag)
    others = least_alike(target, start, lag, 2 * n_side)
    if not others:
        return {}
    cell = _faded(target[:, start : start + lag], sample_rate)
    burst = _faded(residual[:, start : start + lag], sample_rate)
    burst = burst * np.sqrt(_power(cell) / _power(burst) * 10 ** (-BURST_DB / 10))
    different = [_faded(target[:, other : other + lag], sample_rate) for other in others]
    different = [stretch * np.sqrt(_power(cell) / _power(stretch)) for stretch in different]
    sides = dict(
        repeat=[cell] * (2 * n_side),
        different=different,
        silent=[np.zeros_like(cell)] * (2 * n_side),
    )
    found, cut = {}, n_side * lag - begin  # what of the first stretch is outside the window
    for condition, around in sides.items():
        reference = np.concatenate(
            [*around[:n_side], cell, *around[n_side:], np.zeros_like(cell)], axis=1
        )[:, cut : cut + samples]
        mixture = reference.copy()
        mixture[:, begin : begin + lag] += burst
        found[condition] = (
            mixture.astype(np.float32),
            reference.astype(np.float32),
            slice(begin, begin + lag),
        )
    return found


def _power(audio: np.ndarray) -> float:
    return float(np.square(audio, dtype=np.float64).mean())


def _faded(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """A stretch with its ends faded over 5 ms, so that no join clicks."""
    length = audio.shape[1]
    ramp = np.minimum(np.arange(length), np.arange(length)[::-1]) / max(
        1, round(FADE_S * sample_rate)
    )
    return audio * np.minimum(1, ramp)


@torch.inference_mode()
def repeat_scores(
    model: nn.Module, loops: list[dict], conditions: tuple[str, ...] = CONDITIONS
) -> list[dict[str, float]]:
    """SDR in dB of the damaged repetition under each condition, for every loop of `damaged_repeat`."""
    scores = []
    for loop in loops:
        mixtures = torch.from_numpy(np.stack([loop[condition][0] for condition in conditions]))
        estimates = model(mixtures).numpy()
        scores.append(
            {
                condition: _sdr(loop[condition][1], estimate, loop[condition][2])
                for condition, estimate in zip(conditions, estimates)
            }
        )
    return scores


def _sdr(reference: np.ndarray, estimate: np.ndarray, where: slice) -> float:
    reference, estimate = reference[:, where].astype(np.float64), estimate[:, where]
    return ratio_db(np.square(reference).sum(), np.square(estimate - reference).sum())


# --- repetitiveness of real tracks --------------------------------------------------------------------------------------


def repetitiveness(audio: np.ndarray, sample_rate: int, bar_s: float) -> float:
    """Autocorrelation of the onset strength of `(channels, samples)` at a lag of one bar, -1 to 1, the best within 4 % of it.

    NaN for fewer than two bars, or without any onset.
    """
    strength, hop = onset_strength(audio, sample_rate)
    bar = bar_s * sample_rate / hop
    if not (np.isfinite(bar) and 2 * bar <= len(strength)) or strength.std() == 0:
        return np.nan
    lags = range(round(0.96 * bar), round(1.04 * bar) + 1)
    return max(float(np.corrcoef(strength[:-lag], strength[lag:])[0, 1]) for lag in lags)
