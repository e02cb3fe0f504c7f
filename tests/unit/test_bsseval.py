import os

import numpy as np
import pytest

from mss_utils.evaluation.bsseval import (
    MAX_SCORE_DB,
    METRICS,
    MusevalScorer,
    bss_eval,
    disagreement,
    score_track,
    si_sdr,
    utterance_sdr,
)

RATE = 8000
TOLERANCE_DB = 1e-4


def music(n_stems, n_channels, seconds=3.3, seed=0):
    """Decaying chords with some noise: (stems, samples, channels)."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    frequencies = 110 * 2 ** (rng.integers(0, 36, (n_stems, 4, 1)) / 12)
    phases = rng.uniform(0, 6, (n_stems, 4, 1))
    tones = np.sin(2 * np.pi * frequencies * time + phases)  # (stems, tones, samples)
    beats = np.exp(-5 * (time * np.arange(1, n_stems + 1)[:, None] % 1))
    pan = rng.uniform(0.2, 1, (n_stems, 4, n_channels))
    signals = np.einsum("stn,stc,sn->snc", tones, pan, beats)
    return 0.1 * signals + 0.003 * rng.standard_normal(signals.shape)


def estimate(references, seed=1):
    """Estimates as of a model: some delayed leakage, some noise."""
    noise = 0.002 * np.random.default_rng(seed).standard_normal(references.shape)
    return 0.9 * references + 0.1 * np.roll(references.sum(axis=0), 5, axis=0) + noise


def assert_equals_museval(museval, references, estimates, rate=RATE, window_s=1.0, hop_s=1.0):
    window, hop = int(window_s * rate), int(hop_s * rate)
    expected = museval.metrics.bss_eval(references, estimates, window, hop)[:4]
    scores = bss_eval(references, estimates, rate, window_s, hop_s)
    for metric, theirs in zip(METRICS, expected, strict=True):
        ours = scores[metric]
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=metric)
        exact = theirs < MAX_SCORE_DB
        np.testing.assert_allclose(ours[exact], theirs[exact], rtol=0, atol=TOLERANCE_DB)
        assert (ours[theirs >= MAX_SCORE_DB] > MAX_SCORE_DB - 1).all(), metric
    return scores


@pytest.mark.parametrize(
    "n_stems, n_channels, seconds, window_s, hop_s, n_frames",
    [(4, 1, 2.3, 1.0, 1.0, 2), (2, 2, 0.3, 1.0, 1.0, 1), (2, 1, 2.0, 0.3, 0.7, 3)],
)
def test_equals_museval(museval, n_stems, n_channels, seconds, window_s, hop_s, n_frames):
    references = music(n_stems, n_channels, seconds)
    estimates = estimate(references)
    scores = assert_equals_museval(museval, references, estimates, RATE, window_s, hop_s)
    assert scores["SDR"].shape == (n_stems, n_frames), "the last 0.3 seconds are not scored"


def test_equals_museval_for_mixture_and_perfect_estimate(museval):
    references = music(2, 1)
    for estimates in (np.stack([references.sum(axis=0) / 4] * 2), references):
        assert_equals_museval(museval, references, estimates)


def test_silent_frames_are_nan_as_in_museval(museval):
    references = music(2, 2, seconds=5.0)
    estimates = estimate(references)
    second = [slice(i * RATE, (i + 1) * RATE) for i in range(5)]
    references[0, second[1]] = 0
    estimates[1, second[2]] = 0
    references[1, second[3], 1] = -references[1, second[3], 0]  # left = -right is silent too
    estimates[0, 4 * RATE : 5 * RATE - 1] = 0  # one sample short of silence
    scores = assert_equals_museval(museval, references, estimates)
    np.testing.assert_array_equal(np.isnan(scores["SDR"]), [[False, True, True, True, False]] * 2)


def test_equals_museval_for_an_empty_band_and_a_centred_stem(museval):
    spectrum = np.fft.rfft(music(2, 2), axis=1)
    spectrum[:, int(0.6 * spectrum.shape[1]) :] = 0  # as lossy coding does
    references = np.round(np.fft.irfft(spectrum, axis=1) * 2**15) / 2**15
    references[1, :, 1] = references[1, :, 0]
    assert_equals_museval(museval, references, estimate(references))


def test_equals_museval_on_musdb(museval):
    root = os.environ.get("MUSDB_PATH")
    if not root:
        pytest.skip("MUSDB_PATH does not name a MUSDB18 folder")
    import musdb

    for track, n_channels in zip(musdb.DB(root=root, subsets="test")[:2], (2, 1), strict=True):
        track.chunk_duration = 4
        mixture, *_, vocals = track.stems[..., :n_channels]
        references = np.stack([vocals, mixture - vocals])
        assert_equals_museval(museval, references, estimate(references), track.rate)


def test_museval_scorer_needs_ffmpeg_and_sound(museval, monkeypatch):
    references = music(2, 1)
    scores = MusevalScorer(references, RATE).score(0 * references)
    assert scores["SAR"].shape == (2, 3) and np.isnan(scores["SAR"]).all()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="needs ffmpeg: .*scorer=bss_eval"):
        MusevalScorer(references, RATE)


def test_proportional_channels_score_as_mono():
    references = music(2, 1)
    estimates = estimate(references)
    mono = bss_eval(references, estimates, RATE)
    stereo = bss_eval(references * [1.0, 0.5], estimates * [1.0, 0.5], RATE)
    for metric in METRICS:
        np.testing.assert_allclose(stereo[metric], mono[metric], atol=TOLERANCE_DB)


def test_scores_of_whole_tracks():
    reference, noise = np.random.default_rng(0).standard_normal((2, RATE, 2))
    noise -= np.sum(noise * reference) / np.sum(reference**2) * reference
    noise *= np.sqrt(np.sum(reference**2) / np.sum(noise**2))  # orthogonal, of the same energy
    mixed, silence = reference + 0.1 * noise, np.zeros_like(reference)
    assert utterance_sdr(reference, 0.9 * reference) == pytest.approx(20)
    assert utterance_sdr(reference, silence) == 0
    assert utterance_sdr(reference, reference) == si_sdr(reference, reference) == np.inf
    assert [si_sdr(reference, scale * mixed) for scale in (1, -3)] == pytest.approx([20, 20])
    assert si_sdr(reference, noise) < -250 and si_sdr(reference, 0.3 * reference) > 250
    assert np.isnan([utterance_sdr(silence, mixed), si_sdr(silence, mixed)]).all()
    assert np.isnan(si_sdr(reference, silence))


def test_silent_stem_costs_the_others_nothing():
    references = music(3, 2)
    references[1] = 0
    estimates = estimate(references)
    scores = score_track(references, {"model": estimates}, RATE)["model"]
    alone = bss_eval(references[[0, 2]], estimates[[0, 2]], RATE)
    for metric in METRICS:
        np.testing.assert_array_equal(scores[metric][[0, 2]], alone[metric])
        assert np.isnan(scores[metric][1]).all()
    assert scores["silent"][0].all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("scorer", ["bss_eval", "museval"])
def test_silent_estimate_costs_the_others_no_sir(scorer, museval):
    references = music(3, 1)
    usual, silent = estimate(references), estimate(references)
    silent[0] = 0
    scores = score_track(references, dict(usual=usual, silent=silent), RATE, scorer)
    assert np.isnan(scores["silent"]["SDR"][0]).all()
    np.testing.assert_allclose(scores["silent"]["SIR"][1:], scores["usual"]["SIR"][1:], atol=1e-9)


def test_disagreement_by_hand():
    ours = np.array([1.0, 2.0, np.nan, 120.0, 20.0, np.nan])
    theirs = np.array([1.0, 2.5, np.nan, 150.0, 120.0, 3.0])
    assert disagreement(ours, theirs) == (3, 100.0, 1)
    assert np.isnan(disagreement(np.array([np.inf]), np.array([np.inf]))[1])


ONES, BROKEN = np.ones((2, 2, RATE, 1))
BROKEN[0, :3] = np.nan


@pytest.mark.parametrize(
    "references, estimates, message",
    [
        (ONES[..., 0], ONES, r"references have shape \(2, 8000\); expected \('stems"),
        (ONES[:0], ONES[:0], "none empty"),
        (ONES, ONES[:, :-1], r"estimates have shape \(2, 7999, 1\).*\(2, 8000, 1\)"),
        (ONES, BROKEN, "the model: estimates hold 3 NaN or infinite samples"),
    ],
)
def test_wrong_arrays_are_errors(references, estimates, message):
    with pytest.raises(ValueError, match=message):
        score_track(references, {"the model": estimates}, RATE)
    with pytest.raises(ValueError, match=message.removeprefix("the model: ")):
        bss_eval(references, estimates, RATE)
    with pytest.raises(ValueError, match="hop 0 samples"):
        bss_eval(ONES, ONES, RATE, hop_s=0)
