"""The scores equal museval's, have the known answers, and fail in words."""

import os

import numpy as np
import pytest

from mss_utils.evaluation.bsseval import (
    MAX_SCORE_DB,
    METRICS,
    BSSEval,
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
    tones = np.sin(
        2 * np.pi * frequencies * time + rng.uniform(0, 6, (n_stems, 4, 1))
    )  # (stems, tones, samples)
    beats = np.exp(-5 * (time * np.arange(1, n_stems + 1)[:, None] % 1))
    pan = rng.uniform(0.2, 1, (n_stems, 4, n_channels))
    signals = np.einsum("stn,stc,sn->snc", tones, pan, beats)
    return 0.1 * signals + 0.003 * rng.standard_normal(signals.shape)


def separated(references, seed=1):
    """What a model makes of them: some delayed leakage, some noise."""
    noise = 0.002 * np.random.default_rng(seed).standard_normal(references.shape)
    return 0.9 * references + 0.1 * np.roll(references.sum(axis=0), 5, axis=0) + noise


def museval_scores(museval, references, estimates, rate, window_s=1.0, hop_s=1.0):
    window, hop = int(window_s * rate), int(hop_s * rate)
    scores = museval.metrics.bss_eval(references, estimates, window=window, hop=hop)[:4]
    return dict(zip(METRICS, scores))


def assert_equal_scores(found, expected):
    assert tuple(found) == METRICS
    for metric in METRICS:
        ours, theirs = found[metric], expected[metric]
        assert ours.shape == theirs.shape and ours.dtype == np.float64
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=metric)
        exact = theirs < MAX_SCORE_DB
        np.testing.assert_allclose(
            ours[exact], theirs[exact], rtol=0, atol=TOLERANCE_DB, err_msg=metric
        )
        assert (ours[theirs >= MAX_SCORE_DB] > MAX_SCORE_DB - 1).all(), metric


# --- equal to museval ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_stems, n_channels", [(2, 1), (2, 2), (4, 1)])
def test_equals_museval(museval, n_stems, n_channels):
    references = music(n_stems, n_channels, seconds=2.3)
    estimates = separated(references)
    expected = museval_scores(museval, references, estimates, RATE)
    assert expected["SDR"].shape == (n_stems, 2)  # the trailing 0.3 seconds are not scored
    assert_equal_scores(bss_eval(references, estimates, RATE), expected)


@pytest.mark.parametrize("window_s, hop_s", [(1.0, 0.5), (0.3, 0.7), (2.0, 2.0)])
def test_equals_museval_for_other_windows(museval, window_s, hop_s):
    references = music(2, 1, seconds=2.0)
    estimates = separated(references)
    expected = museval_scores(museval, references, estimates, RATE, window_s, hop_s)
    assert_equal_scores(bss_eval(references, estimates, RATE, window_s, hop_s), expected)


def test_a_track_shorter_than_a_window_is_one_frame_as_in_museval(museval):
    references = music(2, 2, seconds=0.3)
    estimates = separated(references)
    scores = bss_eval(references, estimates, RATE)
    assert scores["SDR"].shape == (2, 1)
    assert_equal_scores(scores, museval_scores(museval, references, estimates, RATE))


def test_equals_museval_for_the_mixture_and_a_perfect_estimate(museval):
    references = music(2, 1)
    mixture = np.stack([references.sum(axis=0)] * 2)
    track = BSSEval(references, RATE)
    for estimates in (mixture, mixture / 4, references):
        assert_equal_scores(
            track.score(estimates), museval_scores(museval, references, estimates, RATE)
        )


def test_equals_museval_where_a_band_is_empty(museval):
    """Lossy coding empties the top of the spectrum; only the rounding to 16 bits keeps the normal equations regular."""
    spectrum = np.fft.rfft(music(2, 1), axis=1)
    spectrum[:, int(0.7 * spectrum.shape[1]) :] = 0
    references = np.round(np.fft.irfft(spectrum, axis=1) * 2**15) / 2**15
    estimates = separated(references)
    assert_equal_scores(
        bss_eval(references, estimates, RATE), museval_scores(museval, references, estimates, RATE)
    )


def test_silent_frames_are_nan_where_museval_has_nan(museval):
    references = music(2, 2, seconds=5.0)
    estimates = separated(references)
    references[0, 1 * RATE : 2 * RATE] = 0
    estimates[1, 2 * RATE : 3 * RATE] = 0
    references[1, 3 * RATE : 4 * RATE, 1] = -references[
        1, 3 * RATE : 4 * RATE, 0
    ]  # left = -right counts as silent
    estimates[0, 4 * RATE : 5 * RATE - 1] = 0  # one sample short of silence
    scores = bss_eval(references, estimates, RATE)
    assert_equal_scores(scores, museval_scores(museval, references, estimates, RATE))
    np.testing.assert_array_equal(np.isnan(scores["SDR"]), [[False, True, True, True, False]] * 2)


