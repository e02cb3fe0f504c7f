"""What the scores of tracks say: medians with their intervals, paired differences, corrected tests, and sentences.

    table of tracks --> summary and paired differences --> sentences

Taught in notebook 05.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from mss_utils.config import MODEL_LETTERS
from mss_utils.evaluation.bsseval import MAX_SCORE_DB, TRACK_METRICS

PAIRS = (("demucs_lstm", "unet"), ("demucs_attention", "unet"), ("demucs_attention", "demucs_lstm"))
MIN_SEEDS = 3  # with fewer, a difference is one of trained weights, not of architectures
MIN_TRACKS = 6  # of fewer, even the range from the lowest to the highest holds the median less often than 95 times in 100
N_BOOTSTRAP = 10_000


def summarise(tracks: pd.DataFrame) -> pd.DataFrame:
    """Median over tracks with its bootstrap 95 % interval, and mean over tracks, of every metric; see `median_interval`.

    The value of a track is the median over its frames, so these are the two aggregations in use: median and mean of medians.
    Scores above 80 dB count as 80 dB: what is beyond is rounding noise.
    """
    rows = []
    for (references, target, model), group in tracks.groupby(
        ["references", "target", "model"], sort=False
    ):
        for metric in TRACK_METRICS:
            values = scores_by_seed(group, metric)
            low, high = median_interval(values.to_numpy())
            means = values.mean(axis=1)
            rows.append(
                dict(
                    references=references,
                    target=target,
                    model=model,
                    metric=metric,
                    median=means.median(),
                    mean=means.mean(),
                    ci_low=low,
                    ci_high=high,
                    tracks=len(values),
                    seeds=group["seed"].nunique(),
                )
            )
    return pd.DataFrame(rows)


def compare(tracks: pd.DataFrame, pairs: Collection[tuple[str, str]] = PAIRS) -> pd.DataFrame:
    """Paired differences a - b over the tracks: median, bootstrap 95 % interval, Wilcoxon signed-rank p, Holm-corrected.

    Seeds are compared one by one, then averaged on each track; the test is one of tracks, given these trainings. The correction
    covers all `pairs` of one target and metric. Scores above 80 dB count as 80 dB.
    """
    columns = [
        "target",
        "a",
        "b",
        "metric",
        "median_difference",
        "ci_low",
        "ci_high",
        "p_wilcoxon",
        "p_corrected",
        "tracks",
        "seeds",
    ]
    rows = []
    for target, metric in itertools.product(tracks["target"].unique(), TRACK_METRICS):
        of = lambda model: scores_by_seed(
            tracks[(tracks["target"] == target) & (tracks["model"] == model)], metric
        )
        family = [
            dict(target=target, a=a, b=b, metric=metric) | _difference(of(a) - of(b))
            for a, b in pairs
        ]
        for row, corrected in zip(family, holm([row["p_wilcoxon"] for row in family])):
            rows.append(row | dict(p_corrected=corrected))
    return pd.DataFrame(rows, columns=columns)


def scores_by_seed(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric with a row a track and a column a seed, at most 80 dB; tracks without any score are left out."""
    return (
        rows.pivot(index="track", columns="seed", values=metric)
        .dropna(how="all")
        .clip(upper=MAX_SCORE_DB)
    )


def _difference(values: pd.DataFrame) -> dict:
    """Statistics of paired differences, a row a track and a column a seed."""
    found, means = median_with_interval(values), values.mean(axis=1).dropna()
    p = stats.wilcoxon(means).pvalue if len(means) and means.any() else np.nan
    return dict(median_difference=found.pop("median"), p_wilcoxon=p) | found


def median_with_interval(values: pd.DataFrame) -> dict:
    """Median over tracks of `values`, a row a track and a column a seed, with its interval and the counts; tracks without a value are left out."""
    values = values.dropna(how="all")
    low, high = median_interval(values.to_numpy())
    return dict(
        median=values.mean(axis=1).median(),
        ci_low=low,
        ci_high=high,
        tracks=len(values),
        seeds=values.shape[1],
    )


