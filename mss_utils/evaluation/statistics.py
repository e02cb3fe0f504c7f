"""Statistics of the table `tracks`: medians with intervals, paired differences, sentences.

Scores above 80 dB count as 80 dB: what is above is rounding noise. Taught in notebook 05.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from mss_utils.config import MODEL_LETTERS
from mss_utils.evaluation.bsseval import MAX_SCORE_DB, TRACK_METRICS

PAIRS = (  # first what sequence modelling is worth, then the comparison of the models
    ("demucs_lstm", "demucs_framewise"),
    ("demucs_attention", "demucs_framewise"),
    ("demucs_lstm", "unet"),
    ("demucs_attention", "unet"),
    ("demucs_attention", "demucs_lstm"),
)
MIN_SEEDS = 3  # with fewer, a difference is one of trained weights, not of architectures
MIN_TRACKS = 6  # the range of fewer tracks covers their median less often than 95 times in 100
N_BOOTSTRAP = 10_000


def summarise(tracks: pd.DataFrame) -> pd.DataFrame:
    """Make the table `summary` of the table `tracks`: median with interval, and mean."""
    rows = []
    key = ["references", "target", "model"]
    for values, group in tracks.groupby(key, sort=False):
        for metric in TRACK_METRICS:
            scores = pivot_by_seed(group, values[-1], metric)
            row = dict(zip(key, values, strict=True)) | median_with_interval(scores)
            rows.append(row | dict(metric=metric, mean=scores.mean(axis=1).mean()))
    columns = [*key, "metric", "median", "mean", "ci_low", "ci_high", "tracks", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def compare(tracks: pd.DataFrame, pairs: Sequence[tuple[str, str]] = PAIRS) -> pd.DataFrame:
    """Make the table `paired` of the table `tracks`: differences a - b of pairs of models (a, b).

    They are taken seed by seed and averaged on each track. The p-value is that of the Wilcoxon
    signed-rank test, corrected by Holm's method over the pairs of a target and metric.
    """
    rows = []
    for target, group in tracks.groupby("target", sort=False):
        for metric, (a, b) in itertools.product(TRACK_METRICS, pairs):
            differences = pivot_by_seed(group, a, metric) - pivot_by_seed(group, b, metric)
            means = differences.mean(axis=1).dropna()
            p_value = stats.wilcoxon(means)[1] if means.any() else np.nan
            row = dict(target=target, a=a, b=b, metric=metric) | median_with_interval(differences)
            rows.append(row | dict(median_difference=row["median"], p_wilcoxon=p_value))
    columns = "target a b metric median_difference ci_low ci_high p_wilcoxon p_corrected"
    table = pd.DataFrame(rows, columns=[*columns.split(), "tracks", "seeds"])
    family = table.groupby(["target", "metric"])["p_wilcoxon"]
    return table.assign(p_corrected=family.transform(holm))


def pivot_by_seed(table: pd.DataFrame, model: str, value: str) -> pd.DataFrame:
    """Arrange a column of a model in a row per track and a column per seed, at most 80 dB."""
    rows = table[table["model"] == model]
    wide = rows.pivot_table(index="track", columns="seed", values=value, dropna=False)
    return wide.clip(upper=MAX_SCORE_DB)


def median_with_interval(values: pd.DataFrame) -> dict:
    """Compute median, ci_low, ci_high, tracks and seeds of a table from `pivot_by_seed`."""
    values = values.dropna(how="all")
    low, high = median_interval(values.to_numpy())
    counts = dict(tracks=len(values), seeds=values.shape[1])
    return dict(median=values.mean(axis=1).median(), ci_low=low, ci_high=high) | counts


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Compute the 95 % confidence interval of the median over tracks; NaN for fewer than 6 tracks.

    Values have the shape (tracks,) or (tracks, seeds). Seeds are averaged on each track. Over
    tracks it is the percentile bootstrap interval (B. Efron, "Bootstrap methods: another look at
    the jackknife", Annals of Statistics 7(1), 1979). From three seeds on, the interval of Student's
    t for the mean over seeds is added to either side as the root of the sum of squares (G. Zou,
    A. Donner, "Construction of confidence limits about effect measures", Statistics in Medicine
    27(10), 2008).
    """
    if len(values) < MIN_TRACKS:
        return np.nan, np.nan
    values = np.reshape(values, (len(values), -1))
    n_tracks, n_seeds = values.shape
    means, tail = np.nanmean(values, axis=1), 0.025
    drawn = np.random.default_rng(0).integers(n_tracks, size=(N_BOOTSTRAP, n_tracks))
    low, high = np.quantile(np.median(means[drawn], axis=1), [tail, 1 - tail])
    if n_seeds >= MIN_SEEDS:
        centre = np.median(means)
        standard_error = stats.sem(np.nanmedian(values, axis=0))
        seed_margin = standard_error * stats.t.ppf(1 - tail, n_seeds - 1)
        low = centre - np.hypot(centre - low, seed_margin)
        high = centre + np.hypot(high - centre, seed_margin)
    return float(low), float(high)