def test_equals_museval_on_musdb(museval):
    """Two excerpts of MUSDB18, a vocal estimate with leakage and noise: one in stereo, one in mono."""
    root = os.environ.get("MUSDB_PATH")
    if not root:
        pytest.skip("MUSDB_PATH does not name a MUSDB18 folder")
    import musdb

    for track, n_channels in zip(musdb.DB(root=root, subsets="test"), (2, 1)):
        track.chunk_duration = 4
        mixture, *_, vocals = track.stems[..., :n_channels]
        references = np.stack([vocals, mixture - vocals])
        estimates = separated(references)
        expected = museval_scores(museval, references, estimates, track.rate)
        assert_equal_scores(bss_eval(references, estimates, track.rate), expected)


def test_the_referee_answers_as_museval_and_where_museval_raises(museval):
    references = music(3, 2)
    estimates = separated(references)
    assert_equal_scores(
        MusevalScorer(references, RATE).score(estimates),
        museval_scores(museval, references, estimates, RATE),
    )
    few = MusevalScorer(references, RATE).score(estimates[[2, 0]], [2, 0])
    np.testing.assert_array_equal(
        few["SAR"], museval_scores(museval, references, estimates, RATE)["SAR"][[2, 0]]
    )
    estimates[1] = 0
    assert all(
        np.isnan(values).all()
        for values in MusevalScorer(references, RATE).score(estimates).values()
    )


def test_where_museval_stops_the_referee_has_no_score(museval, monkeypatch):
    """Normal equations that are exactly singular: museval then looks for an exception that numpy 2 has elsewhere."""

    def singular(*_):
        raise np.linalg.LinAlgError("Singular matrix")

    references = music(2, 1)
    monkeypatch.setattr("numpy.linalg.solve", singular)
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(AttributeError):
            museval_scores(museval, references, separated(references), RATE)
    scores = MusevalScorer(references, RATE).score(separated(references))
    assert scores["SDR"].shape == (2, 3) and np.isnan(scores["SDR"]).all()


def test_without_ffmpeg_the_referee_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="ffmpeg and ffprobe.*scorer=bss_eval"):
        MusevalScorer(music(2, 1), RATE)


def test_some_stems_score_as_among_all():
    references = music(3, 1)
    estimates = separated(references)
    every, some = (
        bss_eval(references, estimates, RATE),
        BSSEval(references, RATE).score(estimates[[2, 0]], [2, 0]),
    )
    for metric in METRICS:
        np.testing.assert_allclose(some[metric], every[metric][[2, 0]], atol=1e-9)


def test_references_are_prepared_once_for_several_estimates():
    references = music(2, 1)
    track = BSSEval(references, RATE)
    for seed in (1, 2):
        estimates = separated(references, seed)
        alone = bss_eval(references, estimates, RATE)
        for metric, values in track.score(estimates).items():
            np.testing.assert_array_equal(values, alone[metric])


# --- known answers ------------------------------------------------------------------------------------------------


def test_sdr_of_known_noise():
    levels_db = np.array([[-5.0, 0.0, 20.0], [10.0, 3.0, 60.0]])
    references = music(2, 2, seconds=3.0)
    noise = np.random.default_rng(0).standard_normal(references.shape)
    frames = (2, 3, RATE, 2)  # stems, frames, samples, channels
    signal_energy = (references.reshape(frames) ** 2).sum(axis=(2, 3))
    noise_energy = (noise.reshape(frames) ** 2).sum(axis=(2, 3))
    gains = np.sqrt(signal_energy / noise_energy * 10 ** (-levels_db / 10))
    estimates = references + noise * np.repeat(gains, RATE, axis=1)[..., None]
    np.testing.assert_allclose(bss_eval(references, estimates, RATE)["SDR"], levels_db, atol=1e-9)


def test_a_quarter_of_the_mixture_has_the_isr_that_gives_it_away():
    references = np.random.default_rng(0).standard_normal((2, 3 * RATE, 1))
    quarter_db = 20 * np.log10(4 / 3)  # |s| / |s - s / 4|
    assert round(quarter_db, 2) == 2.50
    np.testing.assert_allclose(
        bss_eval(references, references / 4, RATE)["ISR"], quarter_db, atol=1e-9
    )
    mixture = np.stack([references.sum(axis=0)] * 2)
    scores = bss_eval(references, mixture / 4, RATE)
    np.testing.assert_allclose(
        scores["ISR"], quarter_db, atol=0.2
    )  # the two noises correlate a little
    assert (scores["SAR"] > 200).all()  # a mixture has interference and no artifacts


