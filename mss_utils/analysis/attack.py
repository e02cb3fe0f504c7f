"""Who keeps the attack? Errors in the first moments of notes against errors in the rest of them.

    onsets of the target --those after 150 ms without another--> stretches before, at and after each --> scores of a track

Taught in notebook 05, heard in notebook 06.
"""

from __future__ import annotations

import numpy as np

from mss_utils.analysis.phase import ratio_db

APART_S = 0.15  # no other onset so long before
BEFORE_S = 0.05
ATTACK_S = 0.05
SUSTAIN_S = 0.5  # it ends so long after the onset, unless another one comes earlier
STEP_S = 0.001  # of envelopes
SMOOTH_S = 0.004  # the window whose RMS an envelope is
ENVELOPE_S = (-0.05, 0.15)
PEAK_S = 0.1  # the peak of an attack is looked for so long
NO_ONSET = "no onset of the target with 150 ms without another before it"


def isolated(onsets_s: np.ndarray, sample_rate: int, samples: int) -> np.ndarray:
    """Samples `(n,)` of the onsets with no other in the 150 ms before, and room for the stretches around them in the track."""
    onsets_s = np.unique(onsets_s)
    alone = np.diff(onsets_s, prepend=-np.inf) >= APART_S
    at = np.round(onsets_s[alone] * sample_rate).astype(int)
    return at[
        (at >= round(-ENVELOPE_S[0] * sample_rate))
        & (at + round(ENVELOPE_S[1] * sample_rate) <= samples)
    ]


def transient_scores(
    reference: np.ndarray, estimate: np.ndarray, onsets_s: np.ndarray, sample_rate: int
) -> dict:
    """How well the onsets of one track, in seconds, are kept; signals are `(channels, samples)`.

    `attack_sdr` and `sustain_sdr` in dB are ratios of energies summed over the first 50 ms after all isolated onsets, and from
    there to the next onset or 0.5 s; `pre_echo_db` is the energy of the error in the 50 ms before, relative to that of the
    reference in the 50 ms after. `attack_time_error_ms` (estimate minus reference, the time from a tenth to nine tenths of the
    peak) and `peak_error_db` are medians over the onsets. Without an onset all are NaN and `reason` says so.
    """
    at = isolated(onsets_s, sample_rate, reference.shape[1])
    before, attack, sustain = _stretches(at, onsets_s, sample_rate, reference.shape[1])
    signal, error = (
        _running_sum(np.square(audio, dtype=np.float64).sum(axis=0))
        for audio in (reference, estimate - reference)
    )
    total = lambda sums, stretch: (sums[stretch[1]] - sums[stretch[0]]).sum()
    rise_ms, peak_db = (
        _attack_errors(reference, estimate, at, sample_rate) if len(at) else (np.nan, np.nan)
    )
    return dict(
        n_onsets=len(at),
        attack_sdr=ratio_db(total(signal, attack), total(error, attack)),
        sustain_sdr=ratio_db(total(signal, sustain), total(error, sustain)),
        pre_echo_db=-ratio_db(total(signal, attack), total(error, before)),
        attack_time_error_ms=rise_ms,
        peak_error_db=peak_db,
        reason="" if len(at) else NO_ONSET,
    )


def _running_sum(energy: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(energy)])


def _stretches(
    at: np.ndarray, onsets_s: np.ndarray, sample_rate: int, samples: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """First and last sample of what is before, at and after each onset."""
    length = lambda seconds: round(seconds * sample_rate)
    every = np.append(np.round(np.sort(onsets_s) * sample_rate).astype(int), samples)
    begin = at + length(ATTACK_S)
    end = np.minimum(
        every[np.searchsorted(every[:-1], begin)], np.minimum(at + length(SUSTAIN_S), samples)
    )
    return [(at - length(BEFORE_S), at), (at, begin), (begin, np.maximum(begin, end))]


def envelopes(
    audio: np.ndarray, onsets_s: np.ndarray, sample_rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """RMS over 4 ms around the isolated onsets of `(channels, samples)`, a row an onset, and the times in seconds."""
    at = isolated(onsets_s, sample_rate, audio.shape[1])
    return _envelopes(audio, at, sample_rate), _times()


def _times() -> np.ndarray:
    return np.arange(round(ENVELOPE_S[0] / STEP_S), round(ENVELOPE_S[1] / STEP_S) + 1) * STEP_S


def _envelopes(audio: np.ndarray, at: np.ndarray, sample_rate: int) -> np.ndarray:
    """`(onsets, times)` for onsets at these samples; a window ends at its time, so that nothing rises before it sounds."""
    sums = _running_sum(np.square(audio, dtype=np.float64).mean(axis=0))
    window = round(SMOOTH_S * sample_rate)
    end = np.clip(at[:, None] + np.round(_times() * sample_rate).astype(int), window, len(sums) - 1)
    return np.sqrt(np.maximum(0, sums[end] - sums[end - window]) / window)


def _attack_errors(
    reference: np.ndarray, estimate: np.ndarray, at: np.ndarray, sample_rate: int
) -> tuple[float, float]:
    """Median error of the attack time in ms and of the peak in dB; onsets of which the reference's cannot be told are left out.

    An estimate that was never lower before rises for longer than is looked at. It counts with all of that, or the smeared attacks
    would drop out and the worst model look best; up to half of the onsets may be so without moving the median.
    """
    true_rise, true_peak, _ = _rise_and_peak(_envelopes(reference, at, sample_rate))
    rise, peak, longest = _rise_and_peak(_envelopes(estimate, at, sample_rate))
    rise = np.where(np.isnan(rise), longest, rise)
    late_ms = 1000 * (rise - true_rise)
    with np.errstate(divide="ignore", invalid="ignore"):
        louder_db = 20 * np.log10(peak / true_peak)
    median = lambda values: (
        float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else np.nan
    )
    return median(late_ms), median(louder_db)


def _rise_and_peak(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds from a tenth to nine tenths of the peak of each of `(onsets, times)`, the peak, and the longest rise that could be seen.

    The rise is NaN where it never was lower, all are NaN where there is no peak.
    """
    zero = round(-ENVELOPE_S[0] / STEP_S)
    peak = curves[:, zero : zero + round(PEAK_S / STEP_S) + 1].max(axis=1)
    high = zero + (curves[:, zero:] >= 0.9 * peak[:, None]).argmax(
        axis=1
    )  # first time it is as high, from the onset on
    low = (curves < 0.1 * peak[:, None]) & (np.arange(curves.shape[1]) < high[:, None])
    last_low = curves.shape[1] - 1 - low[:, ::-1].argmax(axis=1)
    rise = np.where(low.any(axis=1) & (peak > 0), (high - last_low) * STEP_S, np.nan)
    return rise, *(np.where(peak > 0, values, np.nan) for values in (peak, high * STEP_S))
