"""Hypotheses: labels, effects with intervals, and verdicts, from the tables of a run.

Every effect is defined so that the hypothesis predicts a positive value. The verdict is the first
of these that applies; the rule was fixed before the numbers were known:

    supported       the 95 % interval lies above zero, and at least three seeds agree
    not supported   the interval lies below zero, or within +-0.2 dB (if the unit is dB)
    cannot tell     anything else
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from mss_utils.analysis.phase import whole_band_rows
from mss_utils.analysis.repetition import CONDITIONS, LAGS_S, lags_s
from mss_utils.analysis.studies import data_gains
from mss_utils.config import WAVEFORM_MODELS, Settings
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.evaluation.statistics import MIN_SEEDS, format_counts, median_with_interval

NEGLIGIBLE_DB = 0.2
PHASE = "time-domain models preserve the phase better"
ATTACK = "time-domain models preserve attacks better"
REPETITION, MORE_REPETITION = "B2 uses repetitions", "B2 uses repetitions more than B1"
HYPOTHESES = {  # id: hypothesis, measure, unit; code finds a hypothesis by its id only
    "phase_true_magnitude_b1": (PHASE, "SDR of true magnitude with model phase, B1 − A", "dB"),
    "phase_true_magnitude_b2": (PHASE, "SDR of true magnitude with model phase, B2 − A", "dB"),
    "context_gain_b1_1s": ("B1 uses nearby context", "context gain of B1 at 1 s", "dB"),
    "repetition_gain_b2_1s": (REPETITION, "repetition gain of B2 at 1 s", "dB"),
    "repetition_gain_b2_2s": (REPETITION, "repetition gain of B2 at 2 s", "dB"),
    "repetition_gain_b2_4s": (REPETITION, "repetition gain of B2 at 4 s", "dB"),
    "repetition_gain_b2_8s": (REPETITION, "repetition gain of B2 at 8 s", "dB"),
    "repetition_gain_b2_minus_b1_1s": (MORE_REPETITION, "repetition gain at 1 s, B2 − B1", "dB"),
    "repetition_gain_b2_minus_b1_2s": (MORE_REPETITION, "repetition gain at 2 s, B2 − B1", "dB"),
    "repetition_gain_b2_minus_b1_4s": (MORE_REPETITION, "repetition gain at 4 s, B2 − B1", "dB"),
    "repetition_gain_b2_minus_b1_8s": (MORE_REPETITION, "repetition gain at 8 s, B2 − B1", "dB"),
    "sdr_b2_minus_b1": ("B2 separates better than B1", "SDR, B2 − B1", "dB"),
    "data_gain_b2_minus_b1": ("B2 needs more data", "SDR per tenfold music, B2 − B1", "dB"),
    "attack_minus_sustain_b1": (ATTACK, "attack SDR minus sustain SDR, B1 − A", "dB"),
    "attack_minus_sustain_b2": (ATTACK, "attack SDR minus sustain SDR, B2 − A", "dB"),
}


def evaluate_hypotheses(settings: Settings, tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compute the table `hypotheses` from tracks, phase, attack, repetition and data_amount."""
    rows = []
    for target in tables["tracks"]["target"].unique():
        own = {name: table[table["target"] == target] for name, table in tables.items()}
        for id_, values in _effects(settings, own):
            hypothesis, measure, unit = HYPOTHESES[id_]
            labels = dict(id=id_, target=target, hypothesis=hypothesis, measure=measure)
            rows.append(labels | dict(effect=np.nan, unit=unit) | _evaluate(values, unit))
    return pd.DataFrame(rows)


def _effects(settings: Settings, tables: Mapping) -> Iterator[tuple[str, pd.DataFrame | str]]:
    """Yield every id with its effect (rows: tracks, columns: seeds), or a verdict instead."""
    b1, b2 = WAVEFORM_MODELS
    phase = whole_band_rows(tables["phase"])
    yield "phase_true_magnitude_b1", _difference(phase, "sdr_true_magnitude", b1, "unet")
    yield "phase_true_magnitude_b2", _difference(phase, "sdr_true_magnitude", b2, "unet")
    for lag_s, askable in lags_s(settings.segment_s).items():
        gain_b1, context_b1 = repetition_gains(tables["repetition"], b1, lag_s)
        gain_b2, _ = repetition_gains(tables["repetition"], b2, lag_s)
        if lag_s == LAGS_S[0]:
            yield "context_gain_b1_1s", context_b1 if askable else "not askable"
        yield f"repetition_gain_b2_{lag_s:g}s", gain_b2 if askable else "not askable"
        difference = gain_b2 - gain_b1
        yield f"repetition_gain_b2_minus_b1_{lag_s:g}s", difference if askable else "not askable"
    yield "sdr_b2_minus_b1", _difference(tables["tracks"], "SDR", b2, b1)
    data = tables["data_amount"]
    gain = data_gains(data, b2) - data_gains(data, b1) if settings.data_study else "not run"
    yield "data_gain_b2_minus_b1", gain
    attack = tables["attack"].eval("attack_minus_sustain = attack_sdr - sustain_sdr")
    yield "attack_minus_sustain_b1", _difference(attack, "attack_minus_sustain", b1, "unet")
    yield "attack_minus_sustain_b2", _difference(attack, "attack_minus_sustain", b2, "unet")


def _difference(table: pd.DataFrame, value: str, a: str, b: str) -> pd.DataFrame:
    return pivot_by_seed(table, a, value) - pivot_by_seed(table, b, value)


def _evaluate(values: pd.DataFrame | str, unit: str) -> dict:
    """Compute median, interval and verdict; infinite values count as missing."""
    if isinstance(values, str):
        return dict(ci_low=np.nan, ci_high=np.nan, tracks=0, seeds=0, verdict=values)
    finite = values.replace([np.inf, -np.inf], np.nan)
    result = median_with_interval(finite)
    result["effect"] = result.pop("median")
    by_seed = finite.median().to_numpy()
    return result | dict(verdict=verdict(result["ci_low"], result["ci_high"], unit, by_seed))


def verdict(low: float, high: float, unit: str, by_seed: np.ndarray) -> str:
    """Apply the rule to an interval and to the median effect of every seed."""
    if low > 0 and (by_seed > 0).sum() >= MIN_SEEDS:
        return "supported"
    if high < 0 or (unit == "dB" and low >= -NEGLIGIBLE_DB and high <= NEGLIGIBLE_DB):
        return "not supported"
    return "cannot tell"  # also without an interval


def pivot_by_seed(table: pd.DataFrame, model: str, value: str) -> pd.DataFrame:
    """Arrange a column of a model in a row per track and a column per seed, at most 80 dB."""
    rows = table[table["model"] == model]
    wide = rows.pivot_table(index="track", columns="seed", values=value, dropna=False)
    return wide.clip(upper=MAX_SCORE_DB)


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


def hypothesis_rows(hypotheses: pd.DataFrame, target: str, prefix: str) -> pd.DataFrame:
    """Select the rows of the table `hypotheses` of one target whose id starts with `prefix`."""
    return hypotheses[(hypotheses["target"] == target) & hypotheses["id"].str.startswith(prefix)]


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
