import numpy as np
import pandas as pd
import pytest

from mss_utils.config import MODELS
from mss_utils.listening import cut_excerpt
from mss_utils.listening.excerpts import choose_tracks, equal_score_pair, excerpt_scores

RATE = 16000


def make_versions():
    """Four seconds of noise at different levels; the target is loud in the third second."""
    noise = np.random.default_rng(0).standard_normal((4, 1, 4 * RATE)).astype(np.float32)
    levels = np.array([0.1, 0.01, 0.03, 0.003], np.float32)[:, None, None]
    versions = dict(zip(("mixture", "reference", *MODELS[:2]), levels * noise, strict=True))
    versions["reference"][:, 2 * RATE : 3 * RATE] *= 10
    return versions


def test_tracks_are_chosen_by_rule():
    scores = dict(a=(0, 1, 90), b=(2, 2, 2), c=(5, -9, -9), d=(3, 3, 3), e=(np.nan,) * 3)
    rows = [(track, *row) for track in scores for row in zip(MODELS, scores[track], strict=True)]
    table = pd.DataFrame(rows, columns=["track", "model", "SDR"]).assign(target="piano", frames=10)
    table.loc[table["track"] == "d", "frames"] = 100
    others = [table.assign(SDR=50, model="irm"), table.assign(SDR=50, target="bass")]
    attack = pd.DataFrame(dict(a=20, d=90, e=99).items(), columns=["track", "n_onsets"])
    attack = attack.assign(target="piano")
    chosen = choose_tracks(pd.concat([table, *others]), attack, "piano")
    assert chosen.pop("most onsets") == "a"  # per second, and e has no score
    assert chosen == {"best": "d", "median": "b", "worst": "c", "widest disagreement": "a"}
    same = choose_tracks(table.query("track == 'b'"), attack, "piano")
    assert list(same) == ["best", "median", "worst"]  # no onset, no disagreement
    with pytest.raises(ValueError, match="tracks.csv"):
        choose_tracks(table.query("track == 'e'"), attack, "piano")


def test_pair_has_equal_sdr_and_different_errors():
    a, b1, b2 = MODELS
    rows = [("t", a, 5.0, 12, 6), ("t", b1, 5.1, 6, 12), ("t", b2, 9.0, 30, 2)]
    rows += [("u", a, 5.0, 9, 8), ("u", b1, 5.1, 8, 9), ("u", b2, 5.1, 8, 9)]
    table = pd.DataFrame(rows, columns=["track", "model", "SDR", "SIR", "SAR"])
    table = table.assign(target="piano", seed=0)
    assert equal_score_pair(table, "piano") == ("t", b1, a)
    assert equal_score_pair(table.query("track == 't' and model != @b1"), "piano") is None


def test_excerpt_is_loudest_and_has_one_gain():
    versions = make_versions()
    versions["unet"] = -versions["mixture"]  # its residual is twice the mixture
    excerpt = cut_excerpt(versions, "track", "piano", RATE, 1.0)
    assert excerpt.start_s == pytest.approx(2.0, abs=0.01)
    peak = max(np.abs(excerpt.versions["mixture"] - x).max() for x in excerpt.versions.values())
    assert peak == pytest.approx(10 ** (-1 / 20), rel=1e-5)
    start, gain = round(excerpt.start_s * RATE), 10 ** (excerpt.gain_db / 20)
    for name, audio in excerpt.versions.items():
        np.testing.assert_allclose(audio, gain * versions[name][:, start : start + RATE], rtol=1e-4)


def test_scores_are_those_of_the_excerpt():
    versions = make_versions()
    versions["unet"] = np.float32(0.9) * versions["reference"]
    scores = excerpt_scores(versions, RATE)
    assert set(scores) == {"mixture", "unet", "demucs_lstm"}
    assert scores["unet"]["SDR"] == pytest.approx(20, abs=0.1)
