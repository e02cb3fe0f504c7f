"""Levels: how loud a signal is, and when it is silent."""

from __future__ import annotations

import numpy as np

SILENCE_DB = -60.0
WINDOW_S = 0.5
FLOOR_DB = -120.0


def rms(audio: np.ndarray) -> float:
    """Root mean square over every axis; 0 for nothing at all."""
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if audio.size else 0.0


def level_db(audio: np.ndarray) -> float:
    """RMS level in dB relative to full scale, over every axis; -inf for silence."""
    return to_db(rms(audio))


def to_db(amplitude: float) -> float:
    """An amplitude in dB relative to 1; -inf for 0."""
    return 20 * np.log10(amplitude) if amplitude > 0 else -np.inf


def window_levels_db(audio: np.ndarray, sample_rate: int, window_s: float = WINDOW_S) -> np.ndarray:
    """RMS level in dB of successive windows of `(..., channels, samples)`, -120 dB at the least: `(..., windows)`."""
    window = round(window_s * sample_rate)
    frames = audio[..., : audio.shape[-1] // window * window].reshape(*audio.shape[:-1], -1, window)
    power = np.mean(np.square(frames, dtype=np.float64), axis=(-3, -1))
    return 10 * np.log10(power + 10 ** (FLOOR_DB / 10))


def active_windows(audio: np.ndarray, sample_rate: int, window_s: float = WINDOW_S) -> np.ndarray:
    """Which successive windows of `(..., channels, samples)` are louder than -60 dB: bool `(..., windows)`."""
    return window_levels_db(audio, sample_rate, window_s) > SILENCE_DB


def loudest_start(target: np.ndarray, length: int) -> int:
    """First sample of the `length` samples of `(channels, samples)` that hold most energy: the earliest such place.

    A signal that is not longer than `length` starts at 0.
    """
    energy = np.square(target, dtype=np.float64).sum(axis=0)
    total = np.concatenate([[0.0], np.cumsum(energy)])
    sums = total[length:] - total[:-length]
    return int(sums.argmax()) if len(sums) else 0
