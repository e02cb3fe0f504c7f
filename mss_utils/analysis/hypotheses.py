"""What the measurements say of each hypothesis, by a rule that stood before the numbers: the first of these that holds.

    *supported*      the 95 % interval leaves out zero on the stated side, and at least three seeds have that sign
    *not supported*  it leaves out zero on the other side, or lies inside +-0.2 dB (where the unit is dB)
    *cannot tell*    anything else

Every effect is written so that the hypothesis says it is positive. Everything is computed from the tables of a run. Taught in
notebook 05.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy import stats

from mss_utils.analysis.phase import phase_share
from mss_utils.analysis.repetition import FAR_S, askable, lags_s
from mss_utils.config import MODEL_LETTERS, WAVEFORM_MODELS, Settings
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.evaluation.statistics import (
    MIN_SEEDS,
    MIN_TRACKS,
    N_BOOTSTRAP,
    format_counts,
    median_with_interval,
)

NEGLIGIBLE_DB = 0.2
RHO, SHARE, LEVEL, WEIGHT = (
    "rho",
    "of 1",
    "dB of gradient",
    "dB of attention",
)  # units that the rule of +-0.2 dB is not about
COLUMNS = [
    "hypothesis",
    "measure",
    "effect",
    "unit",
    "ci_low",
    "ci_high",
    "tracks",
    "seeds",
    "verdict",
]
PHASE = "the time domain keeps the phase"
ATTACK = "the time domain keeps the attack"
# Two statements that follow from those if all else is equal, but hold for a model that is merely soft or quiet as well.
PHASE_SHARE = "more of A's error is phase"
PRE_ECHO = "A has more error before an onset"
FAINT = "of the little that comes from far, B2 has more"  # shares so small that an untrained model passes
LOCAL = "B1 is good at what is near"
FAR = "B1 is weak at what is far"
GLOBAL = "B2 sees all of a segment"
RHYTHM = "B2 is better on rhythm"
DATA = "B2 needs more data"
SUPPORTED, NOT_SUPPORTED, CANNOT_TELL, NOT_ASKABLE, NOT_RUN = (
    "supported",
    "not supported",
    "cannot tell",
    "not askable",
    "not run",
)
Tables = Mapping[str, pd.DataFrame]


def hypotheses(settings: Settings, tables: Tables) -> pd.DataFrame:
    """The table `hypotheses`, from the tables phase, long_range, transients, data_amount and tracks."""
    rows = []
    for target in tables["tracks"]["target"].unique():
        of = {name: table[table["target"] == target] for name, table in tables.items()}
        for question in (_phase, _repetition, _rhythm, _data, _attack):
            for hypothesis, measure, unit, found in question(settings, of):
                rows.append(
                    dict(hypothesis=hypothesis, measure=f"{target}: {measure}", unit=unit) | found
                )
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict(effect: float, low: float, high: float, unit: str, by_seed: np.ndarray) -> str:
    """The verdict on an effect that the hypothesis says is positive, with its interval and the effect in each seed."""
    if np.isnan([effect, low, high]).any():
        return CANNOT_TELL
    if low > 0 and (np.asarray(by_seed) > 0).sum() >= MIN_SEEDS:
        return SUPPORTED
    if high < 0 or (unit == "dB" and -NEGLIGIBLE_DB <= low and high <= NEGLIGIBLE_DB):
        return NOT_SUPPORTED
    return CANNOT_TELL


def evaluate_hypothesis(values: pd.DataFrame, unit: str) -> dict:
    """Effect, interval and verdict of `values`, a row a track and a column a seed: the median over tracks."""
    values = values.replace([np.inf, -np.inf], np.nan)
    found = median_with_interval(values)
    found = dict(effect=found.pop("median")) | found
    return found | dict(
        verdict=verdict(
            found["effect"], found["ci_low"], found["ci_high"], unit, values.median().to_numpy()
        )
    )


def rank_correlation(index: pd.Series, advantage: pd.DataFrame) -> dict:
    """Spearman's rank correlation of a number a track with an advantage, a row a track and a column a seed; bootstrap interval.

    Seeds are averaged on each track; the interval covers the choice of tracks.
    """
    both = advantage.join(index.rename("index"), how="inner").dropna()
    known, means = both.pop("index").to_numpy(), both.mean(axis=1).to_numpy()
    if len(both) < MIN_TRACKS:
        return dict(
            effect=np.nan,
            ci_low=np.nan,
            ci_high=np.nan,
            tracks=len(both),
            seeds=advantage.shape[1],
            verdict=CANNOT_TELL,
        )
    ranks = lambda values: stats.rankdata(values, axis=-1)
    drawn = np.random.default_rng(0).integers(len(both), size=(N_BOOTSTRAP, len(both)))
    rho = _correlation(ranks(known[drawn]), ranks(means[drawn]))
    low, high = np.nanquantile(rho, [0.025, 0.975])
    effect = float(stats.spearmanr(known, means).statistic)
    by_seed = np.array([stats.spearmanr(known, both[seed]).statistic for seed in both])
    found = dict(
        effect=effect, ci_low=float(low), ci_high=float(high), tracks=len(both), seeds=both.shape[1]
    )
    return found | dict(verdict=verdict(effect, low, high, RHO, by_seed))


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation along the last axis; NaN where one does not vary."""
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in (a, b))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt(np.square(a).sum(axis=-1) * np.square(b).sum(axis=-1))


