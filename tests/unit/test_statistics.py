import math

import numpy as np
import pandas as pd
import pytest

from mss_utils.config import MODELS
from mss_utils.evaluation.bsseval import TRACK_METRICS
from mss_utils.evaluation.statistics import (
    compare,
    detectable_difference,
    holm,
    median_interval,
    paired_sentence,
    summarise,
)

DIFFERENCES = [0.5, 0.6, 0.7, 0.4, 0.6, 0.8, 0.5, 0.7]


def track_table(differences, seeds=1):
    """Tracks on which B1 is `differences` dB above A in every metric; B0 and B2 equal A."""
    rows = []
    for i, difference in enumerate(differences):
        scores = dict.fromkeys(MODELS, 3.0 + i) | dict(demucs_lstm=3.0 + i + difference)
        for seed in range(seeds):
            for model, value in scores.items():
                key = dict(target="piano", track=f"t{i}", model=model, seed=seed)
                key["references"] = "target+residual"
                rows.append(key | dict.fromkeys(TRACK_METRICS, value))
    return pd.DataFrame(rows)


def sdr_rows(table):
    return table.query("metric == 'SDR'").reset_index(drop=True)


def test_paired_differences_of_known_numbers():
    table = sdr_rows(compare(track_table(DIFFERENCES))).set_index(["a", "b"])
    row = table.loc["demucs_lstm", "unet"]
    assert row["median_difference"] == pytest.approx(0.6)
    assert row["ci_low"] > 0 and row["tracks"] == 8 and row["seeds"] == 1
    assert row["p_wilcoxon"] == pytest.approx(2 / 2**8)
    assert row["p_corrected"] == pytest.approx(6 / 2**8), "two pairs are equal on all tracks"
    assert math.isnan(table.loc["demucs_attention", "unet"]["p_wilcoxon"])


def test_sentences_of_paired_differences():
    rows = sdr_rows(compare(track_table(DIFFERENCES)))
    scope = "in SDR for these trained weights"
    counts = "8 tracks, 1 seed)."
    better = paired_sentence(rows.iloc[2])
    assert better.startswith(f"B1 is 0.60 dB better than A {scope} (95 % CI 0.")
    assert better.endswith(counts)
    assert paired_sentence(rows.iloc[3]) == (
        f"No difference found between B2 and A {scope}: B2 - A is +0.00 dB (95 % CI +0.00 to "
        f"+0.00 dB, {counts} 0.00 dB would be found with a probability of 80 %."
    )
    doubtful = paired_sentence(dict(rows.iloc[2]) | dict(p_corrected=0.07))
    assert doubtful.endswith("; the corrected Wilcoxon test does not confirm it.")
    three = paired_sentence(sdr_rows(compare(track_table(DIFFERENCES, seeds=3))).iloc[2])
    assert "trained weights" not in three and "3 seeds" in three
    one = paired_sentence(sdr_rows(compare(track_table([0.5]))).iloc[2])
    assert one == "B1 and A in SDR: no interval, 1 track, 1 seed (at least 6 tracks)."


def test_summary_of_known_numbers():
    tracks = track_table([0.0] * 7)
    row = sdr_rows(summarise(tracks)).iloc[0]
    assert (row["median"], row["mean"], row["tracks"], row["seeds"]) == (6.0, 6.0, 7, 1)
    assert 3.0 <= row["ci_low"] < 6 < row["ci_high"] <= 9
    tracks.loc[tracks["track"] == "t0", "SDR"] = np.inf  # scores above 80 dB count as 80 dB
    assert sdr_rows(summarise(tracks)).iloc[0]["mean"] == pytest.approx((80 + 39) / 7)
    assert (sdr_rows(compare(tracks))["median_difference"] == 0).all()


@pytest.mark.parametrize("n_seeds, seed_sd", [(1, 0.0), (3, 3.0)])
def test_interval_covers_the_median_as_stated(n_seeds, seed_sd):
    rng, covered = np.random.default_rng(1), []
    for _ in range(100):
        seeds = seed_sd * rng.standard_normal((1, n_seeds))
        low, high = median_interval(rng.standard_normal((25, 1)) + seeds)
        covered.append(low <= 0 <= high)
    assert 0.88 < np.mean(covered) <= 1
    assert np.isnan(median_interval(np.arange(5.0))).all()


def test_seeds_are_not_tracks_but_widen_the_interval():
    rng = np.random.default_rng(0)
    tracks, seeds = rng.standard_normal((30, 1)), 3 * rng.standard_normal((1, 3))
    width = np.ptp(median_interval(tracks))
    assert np.ptp(median_interval(np.tile(tracks, 3))) == pytest.approx(width)
    assert np.ptp(median_interval(tracks + seeds)) > 2 * width
    two_seeds = (tracks + seeds)[:, :2]  # too few for a margin
    assert np.ptp(median_interval(two_seeds)) == pytest.approx(width)


def test_holm_by_hand():
    p_values = pd.Series([0.01, 0.04, math.nan, 0.03, 0.9])
    expected = [0.04, 0.09, math.nan, 0.09, 0.9]
    assert holm(p_values).tolist() == pytest.approx(expected, nan_ok=True)


def test_detectable_difference_by_hand():
    row = dict(ci_low=-1, ci_high=1)  # a standard error of 1 / 1.96
    assert detectable_difference(row) == pytest.approx((1.96 + 0.84) / 1.96, rel=0.002)
