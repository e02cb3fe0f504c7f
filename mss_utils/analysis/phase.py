"""Is the time domain crisper? How far the phase of an estimate is from the true one, and what that costs.

    reference, estimate --STFT--> magnitudes and the angle between them --by band--> phase error, and three SDRs

Taught in notebook 05, heard in notebook 06.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from mss_utils.models.unet import STFT

EDGES_HZ = (0, 250, 500, 1000, 2000, 4000, 8000, 16000)  # octaves, and all below the first
ONE_CHANNEL = "one channel: no phase between channels"


def bands(sample_rate: int) -> list[tuple[float, float]]:
    """(low, high) in Hz: the whole band first, then its octaves."""
    nyquist = sample_rate / 2
    return [
        (0.0, nyquist),
        *pairwise([*(float(edge) for edge in EDGES_HZ if edge < nyquist), nyquist]),
    ]


def phase_scores(
    reference: np.ndarray, estimate: np.ndarray, sample_rate: int, stft: STFT
) -> list[dict]:
    """Phase error and SDRs in dB of an estimate, `(channels, samples)` both, a row a band of `bands`.

    `phase_error_rad` is the mean angle between the two, from 0 to pi, weighted by the true magnitude; random phases have pi / 2.
    `sdr` is that of the estimate, `sdr_true_phase` that of its magnitude with the true phase, `sdr_true_magnitude` that of the
    true magnitude with its phase. All are energies of STFT cells before any resynthesis, because there the squared error
    falls into two parts, |R - E|^2 = (|R| - |E|)^2 + 2 |R| |E| (1 - cos angle): one of magnitude, one of phase.
    `interchannel_error_rad` is the error of the angle between left and right, weighted alike. A cell in which the estimate is
    zero has no phase and is left out of what needs one. `reason` says what is empty and why.
    """
    true, found = (
        stft(torch.from_numpy(np.ascontiguousarray(signal))[None])[0]
        for signal in (reference, estimate)
    )
    r, e = true.abs(), found.abs()  # (channels, bins, frames)
    angle, has_phase = torch.angle(found * true.conj()), e > 0
    sums = dict(
        energy=r.square(),
        error=(true - found).abs().square(),
        error_true_phase=(r - e).square(),
        weight=r * has_phase,
        angle=r * angle.abs() * has_phase,
        energy_with_phase=r.square() * has_phase,
        error_true_magnitude=2 * r.square() * (1 - torch.cos(angle)) * has_phase,
    )
    per_bin = {
        name: cells.sum(dim=(0, 2), dtype=torch.float64).numpy() for name, cells in sums.items()
    }
    if len(reference) == 2:
        per_bin |= _between_channels(true, found)
    hz = np.arange(len(per_bin["energy"])) * sample_rate / stft.n_fft
    inside = lambda low, high: (hz >= low) & ((hz < high) | (high == sample_rate / 2))
    return [
        dict(band_low_hz=low, band_high_hz=high)
        | _row({name: values[inside(low, high)].sum() for name, values in per_bin.items()})
        for low, high in bands(sample_rate)
    ]


def _between_channels(true: torch.Tensor, found: torch.Tensor) -> dict[str, np.ndarray]:
    """Weighted error of the angle between left and right of complex `(2, bins, frames)`, and its weight, each `(bins,)`."""
    across_true, across_found = (spec[0] * spec[1].conj() for spec in (true, found))
    weight = across_true.abs() * (across_found.abs() > 0)
    error = torch.angle(across_found * across_true.conj()).abs()
    over_frames = lambda cells: cells.sum(dim=1, dtype=torch.float64).numpy()
    return dict(across=over_frames(weight * error), across_weight=over_frames(weight))


def _row(sums: dict[str, float]) -> dict:
    """The scores of one band from its sums."""
    mean = lambda value, weight: value / weight if weight > 0 else np.nan
    silent = (
        "the reference is silent here"
        if sums["energy"] == 0
        else "the estimate is silent here"
        if sums["weight"] == 0
        else ""
    )
    return dict(
        phase_error_rad=mean(sums["angle"], sums["weight"]),
        sdr=ratio_db(sums["energy"], sums["error"]),
        sdr_true_phase=ratio_db(sums["energy"], sums["error_true_phase"]),
        sdr_true_magnitude=ratio_db(sums["energy_with_phase"], sums["error_true_magnitude"]),
        interchannel_error_rad=mean(sums["across"], sums["across_weight"])
        if "across" in sums
        else np.nan,
        reason=silent or ("" if "across" in sums else ONE_CHANNEL),
    )


def ratio_db(signal: float, error: float) -> float:
    """Energy ratio in dB; NaN without a signal, infinite without an error."""
    if not signal > 0:
        return np.nan
    return 10 * np.log10(signal / error) if error > 0 else np.inf


def phase_share(sdr: np.ndarray, sdr_true_phase: np.ndarray) -> np.ndarray:
    """Share of the squared error that is gone once the phase is true, 0 to 1, see `phase_scores`."""
    return 1 - 10 ** ((sdr - sdr_true_phase) / 10)


def combine_magnitude_phase(magnitude: np.ndarray, phase: np.ndarray, stft: STFT) -> np.ndarray:
    """The magnitude of one signal with the phase of another, as sound; all `(channels, samples)`."""
    size, angle = (
        stft(torch.from_numpy(np.ascontiguousarray(signal))[None]) for signal in (magnitude, phase)
    )
    return stft.inverse(torch.polar(size.abs(), angle.angle()), magnitude.shape[-1])[0].numpy()