def median_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median over tracks of `values`, `(tracks,)` or `(tracks, seeds)`; NaN for fewer than six tracks.

    Seeds are no further tracks: they are averaged on each track. Over tracks it is the percentile bootstrap interval (B. Efron,
    "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1), 1979). From three seeds on, the interval of
    Student's t for the mean over seeds of their medians is added to either side, as the root of the sum of squares (G. Zou,
    A. Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27(10), 2008): then it holds the
    luck of training as well as the choice of songs.
    """
    if len(values) < MIN_TRACKS:
        return np.nan, np.nan
    values = np.reshape(values, (len(values), -1))
    n_tracks, n_seeds = values.shape
    means, tail = np.nanmean(values, axis=1), (1 - confidence) / 2
    drawn = np.random.default_rng(0).integers(n_tracks, size=(N_BOOTSTRAP, n_tracks))
    low, high = np.quantile(np.median(means[drawn], axis=1), [tail, 1 - tail])
    if n_seeds >= MIN_SEEDS:
        centre = np.median(means)
        luck = stats.sem(np.nanmedian(values, axis=0)) * stats.t.ppf(1 - tail, n_seeds - 1)
        low, high = centre - np.hypot(centre - low, luck), centre + np.hypot(high - centre, luck)
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values (Holm, 1979); NaN stays NaN and does not count."""
    p = np.asarray(p_values, float)
    corrected, largest = np.full(len(p), np.nan), 0.0
    tested = [index for index in np.argsort(p) if np.isfinite(p[index])]
    for rank, index in enumerate(tested):
        largest = max(largest, min(1.0, p[index] * (len(tested) - rank)))
        corrected[index] = largest
    return corrected.tolist()


def detectable_difference(row: pd.Series | Mapping, power: float = 0.8) -> float:
    """The smallest true difference in dB that would keep zero out of such an interval in `power` of all repetitions.

    A 95 % interval reaches 1.96 standard errors to either side; a difference of 1.96 + 0.84 standard errors is beyond its
    own reach with a probability of 80 %. Source: J. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 1988.
    """
    reach = stats.norm.ppf(0.975)
    return float((row["ci_high"] - row["ci_low"]) / 2 * (reach + stats.norm.ppf(power)) / reach)


def paired_sentence(row: pd.Series | Mapping, names: Mapping[str, str] | None = None) -> str:
    """One row of the paired table as a plain sentence; with fewer than three seeds it speaks of these trained weights.

    `names` is how a and b are called. A difference is one if its interval leaves out zero; the corrected test may disagree.
    """
    names = names or MODEL_LETTERS
    a, b = names[row["a"]], names[row["b"]]
    metric = row["metric"].replace("_", " ")
    where = format_counts(row)
    whose = "" if row["seeds"] >= MIN_SEEDS else " for these trained weights"
    if np.isnan(row["ci_low"]):
        return f"{a} and {b} cannot be compared in {metric}: {where} with a score of both, at least {MIN_TRACKS} tracks are needed."
    low, high, difference = row["ci_low"], row["ci_high"], row["median_difference"]
    confirmed = row["p_corrected"] < 0.05
    if low <= 0 <= high:
        found = f"{difference:+.2f} dB [{low:+.2f}, {high:+.2f}], {where}"
        enough = f"a difference of {detectable_difference(row):.2f} dB would have been found with a probability of 80 %"
        doubt = "; the corrected Wilcoxon test can" if confirmed else ""
        text = f"The data cannot tell {a} from {b} in {metric}{whose}: {found}; {enough}{doubt}."
    else:
        better, worse = (a, b) if difference > 0 else (b, a)
        size, near, far = abs(difference), *sorted((abs(low), abs(high)))
        doubt = "" if confirmed else "; the corrected Wilcoxon test does not confirm it"
        text = f"{better} is {size:.2f} dB better than {worse} in {metric}{whose} [{near:.2f}, {far:.2f}], {where}{doubt}."
    return text


def format_counts(row: pd.Series | Mapping) -> str:
    """ "3 tracks, 1 seed"."""
    return ", ".join(
        f"{row[things]} {things if row[things] != 1 else things[:-1]}"
        for things in ("tracks", "seeds")
    )