def format_hypothesis(row: Mapping) -> str:
    """One row of the table `hypotheses` as a sentence, with what keeps it from telling."""
    if row["verdict"] in (NOT_ASKABLE, NOT_RUN):
        return f"{row['measure']}: {row['verdict']}."
    counts = format_counts(row)
    if np.isnan(row["ci_low"]):
        return f"{row['measure']}: **{row['verdict']}** ({counts}; an interval takes {MIN_TRACKS} tracks with a value)."
    unit = "" if row["unit"] in (RHO, SHARE) else f" {row['unit']}"
    effect = f"{row['effect']:+.2f}{unit} [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}], {counts}".replace(
        "-", "−"
    )
    seeds = f"; the interval leaves out zero, but it takes {MIN_SEEDS} seeds that agree"
    doubt = seeds if row["verdict"] == CANNOT_TELL and row["ci_low"] > 0 else ""
    return f"{row['measure']}: {effect}: **{row['verdict']}**{doubt}."


def unanswered(why: str) -> dict:
    """A row without a number: `NOT_ASKABLE` or `NOT_RUN`."""
    return dict(effect=np.nan, ci_low=np.nan, ci_high=np.nan, tracks=0, seeds=0, verdict=why)


def pivot_by_seed(table: pd.DataFrame, model: str, value: str, item: str = "track") -> pd.DataFrame:
    """One column of one model, a row a track and a column a seed; decibels above 80 count as 80."""
    rows = table[table["model"] == model]
    return rows.pivot_table(index=item, columns="seed", values=value, dropna=False).clip(
        upper=MAX_SCORE_DB
    )


Findings = Iterator[tuple[str, str, str, dict]]  # hypothesis, measure, unit, what was found


def _phase(_settings: Settings, tables: Tables) -> Findings:
    whole = whole_band_rows(tables["phase"])
    whole = whole.assign(share=phase_share(whole["sdr"], whole["sdr_true_phase"]))
    for model in WAVEFORM_MODELS:
        gain = pivot_by_seed(whole, model, "sdr_true_magnitude") - pivot_by_seed(
            whole, "unet", "sdr_true_magnitude"
        )
        yield (
            PHASE,
            f"SDR of the true magnitude with a model's phase, {MODEL_LETTERS[model]} − A",
            "dB",
            evaluate_hypothesis(gain, "dB"),
        )
        less = pivot_by_seed(whole, "unet", "share") - pivot_by_seed(whole, model, "share")
        yield (
            PHASE_SHARE,
            f"share of the error that is phase, A − {MODEL_LETTERS[model]}",
            SHARE,
            evaluate_hypothesis(less, SHARE),
        )


def _attack(_settings: Settings, tables: Tables) -> Findings:
    table = tables["transients"].assign(kept=lambda rows: rows["attack_sdr"] - rows["sustain_sdr"])
    for model in WAVEFORM_MODELS:
        kept = pivot_by_seed(table, model, "kept") - pivot_by_seed(table, "unet", "kept")
        yield (
            ATTACK,
            f"SDR in the attack minus SDR in the sustain, {MODEL_LETTERS[model]} − A",
            "dB",
            evaluate_hypothesis(kept, "dB"),
        )
        quieter = pivot_by_seed(table, "unet", "pre_echo_db") - pivot_by_seed(
            table, model, "pre_echo_db"
        )
        yield (
            PRE_ECHO,
            f"pre-echo, A − {MODEL_LETTERS[model]}",
            "dB",
            evaluate_hypothesis(quieter, "dB"),
        )


