"""The damaged repeat: a model separates music that is damaged, with clean repetitions around it."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from mss_utils.config import SEQUENCE_MODELS, Run
from mss_utils.data import Store, Track, rms
from mss_utils.evaluation.bsseval import utterance_sdr
from mss_utils.models import load_model

LAGS_S = (1.0, 2.0, 4.0)
LONG_LAG_S = 8.0  # only for training segments longer than twice that
CONDITIONS = ("repeat", "different", "silent")  # what surrounds the damaged repetition
BURST_DB = -10.0  # level of the target relative to the interference that covers it
FADE_S = 0.005  # avoids clicks at joins
N_LOOPS = 40  # in all, at least; spread over the tracks that have room for them


def lags_s(segment_s: float) -> dict[float, bool]:
    """Return the lags to test, and whether a training segment is long enough to learn each."""
    lags = (*LAGS_S, LONG_LAG_S) if segment_s > 2 * LONG_LAG_S else LAGS_S
    return {lag_s: segment_s >= 2 * lag_s for lag_s in lags}


def measure_repetition(run: Run, store: Store, target: str) -> Iterator[dict]:
    """Yield rows of the table `repetition`: SDR in dB of every damaged repetition by B1 and B2."""
    segment_s = run.settings.segment_s
    for lag_s, askable in lags_s(segment_s).items():
        key = dict(target=target, lag_s=lag_s)
        if not askable:
            yield key | dict(reason=f"not askable: segments of {segment_s:g} s are too short")
            continue
        loops = find_loops(run, store, target, lag_s)
        if not loops:
            yield key | dict(reason="no track has three such stretches of target and residual")
        for model, seed in itertools.product(SEQUENCE_MODELS, range(run.settings.seeds)):
            network = load_model(run.model_folder(target, model, seed))
            for (track, start_s), loop in loops.items():
                place = dict(track=track, start_s=start_s, model=model, seed=seed)
                for condition, sdr in loop_scores(network, loop).items():
                    yield key | place | dict(condition=condition, sdr=sdr)


def find_loops(run: Run, store: Store, target: str, lag_s: float) -> dict[tuple[str, float], dict]:
    """Build the loops of all test tracks, see `make_loop`: {(track name, start in s): loop}."""
    lag = round(lag_s * store.sample_rate)

    def load(track: Track) -> tuple[np.ndarray, np.ndarray]:
        mixture, stems = store.load(track)
        reference = stems[store.stem_index(target)]
        return reference, mixture - reference

    starts = {track: loop_starts(*load(track), lag) for track in store.split("test")}
    starts = {track: places for track, places in starts.items() if places}
    loops = {}
    for track, places in starts.items():
        reference, residual = load(track)
        count = min(math.ceil(N_LOOPS / len(starts)), len(places))
        for index in np.linspace(0, len(places) - 1, count).round().astype(int):
            start, samples = places[index], run.settings.segment
            loop = make_loop(reference, residual, start, lag, samples, store.sample_rate)
            if loop:
                loops[track.name, start / store.sample_rate] = loop
    return loops


def loop_starts(target: np.ndarray, residual: np.ndarray, lag: int) -> list[int]:
    """Find stretches of `lag` samples in which target and residual are loud; at least three."""
    starts = np.arange(0, target.shape[1] - lag + 1, lag)
    loud = np.ones(len(starts), bool)
    for signal in (target, residual):
        levels = np.array([rms(signal[:, start : start + lag]) for start in starts])
        loud &= (levels > 0) & (levels >= 0.1 * levels.max(initial=0))
    return starts[loud].tolist() if loud.sum() >= 3 else []


def make_loop(
    target: np.ndarray, residual: np.ndarray, start: int, lag: int, samples: int, sample_rate: int
) -> dict[str, tuple[np.ndarray, np.ndarray, slice]]:
    """Build the damaged repeat: for each of `CONDITIONS` mixture, target and damaged samples.

    The `lag` samples of the target at `start` stand in the middle, covered by the residual of the
    same place, 10 dB louder. Around them is target only: the same samples again and again, the
    least similar stretches of the track at the same power, or silence. Empty if there are none.
    """
    begin = (samples - lag) // 2
    n_side = math.ceil(begin / lag)
    others = least_similar(target, start, lag, 2 * n_side)
    if not others:
        return {}
    cell = _faded(target[:, start : start + lag], sample_rate)
    burst = _faded(residual[:, start : start + lag], sample_rate)
    burst = burst * rms(cell) / rms(burst) * 10 ** (-BURST_DB / 20)
    different = [_faded(target[:, other : other + lag], sample_rate) for other in others]
    surroundings = dict(
        repeat=[cell] * (2 * n_side),
        different=[part * rms(cell) / rms(part) for part in different],
        silent=[np.zeros_like(cell)] * (2 * n_side),
    )
    loop, damage = {}, slice(begin, begin + lag)
    skip = n_side * lag - begin  # samples of the first stretch that do not fit
    for condition, parts in surroundings.items():
        parts = [*parts[:n_side], cell, *parts[n_side:], np.zeros_like(cell)]
        reference = np.concatenate(parts, axis=1)[:, skip : skip + samples]
        mixture = reference.copy()
        mixture[:, damage] += burst
        loop[condition] = mixture.astype(np.float32), reference.astype(np.float32), damage
    return loop


def least_similar(target: np.ndarray, start: int, lag: int, count: int) -> list[int]:
    """Find the stretches of `lag` samples that are least similar to the one at `start`.

    Similarity is the cosine between magnitude spectrograms. Candidates do not overlap the stretch
    and are at most 20 dB softer. Returns `count` starts, repeated where there are fewer.
    """
    n_fft, hop = 512, 256
    mono, window = torch.from_numpy(target.mean(axis=0)), torch.hann_window(n_fft)
    magnitudes = torch.stft(mono, n_fft, hop, window=window, return_complex=True).abs()
    frames = max(1, lag // hop)

    def spectrum(place: int) -> torch.Tensor:
        cells = magnitudes[:, place // hop : place // hop + frames]
        cells = nn.functional.pad(cells, (0, frames - cells.shape[1]))
        return cells / (cells.norm() + 1e-12)

    own, min_rms = spectrum(start), 0.1 * rms(target[:, start : start + lag])
    grid = range(0, target.shape[1] - lag + 1, max(1, lag // 4))
    places = [i for i in grid if abs(i - start) >= lag and rms(target[:, i : i + lag]) >= min_rms]
    places.sort(key=lambda place: float((spectrum(place) * own).sum()))
    return [places[i % len(places)] for i in range(count)] if len(places) >= 2 else []


def _faded(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    index = np.arange(audio.shape[1])
    ramp = np.minimum(index, index[::-1]) / max(1, round(FADE_S * sample_rate))
    return audio * np.minimum(1, ramp)


@torch.inference_mode()
def loop_scores(model: nn.Module, loop: dict) -> dict[str, float]:
    """Separate a loop under each condition; return the SDR in dB of the damaged repetition."""
    estimates = model(torch.from_numpy(np.stack([mixture for mixture, _, _ in loop.values()])))
    scores = {}
    for (condition, (_, reference, damage)), estimate in zip(loop.items(), estimates, strict=True):
        scores[condition] = utterance_sdr(reference[:, damage].T, estimate[:, damage].numpy().T)
    return scores
