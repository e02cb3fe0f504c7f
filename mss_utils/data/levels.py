"""Levels: how loud a signal is, and when it is silent."""

from __future__ import annotations

import numpy as np

SILENCE_DB = -60.0
FLOOR_DB = -120.0


def rms(audio: np.ndarray) -> float:
    """Return the root mean square over every axis; 0 for an empty array."""
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if audio.size else 0.0


def level_db(audio: np.ndarray) -> float:
    """Return the RMS level in dB relative to full scale, over every axis; -inf for silence."""
    return to_db(rms(audio))


def to_db(amplitude: float) -> float:
    """Convert an amplitude to dB relative to 1; -inf for 0."""
    return 20 * np.log10(amplitude) if amplitude > 0 else -np.inf


def window_levels_db(audio: np.ndarray, sample_rate: int, window_s: float = 0.5) -> np.ndarray:
    """Return the RMS level in dB, at least -120 dB, of successive windows.

    `(..., channels, samples)` -> `(..., windows)`.
    """
    window = round(window_s * sample_rate)
    n_samples = audio.shape[-1] // window * window
    frames = audio[..., :n_samples].reshape(*audio.shape[:-1], -1, window)
    power = np.mean(np.square(frames, dtype=np.float64), axis=(-3, -1))
    return 10 * np.log10(power + 10 ** (FLOOR_DB / 10))


def loudest_start(target: np.ndarray, length: int) -> int:
    """Return the first sample of the `length` samples of `(channels, samples)` with most energy."""
    energy = np.square(target, dtype=np.float64).sum(axis=0)
    total = np.concatenate([[0.0], np.cumsum(energy)])
    sums = total[length:] - total[:-length]
    return int(sums.argmax()) if len(sums) else 0
