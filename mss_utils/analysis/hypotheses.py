"""Hypotheses: labels, effects with intervals, and verdicts, from the tables of a run.

Every effect is defined so that the hypothesis predicts a positive value. The verdict is the first
of these that applies; the rule was fixed before the numbers were known:

    supported       the 95 % interval lies above zero, and at least three seeds agree
    not supported   the interval lies below zero, or within +-0.2 dB
    cannot tell     anything else
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from mss_utils.analysis.bottleneck import INTERVENTIONS
from mss_utils.analysis.phase import whole_band_rows
from mss_utils.analysis.repetition import CONDITIONS, LAGS_S, lags_s
from mss_utils.analysis.studies import data_gains
from mss_utils.config import MODEL_LETTERS, SEQUENCE_MODELS, Settings
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.evaluation.statistics import (
    MIN_SEEDS,
    format_counts,
    median_with_interval,
    pivot_by_seed,
)

NEGLIGIBLE_DB = 0.2
Effect = pd.DataFrame | str  # a row per track and a column per seed, or a verdict instead


def evaluate_hypotheses(settings: Settings, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compute the table `hypotheses` from tracks and the tables of `measurements`."""
    rows = []
    for target in tables["tracks"]["target"].unique():
        own = {name: table[table["target"] == target] for name, table in tables.items()}
        for id_, hypothesis, measure, values in _effects(settings, own):
            row = dict(id=id_, target=target, hypothesis=hypothesis, measure=measure)
            row |= dict(effect=np.nan, unit="dB", ci_low=np.nan, ci_high=np.nan, tracks=0, seeds=0)
            rows.append(row | _evaluate(values))
    return pd.DataFrame(rows)


def _effects(settings: Settings, tables: Mapping) -> Iterator[tuple[str, str, str, Effect]]:
    """Yield id, hypothesis, measure and effect; code finds a hypothesis by its id only."""
    b1, b2 = SEQUENCE_MODELS
    letters = {MODEL_LETTERS[model]: model for model in SEQUENCE_MODELS}
    for name, model in letters.items():
        effect = _difference(tables["tracks"], "SDR", model, "demucs_framewise")
        hypothesis, id_ = "sequence modelling helps", f"sequence_gain_{name.lower()}"
        yield id_, hypothesis, f"SDR, {name} − B0", effect
    for (name, model), key in itertools.product(letters.items(), INTERVENTIONS):
        measure = f"utterance SDR lost {INTERVENTIONS[key]}, {name}"
        effect = intervention_loss(tables["bottleneck"], model, key)
        yield f"bottleneck_{key}_{name.lower()}", "the bottleneck is used", measure, effect
    hypothesis = "time-domain models preserve the phase better"
    phase = whole_band_rows(tables["phase"])
    for name, model in letters.items():
        measure = f"SDR of true magnitude with model phase, {name} − A"
        effect = _difference(phase, "sdr_true_magnitude", model, "unet")
        yield f"phase_true_magnitude_{name.lower()}", hypothesis, measure, effect
    for lag_s, askable in lags_s(settings.segment_s).items():
        gain_b1, context_gain = repetition_gains(tables["repetition"], b1, lag_s)
        gain, _ = repetition_gains(tables["repetition"], b2, lag_s)
        difference = gain - gain_b1
        if not askable:
            context_gain = gain = difference = "not askable"
        if lag_s == LAGS_S[0]:
            measure = "context gain of B1 at 1 s"
            yield "context_gain_b1_1s", "B1 uses nearby context", measure, context_gain
        measure = f"repetition gain of B2 at {lag_s:g} s"
        yield f"repetition_gain_b2_{lag_s:g}s", "B2 uses repetitions", measure, gain
        id_ = f"repetition_gain_b2_minus_b1_{lag_s:g}s"
        measure = f"repetition gain at {lag_s:g} s, B2 − B1"
        yield id_, "B2 uses repetitions more than B1", measure, difference
    effect = _difference(tables["tracks"], "SDR", b2, b1)
    yield "sdr_b2_minus_b1", "B2 separates better than B1", "SDR, B2 − B1", effect
    data, effect = tables["data_amount"], "not run"
    if settings.data_study:
        effect = data_gains(data, b2) - data_gains(data, b1)
    measure = "SDR per tenfold music, B2 − B1"
    yield "data_gain_b2_minus_b1", "B2 needs more data", measure, effect
    hypothesis = "time-domain models preserve attacks better"
    attack = tables["attack"].eval("difference = attack_sdr - sustain_sdr")
    for name, model in letters.items():
        measure = f"attack SDR minus sustain SDR, {name} − A"
        effect = _difference(attack, "difference", model, "unet")
        yield f"attack_minus_sustain_{name.lower()}", hypothesis, measure, effect


def _difference(table: pd.DataFrame, value: str, a: str, b: str) -> pd.DataFrame:
    return pivot_by_seed(table, a, value) - pivot_by_seed(table, b, value)


def _evaluate(values: Effect) -> dict:
    """Compute median, interval and verdict; infinite values count as missing."""
    if isinstance(values, str):
        return dict(verdict=values)
    finite = values.replace([np.inf, -np.inf], np.nan)
    result = median_with_interval(finite)
    result["effect"] = result.pop("median")
    by_seed = finite.median().to_numpy()
    return result | dict(verdict=verdict(result["ci_low"], result["ci_high"], by_seed))


def verdict(low: float, high: float, by_seed: np.ndarray) -> str:
    """Apply the rule to an interval in dB and to the median effect of every seed."""
    if low > 0 and (by_seed > 0).sum() >= MIN_SEEDS:
        return "supported"
    if high < 0 or (low >= -NEGLIGIBLE_DB and high <= NEGLIGIBLE_DB):
        return "not supported"
    return "cannot tell"  # also without an interval


def intervention_loss(bottleneck: pd.DataFrame, model: str, intervention: str) -> pd.DataFrame:
    """Compute the SDR that an intervention costs, in dB: a row per track, a column per seed."""
    intact, changed = (
        pivot_by_seed(bottleneck[bottleneck["intervention"] == name], model, "sdr")
        for name in ("none", intervention)
    )
    return intact - changed


def repetition_gains(
    repetition: pd.DataFrame, model: str, lag_s: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compute repetition gain and context gain of a model in dB from the table `repetition`.

    They are the SDR with the repeat minus that with different music, and the SDR with different
    music minus that with silence: a row per track, the mean over its loops, and a column per seed.
    """
    rows = repetition[(repetition["model"] == model) & (repetition["lag_s"] == lag_s)]
    rows = rows.assign(sdr=rows["sdr"].clip(upper=MAX_SCORE_DB))
    repeat, different, silent = (
        rows[rows["condition"] == name].pivot_table(index="track", columns="seed", values="sdr")
        for name in CONDITIONS
    )
    return repeat - different, different - silent


def format_hypothesis(row: Mapping) -> str:
    """Format a row of the table `hypotheses` as a sentence in Markdown."""
    name, result = f"{row['target']}: {row['measure']}", row["verdict"]
    if result in ("not askable", "not run"):
        return f"{name}: {result}."
    counts = format_counts(row)
    if np.isnan(row["ci_low"]):
        return f"{name}: **{result}** ({counts}; too few tracks for an interval)."
    interval = f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
    effect = f"{row['effect']:+.2f} {row['unit']} {interval}, {counts}".replace("-", "−")
    note = ""
    if result == "cannot tell" and row["ci_low"] > 0:
        note = f"; the interval lies above zero, but {MIN_SEEDS} seeds must agree"
    return f"{name}: {effect}: **{result}**{note}."
