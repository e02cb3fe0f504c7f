"""Attack: errors in the first moments of notes compared with errors in the rest of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pandas as pd

from mss_utils.analysis.phase import ratio_db
from mss_utils.data import Store, Track

HOP_S, WINDOW_S, RISE_S = 0.004, 0.064, 0.05  # of the onset detector
APART_S = 0.15  # from the previous onset to an isolated one
ATTACK_S, SUSTAIN_S = 0.05, 0.5  # ends after the onset; the next onset may end the sustain earlier
STEP_S, SMOOTH_S = 0.001, 0.004  # step and RMS window of envelopes
ENVELOPE_S = np.arange(-50, 151) * STEP_S  # times relative to the onset
PEAK_S = 0.1  # search range for the peak of an attack


def find_onsets(store: Store, track: Track, stem: str) -> np.ndarray:
    """Find the onsets of a stem in seconds: from the score of a built-in song, else in the audio.

    Detection is SuperFlux (S. Boeck, G. Widmer, "Maximum filter vibrato suppression for onset
    detection", DAFx 2013) with backtracking; the 50 ms after an onset must have twice the energy of
    the 50 ms before. On the built-in songs it misses a quarter to two thirds of the onsets.
    """
    path = Path(track.source) / "onsets.json"
    score = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if set(store.stems) == score.keys():  # not so where settings add stems up
        return np.asarray(score[stem])
    audio = store.load(track)[1][store.stem_index(stem)]
    hop = int(HOP_S * store.sample_rate)
    n_fft = 2 ** round(np.log2(WINDOW_S * store.sample_rate))
    options: Any = dict(sr=store.sample_rate, hop_length=hop)
    superflux = options | dict(n_fft=n_fft, n_mels=80, lag=2, max_size=3)
    strength = librosa.onset.onset_strength(y=audio.mean(axis=0), **superflux)
    onsets = hop * librosa.onset.onset_detect(onset_envelope=strength, backtrack=True, **options)
    sums = _running_energy(audio)
    rise = round(RISE_S * store.sample_rate)
    before, at, after = np.clip([onsets - rise, onsets, onsets + rise], 0, len(sums) - 1)
    louder = sums[after] - sums[at] > 2 * (sums[at] - sums[before])
    return onsets[louder] / store.sample_rate


def isolated_onsets(onsets_s: np.ndarray, sample_rate: int, samples: int) -> np.ndarray:
    """Return the samples of onsets 150 ms or more after the previous one, not near either end."""
    onsets_s = np.unique(onsets_s)
    isolated = onsets_s[np.diff(onsets_s, prepend=-np.inf) >= APART_S]
    onsets = np.round(isolated * sample_rate).astype(int)
    first, last = (round(seconds * sample_rate) for seconds in ENVELOPE_S[[0, -1]])
    return onsets[(onsets + first >= 0) & (onsets + last <= samples)]


def attack_scores(
    reference: np.ndarray, estimate: np.ndarray, onsets_s: np.ndarray, sample_rate: int
) -> dict:
    """Measure how well an estimate preserves the isolated onsets of a track.

    SDRs in dB are energy ratios over all attacks (50 ms after the onset) and all sustains (from
    there to the next onset or 0.5 s). The errors of attack time (from 10 % to 90 % of the peak) and
    peak are estimate minus reference, medians over onsets. Signals are `(channels, samples)`.
    """
    samples = reference.shape[1]
    onsets = isolated_onsets(onsets_s, sample_rate, samples)
    attack_end = onsets + round(ATTACK_S * sample_rate)
    all_onsets = np.append(np.round(np.sort(onsets_s) * sample_rate).astype(int), samples)
    next_onset = all_onsets[np.searchsorted(all_onsets[:-1], attack_end)]
    sustain_end = np.minimum(next_onset, onsets + round(SUSTAIN_S * sample_rate))
    sustain_end = np.clip(sustain_end, attack_end, samples)
    signal, error = _running_energy(reference), _running_energy(estimate - reference)

    def sdr(begin: np.ndarray, end: np.ndarray) -> float:
        return ratio_db((signal[end] - signal[begin]).sum(), (error[end] - error[begin]).sum())

    true_time, true_peak = _attack_times(_envelopes(reference, onsets, sample_rate), np.nan)
    # An estimate that is never below 10 % gets the longest time: smeared attacks must not drop out.
    time, peak = _attack_times(_envelopes(estimate, onsets, sample_rate), 0)
    return dict(
        n_onsets=len(onsets),
        attack_sdr=sdr(onsets, attack_end),
        sustain_sdr=sdr(attack_end, sustain_end),
        attack_time_error_ms=pd.Series(1000 * (time - true_time)).median(),
        peak_error_db=pd.Series(20 * np.log10(peak / true_peak)).median(),
    )


def mean_envelopes(
    reference: np.ndarray, estimates: dict, onsets_s: np.ndarray, sample_rate: int
) -> Iterator[dict]:
    """Yield the mean level around isolated onsets; the peak of the reference there is 1."""
    onsets = isolated_onsets(onsets_s, sample_rate, reference.shape[1])
    peaks = _envelopes(reference, onsets, sample_rate).max(axis=1, keepdims=True)
    sounding = peaks[:, 0] > 0
    if not sounding.any():
        return
    for (model, seed), audio in {("reference", 0): reference, **estimates}.items():
        levels = (_envelopes(audio, onsets, sample_rate)[sounding] / peaks[sounding]).mean(axis=0)
        for time_s, level in zip(ENVELOPE_S, levels, strict=True):
            yield dict(model=model, seed=seed, time_ms=round(1000 * time_s), level=level)


def _running_energy(audio: np.ndarray) -> np.ndarray:
    """Energy before each sample and at the end, the mean over channels: `(samples + 1,)`."""
    return np.append(0.0, np.square(audio, dtype=np.float64).mean(axis=0).cumsum())


def _envelopes(audio: np.ndarray, onsets: np.ndarray, sample_rate: int) -> np.ndarray:
    """RMS `(onsets, times)` of windows that end at each time: no level rises before its sound."""
    sums, window = _running_energy(audio), round(SMOOTH_S * sample_rate)
    end = onsets[:, None] + np.round(ENVELOPE_S * sample_rate).astype(int)
    end = np.clip(end, window, len(sums) - 1)
    return np.sqrt(np.maximum(0, sums[end] - sums[end - window]) / window)


def _attack_times(curves: np.ndarray, start: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from 10 % (from index `start` if never below) to 90 % of the peak, and the peak."""
    zero = round(-ENVELOPE_S[0] / STEP_S)
    peak = curves[:, zero : zero + round(PEAK_S / STEP_S) + 1].max(axis=1, keepdims=True)
    peak = np.where(peak > 0, peak, np.nan)
    high = zero + (curves[:, zero:] >= 0.9 * peak).argmax(axis=1)
    low = (curves < 0.1 * peak) & (np.arange(curves.shape[1]) < high[:, None])
    last_low = curves.shape[1] - 1 - low[:, ::-1].argmax(axis=1)
    time = (high - np.where(low.any(axis=1), last_low, start)) * STEP_S
    return np.where(np.isnan(peak[:, 0]), np.nan, time), peak[:, 0]