def _repetition(settings: Settings, tables: Tables) -> Findings:
    table = tables["long_range"]
    reach = table[(table["probe"] == "reach") & (table["item"] != "all tracks")]
    within, beyond = (
        reach[reach["condition"] == condition] for condition in ("99 %", f"beyond {FAR_S:g} s")
    )
    further = pivot_by_seed(within, "demucs_attention", "value", "item") - pivot_by_seed(
        within, "demucs_lstm", "value", "item"
    )
    yield (
        GLOBAL,
        "radius that holds 99 % of the gradient, B2 − B1",
        "s",
        evaluate_hypothesis(further, "s"),
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        more = 10 * np.log10(
            pivot_by_seed(beyond, "demucs_attention", "value", "item")
            / pivot_by_seed(beyond, "demucs_lstm", "value", "item")
        )
    yield (
        FAINT,
        f"gradient from beyond {FAR_S:g} s, B2 over B1",
        LEVEL,
        evaluate_hypothesis(more, LEVEL),
    )
    bar = table[table["probe"] == "attention_at_bar"]
    yield (
        GLOBAL,
        "attention at one bar over that near it",
        WEIGHT,
        evaluate_hypothesis(pivot_by_seed(bar, "demucs_attention", "value", "item"), WEIGHT),
    )
    lags = lags_s(settings.segment_s)
    near = [
        repetition_gains(table, "demucs_lstm", lag)[1]
        for lag in lags[:1]
        if askable(lag, settings.segment_s)
    ]
    yield (
        LOCAL,
        f"context gain of B1 at {lags[0]:g} s",
        "dB",
        evaluate_hypothesis(near[0], "dB") if near else unanswered(NOT_ASKABLE),
    )
    for lag in lags:
        names = f"repetition gain of B2 at {lag:g} s", f"repetition gain at {lag:g} s, B2 − B1"
        if askable(lag, settings.segment_s):
            b1, b2 = (repetition_gains(table, model, lag)[0] for model in WAVEFORM_MODELS)
            answers = evaluate_hypothesis(b2, "dB"), evaluate_hypothesis(b2 - b1, "dB")
        else:
            answers = (unanswered(NOT_ASKABLE),) * 2
        yield GLOBAL, names[0], "dB", answers[0]
        yield FAR, names[1], "dB", answers[1]


def _rhythm(_settings: Settings, tables: Tables) -> Findings:
    table = tables["long_range"]
    index = table[table["probe"] == "repetitiveness"].set_index("item")["value"]
    advantage = pivot_by_seed(tables["tracks"], "demucs_attention", "SDR") - pivot_by_seed(
        tables["tracks"], "demucs_lstm", "SDR"
    )
    yield (
        RHYTHM,
        "rank correlation of repetitiveness with the SDR of B2 − B1",
        RHO,
        rank_correlation(index, advantage),
    )
    yield RHYTHM, "SDR, B2 − B1", "dB", evaluate_hypothesis(advantage, "dB")


def _data(settings: Settings, tables: Tables) -> Findings:
    measure, unit = "gain in SDR from ten times the music, B2 − B1", "dB"
    if not settings.data_study:
        yield DATA, measure, unit, unanswered(NOT_RUN)
        return
    b1, b2 = (slopes(tables["data_amount"], model) for model in WAVEFORM_MODELS)
    yield DATA, measure, unit, evaluate_hypothesis(b2 - b1, "dB")


def whole_band_rows(phase: pd.DataFrame) -> pd.DataFrame:
    """The rows of the table `phase` that are of all frequencies."""
    return phase[
        (phase["band_low_hz"] == 0) & (phase["band_high_hz"] == phase["band_high_hz"].max())
    ]


def repetition_gains(
    long_range: pd.DataFrame, model: str, lag_s: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Repetition gain and context gain in dB of a model at a lag: a row a track (the mean of its loops), a column a seed.

    Repetition gain is the SDR with the repeat around minus that with different music, context gain the latter minus that with silence.
    """
    rows = long_range[
        (long_range["probe"] == "damaged_repeat")
        & (long_range["model"] == model)
        & (long_range["lag_s"] == lag_s)
    ]
    rows = rows.assign(
        track=rows["item"].str.rsplit(" @ ", n=1).str[0],
        value=rows["value"].clip(upper=MAX_SCORE_DB),
    )
    under = {
        name: part.pivot_table(index="track", columns="seed", values="value")
        for name, part in rows.groupby("condition")
    }
    if not under:
        return pd.DataFrame(columns=[0], dtype=float), pd.DataFrame(columns=[0], dtype=float)
    return under["repeat"] - under["different"], under["different"] - under["silent"]


def slopes(data_amount: pd.DataFrame, model: str) -> pd.DataFrame:
    """Gain in SDR in dB from ten times the training music: least-squares slope over its logarithm, a row a track, a column a seed."""
    rows = data_amount[data_amount["model"] == model]
    table = (
        rows.pivot_table(index=["track", "seed"], columns="share", values="SDR")
        .clip(upper=MAX_SCORE_DB)
        .dropna()
    )
    decades = np.log10(table.columns.to_numpy(float))
    centred = decades - decades.mean()
    return pd.Series(table.to_numpy() @ centred / np.square(centred).sum(), table.index).unstack(
        "seed"
    )
