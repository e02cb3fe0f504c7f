"""Phase: how far the phase of an estimate is from the true one, and what that costs in SDR."""

from itertools import pairwise

import numpy as np
import pandas as pd
import torch

from mss_utils.models.unet import STFT

BAND_EDGES_HZ = (0.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16000.0)


def phase_scores(
    reference: np.ndarray, estimate: np.ndarray, sample_rate: int, stft: STFT
) -> list[dict]:
    """Measure phase error in radians and SDRs in dB: the whole band, then octaves.

    In a cell with true value R, estimate E and an angle a between them, the squared error is
    |R - E|^2 = (|R| - |E|)^2 + 2 |R| |E| (1 - cos a): a magnitude part plus a phase part. Energies
    are therefore summed over STFT cells. A cell in which the estimate is zero has no phase.
    Signals are `(channels, samples)`; angles are averaged with the true magnitude as weight.
    """
    true, estimated = _transform(reference, stft), _transform(estimate, stft)
    true_magnitude, magnitude = true.abs(), estimated.abs()  # (channels, bins, frames)
    angle, has_phase = torch.angle(estimated * true.conj()), magnitude > 0
    cells = dict(
        energy=true_magnitude.square(),
        error=(true - estimated).abs().square(),
        error_true_phase=(true_magnitude - magnitude).square(),
        weight=true_magnitude * has_phase,
        angle=true_magnitude * angle.abs() * has_phase,
        energy_with_phase=true_magnitude.square() * has_phase,
        error_true_magnitude=2 * true_magnitude.square() * (1 - torch.cos(angle)) * has_phase,
    )
    if len(reference) == 2:  # the angle between left and right
        true, estimated = (spectrum[:1] * spectrum[1:].conj() for spectrum in (true, estimated))
        cells["across_weight"] = true.abs() * (estimated.abs() > 0)
        cells["across"] = cells["across_weight"] * torch.angle(estimated * true.conj()).abs()
    per_bin = {name: x.sum(dim=(0, 2), dtype=torch.float64).numpy() for name, x in cells.items()}
    hz = np.arange(true.shape[1]) * sample_rate / stft.n_fft
    nyquist, rows = sample_rate / 2, []
    edges = [*(edge for edge in BAND_EDGES_HZ if edge < nyquist), nyquist]
    for low, high in [(0.0, nyquist), *pairwise(edges)]:
        inside = (hz >= low) & ((hz < high) | (high == nyquist))
        sums = {name: values[inside].sum() for name, values in per_bin.items()}
        rows.append(dict(band_low_hz=low, band_high_hz=high) | _band_scores(sums))
    return rows


def _transform(audio: np.ndarray, stft: STFT) -> torch.Tensor:
    return stft(torch.from_numpy(np.ascontiguousarray(audio))[None])[0]


def _band_scores(sums: dict[str, float]) -> dict:
    return dict(
        phase_error_rad=_mean(sums["angle"], sums["weight"]),
        sdr=ratio_db(sums["energy"], sums["error"]),
        sdr_true_phase=ratio_db(sums["energy"], sums["error_true_phase"]),
        sdr_true_magnitude=ratio_db(sums["energy_with_phase"], sums["error_true_magnitude"]),
        interchannel_error_rad=_mean(sums.get("across", 0), sums.get("across_weight", 0)),
    )


def _mean(total: float, weight: float) -> float:
    return total / weight if weight > 0 else np.nan


def ratio_db(signal: float, error: float) -> float:
    """Return an energy ratio in dB; NaN without a signal, infinite without an error."""
    if not signal > 0:
        return np.nan
    return 10 * np.log10(signal / error) if error > 0 else np.inf


def combine_magnitude_phase(magnitude: np.ndarray, phase: np.ndarray, stft: STFT) -> np.ndarray:
    """Resynthesise the magnitude of one signal with the phase of another, `(channels, samples)`."""
    spectrum = torch.polar(_transform(magnitude, stft).abs(), _transform(phase, stft).angle())
    return stft.inverse(spectrum[None], magnitude.shape[-1])[0].numpy()


def whole_band_rows(phase: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the table `phase` that cover all frequencies."""
    whole = (phase["band_low_hz"] == 0) & (phase["band_high_hz"] == phase["band_high_hz"].max())
    return phase[whole]
