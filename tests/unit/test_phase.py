"""Phase error and phase swap on signals whose answer is known."""

import numpy as np
import pytest

from mss_utils.analysis import combine_magnitude_phase
from mss_utils.analysis.phase import phase_scores
from mss_utils.models.unet import STFT

RATE = 16000
STFT_A = STFT(1024, 256)


def noise(seconds=2.0, seed=0):
    samples = round(seconds * RATE)
    return np.random.default_rng(seed).standard_normal((1, samples)).astype(np.float32)


def whole_band(reference, estimate):
    return phase_scores(reference, estimate, RATE, STFT_A)[0]


def test_random_phase_error_is_half_pi():
    row = whole_band(noise(20, seed=1), noise(20, seed=2))
    assert row["phase_error_rad"] == pytest.approx(np.pi / 2, abs=0.03)
    assert row["sdr_true_magnitude"] == pytest.approx(-3.01, abs=0.1)  # E|1 - e^ia|^2 = 2


def test_phase_error_and_magnitude_error_are_separate():
    inverted, soft = whole_band(noise(), -noise()), whole_band(noise(), noise() / 2)
    assert inverted["phase_error_rad"] == pytest.approx(np.pi) and soft["phase_error_rad"] < 1e-6
    assert inverted["sdr"] == pytest.approx(-6.02, abs=0.01)
    assert inverted["sdr_true_phase"] == np.inf and soft["sdr_true_magnitude"] > 60
    assert soft["sdr"] == pytest.approx(6.02, abs=0.01) == soft["sdr_true_phase"]


def test_error_is_measured_in_its_band():
    time = np.arange(2 * RATE) / RATE
    tones = [np.sin(2 * np.pi * hz * time)[None].astype(np.float32) for hz in (400, 1500, 3000)]
    rows = phase_scores(sum(tones), tones[0] + tones[1] - tones[2], RATE, STFT_A)
    error = {row["band_low_hz"]: row["phase_error_rad"] for row in rows[1:]}
    assert error[2000] > 3.1 and error[250] < 0.05
    assert (rows[0]["band_high_hz"], rows[-1]["band_low_hz"]) == (8000, 4000)


def test_silence_has_no_phase():
    row = whole_band(noise(), 0 * noise())
    assert np.isnan([row["phase_error_rad"], row["sdr_true_magnitude"]]).all() and row["sdr"] == 0
    row = whole_band(0 * noise(), noise())
    assert np.isnan([row["phase_error_rad"], row["sdr"]]).all()


def test_interchannel_error():
    same, opposite = (np.concatenate([noise(), sign * noise()]) for sign in (1, -1))
    assert whole_band(opposite, opposite)["interchannel_error_rad"] < 1e-6
    assert whole_band(same, opposite)["interchannel_error_rad"] == pytest.approx(np.pi)
    assert np.isnan(whole_band(noise(), noise())["interchannel_error_rad"])


def test_phase_swap():
    assert np.abs(combine_magnitude_phase(noise(), noise(), STFT_A) - noise()).max() < 1e-4
    swapped = combine_magnitude_phase(2 * noise(), -noise(), STFT_A)
    assert np.abs(swapped + 2 * noise()).max() < 1e-3