def holm(p_values: pd.Series) -> pd.Series:
    """Correct p-values by Holm's step-down method (Holm, 1979); NaN does not count."""
    p = p_values.dropna().sort_values()
    corrected = (p * np.arange(len(p), 0, -1)).clip(upper=1).cummax()
    return corrected.reindex(p_values.index)


def detectable_difference(row: pd.Series | Mapping, power: float = 0.8) -> float:
    """Return the true difference in dB that would be found with a probability of `power`.

    Found means that the 95 % interval, 1.96 standard errors to either side, excludes zero: for
    80 % it takes 1.96 + 0.84 standard errors (J. Cohen, "Statistical Power Analysis for the
    Behavioral Sciences", 1988).
    """
    reach = stats.norm.ppf(0.975)
    return float((row["ci_high"] - row["ci_low"]) / 2 * (reach + stats.norm.ppf(power)) / reach)


def paired_sentence(row: pd.Series | Mapping) -> str:
    """Describe a row of the table `paired` in a sentence.

    There is a difference if the interval excludes zero; the corrected test may disagree.
    """
    a, b = MODEL_LETTERS[row["a"]], MODEL_LETTERS[row["b"]]
    low, high, difference = row["ci_low"], row["ci_high"], row["median_difference"]
    metric, counts = row["metric"].replace("_", " "), format_counts(row)
    if np.isnan(low):
        return f"{a} and {b} in {metric}: no interval, {counts} (at least {MIN_TRACKS} tracks)."
    scope = f"in {metric}" + ("" if row["seeds"] >= MIN_SEEDS else " for these trained weights")
    confirmed = row["p_corrected"] < 0.05
    if low <= 0 <= high:
        doubt = "; the corrected Wilcoxon test finds a difference" if confirmed else ""
        return (
            f"No difference found between {a} and {b} {scope}: {a} - {b} is "
            f"{difference:+.2f} dB (95 % CI {low:+.2f} to {high:+.2f} dB, {counts}). "
            f"{detectable_difference(row):.2f} dB would be found with a probability of 80 %{doubt}."
        )
    if high < 0:
        a, b, low, high = b, a, -high, -low
    doubt = "" if confirmed else "; the corrected Wilcoxon test does not confirm it"
    interval = f"95 % CI {low:.2f} to {high:.2f} dB, {counts}"
    return f"{a} is {abs(difference):.2f} dB better than {b} {scope} ({interval}){doubt}."


def format_counts(row: pd.Series | Mapping) -> str:
    """Format the numbers of tracks and seeds, as in "3 tracks, 1 seed"."""
    tracks, seeds = row["tracks"], row["seeds"]
    plural = ["" if count == 1 else "s" for count in (tracks, seeds)]
    return f"{tracks} track{plural[0]}, {seeds} seed{plural[1]}"