def test_perfect_estimate():
    references = music(2, 1)
    scores = bss_eval(references, references, RATE)
    assert np.isposinf(scores["SDR"]).all()
    assert all((scores[metric] > 200).all() for metric in METRICS)


@pytest.mark.parametrize("silent", ["reference", "estimate"])
def test_a_wholly_silent_stem_makes_every_frame_nan(silent):
    references = music(2, 2)
    estimates = separated(references)
    (references if silent == "reference" else estimates)[1] = 0
    for values in bss_eval(references, estimates, RATE).values():
        assert values.shape == (2, 3) and np.isnan(values).all()


def test_identical_channels_score_as_mono():
    """Left = right makes the normal equations singular: there museval stops."""
    references = music(2, 1)
    estimates = separated(references)
    mono = bss_eval(references, estimates, RATE)
    stereo = bss_eval(np.repeat(references, 2, axis=2), np.repeat(estimates, 2, axis=2), RATE)
    for metric in METRICS:
        np.testing.assert_allclose(stereo[metric], mono[metric], atol=TOLERANCE_DB)


def test_a_centred_stem_among_stereo_stems_scores_as_in_museval(museval):
    """Left = right in one stem, and an empty band that makes the equations ill-conditioned: a ridge would show."""
    spectrum = np.fft.rfft(music(3, 2), axis=1)
    spectrum[:, int(0.6 * spectrum.shape[1]) :] = 0
    references = np.round(np.fft.irfft(spectrum, axis=1) * 2**16) / 2**16
    references[1, :, 1] = references[1, :, 0]
    estimates = separated(references)
    expected = museval_scores(museval, references, estimates, RATE)
    assert_equal_scores(bss_eval(references, estimates, RATE), expected)


def test_a_channel_that_is_a_multiple_of_the_other_scores_as_mono():
    references = music(2, 1)
    estimates = separated(references)
    mono, panned = bss_eval(references, estimates, RATE), np.array([1.0, 0.5])
    stereo = bss_eval(references * panned, estimates * panned, RATE)
    for metric in METRICS:
        np.testing.assert_allclose(stereo[metric], mono[metric], atol=TOLERANCE_DB)


def test_identical_references_have_scores():
    references = np.repeat(music(1, 1), 2, axis=0)
    scores = bss_eval(references, separated(references), RATE)
    assert all(np.isfinite(values).all() for values in scores.values())
    assert (
        scores["SIR"] > MAX_SCORE_DB
    ).all()  # nothing can interfere that the own reference does not explain


def test_utterance_sdr():
    reference = music(1, 2)[0]
    assert utterance_sdr(reference, 0.9 * reference) == pytest.approx(20)
    assert utterance_sdr(reference, np.zeros_like(reference)) == 0
    assert utterance_sdr(reference, reference) == np.inf
    assert np.isnan(utterance_sdr(np.zeros_like(reference), reference))
    one_frame = bss_eval(
        reference[None], separated(reference[None]), RATE, window_s=len(reference) / RATE
    )
    assert utterance_sdr(reference, separated(reference[None])[0]) == pytest.approx(
        one_frame["SDR"].item()
    )


def test_si_sdr():
    reference, noise = np.random.default_rng(0).standard_normal((2, RATE, 2))
    noise -= np.sum(noise * reference) / np.sum(reference**2) * reference
    noise *= np.sqrt(np.sum(reference**2) / np.sum(noise**2))  # orthogonal, of the same energy
    estimate = reference + 0.1 * noise
    assert si_sdr(reference, estimate) == pytest.approx(20)
    assert si_sdr(reference, -3 * estimate) == pytest.approx(20)  # no scale and no sign
    assert si_sdr(2 * reference, estimate) == pytest.approx(20)
    assert si_sdr(reference, noise) < -250
    assert si_sdr(reference, reference) == np.inf
    assert si_sdr(reference, 0.3 * reference) > 250
    assert np.isnan(si_sdr(np.zeros_like(reference), estimate))
    assert np.isnan(si_sdr(reference, np.zeros_like(reference)))


# --- a whole track: the rules for what has no score ----------------------------------------------------------------------


def test_the_scores_of_a_track_are_those_of_its_estimates():
    references = music(2, 2)
    estimates = {"a": separated(references), "b": separated(references, seed=2)}
    found = score_track(references, estimates, RATE)
    for name, estimate in estimates.items():
        assert_equal_scores(
            {metric: found[name][metric] for metric in METRICS},
            bss_eval(references, estimate, RATE),
        )
        assert found[name]["utterance_SDR"][1] == utterance_sdr(references[1], estimate[1])
        assert not np.any(found[name]["silent"])


