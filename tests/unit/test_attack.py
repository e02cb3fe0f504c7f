"""Onsets, attack and sustain on tone bursts."""

from functools import partial

import numpy as np
import pytest
import soundfile
from conftest import write_dataset

from mss_utils.analysis import find_onsets, isolated_onsets
from mss_utils.analysis.attack import ENVELOPE_S, attack_scores, mean_envelopes
from mss_utils.data import build_store

RATE = 16000
ONSETS_S = np.arange(0.5, 9.5, 0.5)
ONSETS = (ONSETS_S * RATE).round().astype(int)
scores = partial(attack_scores, onsets_s=ONSETS_S, sample_rate=RATE)


def bursts(rise_s=0.002):
    """Ten seconds; at every onset a tone with a linear rise that decays within 0.4 s."""
    time = np.arange(round(0.4 * RATE)) / RATE
    level = np.minimum(1, time / rise_s) * np.exp(-np.maximum(0, time - rise_s) / 0.08)
    audio = np.zeros((1, 10 * RATE), np.float32)
    for onset in ONSETS:
        audio[0, onset : onset + len(time)] = 0.5 * level * np.sin(2 * np.pi * 2000 * time)
    return audio


def test_attack_and_sustain_are_separate():
    estimate = bursts()
    for onset in ONSETS:
        estimate[:, onset : onset + 800] *= 0.9  # 50 ms
        estimate[:, onset + 800 : onset + 6400] *= 0.99
    row = scores(bursts(), estimate)
    assert row["n_onsets"] == len(ONSETS)
    assert row["attack_sdr"] == pytest.approx(20, abs=0.01)
    assert row["sustain_sdr"] == pytest.approx(40, abs=0.05)
    assert row["peak_error_db"] == pytest.approx(20 * np.log10(0.9), abs=0.05)


def test_slow_attack_has_a_time_error():
    assert scores(bursts(), bursts())["attack_time_error_ms"] == 0
    error_ms = scores(bursts(0.002), bursts(0.032))["attack_time_error_ms"]
    assert error_ms == pytest.approx(0.8 * 30, abs=5)  # 10 % to 90 % of the rise
    tone = 0.2 * np.sin(2 * np.pi * 1000 * np.arange(10 * RATE) / RATE, dtype=np.float32)
    smeared = bursts() + tone  # never below 10 % of a peak: the longest time
    assert 40 < scores(bursts(), smeared)["attack_time_error_ms"] < 60


def test_isolated_onsets():
    onsets = isolated_onsets(np.array([0.8, 0.01, 0.5, 0.6, 9.95]), RATE, 10 * RATE)
    assert (onsets / RATE).tolist() == [0.5, 0.8]  # others: near an end, 100 ms after another
    row = scores(bursts(), bursts(), onsets_s=np.array([]))
    assert row["n_onsets"] == 0 and np.isnan(row["attack_sdr"])


def test_mean_envelopes_are_relative_to_the_reference():
    estimates = {("unet", 0): bursts() / 2}
    rows = list(mean_envelopes(bursts(), estimates, ONSETS_S, RATE))
    reference, estimate = np.reshape([row["level"] for row in rows], (2, len(ENVELOPE_S)))
    assert max(reference) == pytest.approx(1, abs=0.01)
    assert np.allclose(estimate, reference / 2, atol=1e-6)
    assert not list(mean_envelopes(0 * bursts(), estimates, ONSETS_S, RATE))


def test_onsets_are_detected_in_audio_or_read_from_the_score(tmp_path, songs_store):
    root = write_dataset(tmp_path, 1, 1, 1, seconds=10)
    piano = bursts()[0] + 0.003 * np.random.default_rng(0).standard_normal(10 * RATE)
    soundfile.write(root / "test" / "test song 0" / "piano.wav", piano, RATE)
    store, songs = build_store(root, RATE, 1), songs_store[0]
    onsets_s = find_onsets(store, store.split("test")[0], "piano")
    assert len(onsets_s) == len(ONSETS) and np.abs(onsets_s - ONSETS_S).max() < 0.03
    onsets_s = find_onsets(songs, songs.split("test")[0], "piano")
    assert len(onsets_s) > 5 and (np.diff(onsets_s) >= 0).all()