def test_a_stem_that_is_silent_throughout_costs_the_others_nothing():
    references = music(3, 2)
    references[1] = 0
    estimates = separated(references)
    found = score_track(references, {"model": estimates}, RATE)["model"]
    alone = bss_eval(references[[0, 2]], estimates[[0, 2]], RATE)
    for metric in METRICS:
        np.testing.assert_array_equal(found[metric][[0, 2]], alone[metric])
        assert np.isnan(found[metric][1]).all()
    assert np.isnan(found["utterance_SDR"][1]) and found["silent"][0].all(axis=1).tolist() == [
        False,
        True,
        False,
    ]


def test_a_silent_estimate_has_an_utterance_sdr_of_zero():
    references = music(3, 1)
    estimates = separated(references)
    usual = score_track(references, {"model": estimates}, RATE)["model"]
    estimates[0] = 0
    found = score_track(references, {"model": estimates}, RATE)["model"]
    assert (
        found["utterance_SDR"][0] == 0
        and np.isnan(found["SI_SDR"][0])
        and np.isnan(found["SDR"][0]).all()
    )
    np.testing.assert_allclose(found["SIR"][1:], usual["SIR"][1:], atol=1e-9)


def test_left_minus_right_is_silent_and_a_frame_of_it_is_lost():
    references = music(2, 2)
    references[0, RATE : 2 * RATE, 1] = -references[0, RATE : 2 * RATE, 0]
    found = score_track(references, {"model": separated(references)}, RATE)["model"]
    assert np.isnan(found["SDR"]).tolist() == [[False, True, False]] * 2
    assert (
        found["silent"][0].tolist() == [[False, True, False], [False] * 3]
        and not found["silent"][1].any()
    )
    references[0, :, 1] = -references[0, :, 0]
    found = score_track(references, {"model": separated(references)}, RATE)["model"]
    assert (
        np.isnan(found["SDR"][0]).all()
        and np.isfinite(found["SDR"][1]).all()
        and np.isfinite(found["utterance_SDR"]).all()
    )


def test_nothing_sounds():
    found = score_track(np.zeros((2, RATE, 1)), {"model": np.ones((2, RATE, 1))}, RATE)["model"]
    assert np.isnan(found["SDR"]).all() and np.isnan(found["utterance_SDR"]).all()


def test_disagreement_by_hand():
    ours, theirs = (
        np.array([1.0, 2.0, np.nan, 120.0, 20.0, np.nan]),
        np.array([1.0, 2.5, np.nan, 150.0, 120.0, 3.0]),
    )
    assert disagreement(ours, theirs) == (3, 100.0, 2, 1)
    assert np.isnan(disagreement(np.array([np.inf]), np.array([np.inf]))[1])


def test_a_broken_estimate_is_named():
    references = music(2, 1)
    estimates = separated(references)
    with pytest.raises(
        ValueError, match=r"the model: the estimates have shape \(2, 26399, 1\).*Trim or pad"
    ):
        score_track(references, {"the model": estimates[:, 1:]}, RATE)
    estimates[1, 5] = np.nan
    with pytest.raises(ValueError, match="the model: estimates hold 1 NaN.*diverged"):
        score_track(references, {"fine": separated(references), "the model": estimates}, RATE)


# --- errors say what was found, what was expected and what to do --------------------------------------------------


def test_wrong_input_is_refused():
    references = np.ones((2, RATE, 1))
    broken = references.copy()
    broken[0, :3] = np.nan
    cases = [
        (
            references[..., 0],
            references,
            r"references have shape \(2, 8000\); expected \(stems, samples, channels\)",
        ),
        (references, references[..., 0], r"estimates have shape \(2, 8000\).*channel axis"),
        (references[:0], references[:0], r"none of them empty"),
        (
            references,
            references[:, :-1],
            r"estimates have shape \(2, 7999, 1\).*\(2, 8000, 1\).*Trim or pad",
        ),
        (references, broken, r"estimates hold 3 NaN or infinite samples of 16000.*diverged"),
        (references * np.inf, references, r"references hold 16000 NaN"),
    ]
    for wrong_references, wrong_estimates, message in cases:
        with pytest.raises(ValueError, match=message):
            bss_eval(wrong_references, wrong_estimates, RATE)
    with pytest.raises(ValueError, match="a hop of 0 samples"):
        bss_eval(references, references, RATE, hop_s=0)


@pytest.mark.parametrize("score", [utterance_sdr, si_sdr])
def test_wrong_signals_are_refused(score):
    signal = np.ones((100, 2))
    for reference, estimate, message in [
        (signal[:, 0], signal[:, 0], r"shape \(100,\); expected \(samples, channels\)"),
        (signal, signal[:, :1], r"shape \(100, 1\).*\(100, 2\)"),
        (signal, signal * np.nan, "200 NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(reference, estimate)
