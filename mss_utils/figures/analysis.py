"""Figures of bottleneck, phase, repetition and attack, and the table of hypotheses: notebook 05."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mss_utils.analysis import (
    CONDITIONS,
    INTERVENTIONS,
    intervention_loss,
    repetition_gains,
    whole_band_rows,
)
from mss_utils.config import MODELS, SEQUENCE_MODELS
from mss_utils.data import MIXTURE
from mss_utils.evaluation.statistics import median_with_interval, pivot_by_seed
from mss_utils.figures import style
from mss_utils.figures.style import INK, LABELS, MARKERS, SHORT_LABELS

PHASE_SCORES = {  # column: label
    "sdr": "estimate",
    "sdr_true_phase": "true\nphase",
    "sdr_true_magnitude": "true\nmagnitude",
}


def bottleneck(table: pd.DataFrame, tracks: pd.DataFrame, target: str) -> np.ndarray:
    """Plot SDR minus that of B0, and the SDR lost when the bottleneck is changed, per track."""
    axes = style.new_axes(6.2, 1, 2, width_ratios=(1, 2.4))
    rows = tracks[tracks["target"] == target]
    b0 = pivot_by_seed(rows, "demucs_framewise", "SDR")
    gains = [(model, pivot_by_seed(rows, model, "SDR") - b0) for model in SEQUENCE_MODELS]
    rows = table[table["target"] == target]
    places = [(model, name) for name in INTERVENTIONS for model in SEQUENCE_MODELS]
    losses = [(model, intervention_loss(rows, model, name)) for model, name in places]
    for ax, groups in zip(axes, (gains, losses), strict=True):
        labels = [SHORT_LABELS[model] for model, _ in groups]
        style.track_dots(ax, [_group(*group) for group in groups], labels)
        ax.axhline(0, color=INK, linewidth=0.9)
    axes[0].set(title="SDR minus that of B0", ylabel="difference (dB)")
    axes[1].set(title="SDR lost when the bottleneck is changed", ylabel="loss (dB)")
    middle = 2 * np.arange(len(INTERVENTIONS)) + 0.5
    axes[1].set_xticks(middle, list(INTERVENTIONS))
    style.model_legend(axes, SEQUENCE_MODELS)
    return axes


def phase(table: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the phase error by frequency, and the SDR with true phase or true magnitude."""
    axes = style.new_axes(6.4, 1, 2, width_ratios=(1.25, 1))
    axes[0].set_xscale("log")
    axes[0].set_xticks(list(style.FREQUENCIES), style.FREQUENCIES.values())
    axes[0].minorticks_off()
    rows = table[table["target"] == target]
    columns, keys = ["phase_error_rad", *PHASE_SCORES], ["model", "band_low_hz", "band_high_hz"]
    means = rows.groupby([*keys, "track"])[columns].mean()
    medians = means.groupby(keys).median().reset_index()
    whole = whole_band_rows(medians)
    bands = medians.drop(whole.index)
    for model in [name for name in (MIXTURE, *MODELS, "irm") if name in set(rows["model"])]:
        part = bands[bands["model"] == model]
        centre_hz = np.sqrt(part["band_low_hz"].clip(lower=60) * part["band_high_hz"])
        options = dict(marker=MARKERS[model], label=SHORT_LABELS[model]) | style.line_look(model)
        axes[0].plot(centre_hz, part["phase_error_rad"], **options)
        if model != MIXTURE:
            sdr = whole.set_index("model").loc[model, list(PHASE_SCORES)]
            axes[1].plot(range(len(sdr)), sdr, **options)
    style.labelled_line(axes[0], np.pi / 2, "random phase", -9)
    axes[0].set(xlabel="frequency (Hz), one marker per band", title="Phase error")
    axes[0].set(ylabel="phase error (rad)", ylim=(0, 1.7))
    axes[1].set(ylabel="SDR (dB)", title="True phase or magnitude")
    style.category_axis(axes[1], list(PHASE_SCORES.values()))
    style.legend_below(axes)
    return axes


def damaged_repeat(repetition: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the SDR of the damaged repetition by its surroundings, and the gains by lag."""
    axes = style.new_axes(6.6, 1, 2)
    rows = repetition[repetition["target"] == target].dropna(subset="sdr")
    lags = sorted(rows["lag_s"].unique())
    if lags:
        _sdr_by_condition(axes[0], rows, lags)
        _gains_by_lag(axes[1], rows, lags)
    else:
        text = "not askable: training segments are\nshorter than twice the lag"
        for ax in axes:
            ax.text(0.5, 0.5, text, ha="center", va="center")
            ax.set(xticks=[], yticks=[])
    axes[0].set_title("Damaged repetition")
    axes[1].set_title("Gain from the context")
    style.model_legend(axes, SEQUENCE_MODELS)
    return axes


def _sdr_by_condition(ax: Axes, rows: pd.DataFrame, lags: Sequence[float]) -> None:
    loops = rows.groupby(["lag_s", "model", "condition", "track", "start_s"])["sdr"].mean()
    medians = loops.groupby(["lag_s", "model", "condition"]).median()
    for lag_s, line in zip(lags, ("-", "--", ":", "-."), strict=False):
        for model in SEQUENCE_MODELS:
            sdr = medians[lag_s, model].reindex(CONDITIONS[::-1])
            ax.plot(range(3), sdr, line, **style.look(model))
        ax.plot([], [], line, color=INK, label=f"lag {lag_s:g} s")
    ax.set_xticks(range(3), ["silence", "other music", "the repeat"])
    ax.set(xlabel="context", ylabel="SDR (dB), median over loops")
    ax.margins(x=0.15, y=0.2)  # room for the legend
    ax.legend(loc="lower center", fontsize=6.5, ncols=len(lags), borderpad=0)


def _gains_by_lag(ax: Axes, rows: pd.DataFrame, lags: Sequence[float]) -> None:
    places = [(model, lag_s) for lag_s in lags for model in SEQUENCE_MODELS]
    repetition, context = zip(*(repetition_gains(rows, *place) for place in places), strict=True)
    ax.axhline(0, color=INK, linewidth=0.9)
    groups = zip([model for model, _ in places] * 2, [*repetition, *context], strict=True)
    style.track_dots(ax, [_group(*group) for group in groups], [""] * 2 * len(places))
    text = "lag " + ", ".join(f"{lag_s:g}" for lag_s in lags) + " s"
    ticks = np.array([0.5, 1.5]) * len(places) - 0.5
    ax.set_xticks(ticks, [f"repetition\n{text}", f"context\n{text}"])
    ax.set_ylabel("gain (dB)")


def _group(model: str, table: pd.DataFrame) -> tuple:
    """Make a group of `style.track_dots` from a row per track and a column per seed."""
    return model, table.mean(axis=1), median_with_interval(table)


def data_amount(table: pd.DataFrame, target: str) -> Axes:
    """Plot the SDR of B1 and B2 against the share of the training tracks, with intervals."""
    ax = style.new_axes(5.6)
    rows = table[table["target"] == target]
    shares = np.sort(rows["share"].unique())
    for model, shift in zip(SEQUENCE_MODELS, (-0.4, 0.4), strict=True):
        parts = [pivot_by_seed(rows[rows["share"] == share], model, "SDR") for share in shares]
        sdr = pd.DataFrame([median_with_interval(part) for part in parts])
        options = dict(marker=MARKERS[model], label=LABELS[model]) | style.line_look(model)
        ax.errorbar(100 * shares + shift, sdr["median"], style.error_bars(sdr), **options)
    ax.set(xlabel="share of the training tracks (%)", ylabel="median SDR (dB)")
    ax.legend()
    return ax


def attack(envelopes: pd.DataFrame, attack: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the mean envelope around an onset, and the SDR in the attack and in the sustain."""
    axes = style.new_axes(6.6, 1, 2, width_ratios=(1.1, 1))
    curves = envelopes[envelopes["target"] == target]
    curves = curves.pivot_table(index="time_ms", columns="model", values="level")
    for model in [name for name in ("reference", *MODELS) if name in curves]:
        options = dict(linewidth=2.4 if model == "reference" else 1.3, label=SHORT_LABELS[model])
        axes[0].plot(curves[model], **options, **style.line_look(model))
    axes[0].axvline(0, color=INK, linewidth=0.7)
    axes[0].set(xlabel="time after the onset (ms)", title="Mean envelope of an onset")
    axes[0].set(ylabel="level (peak of the reference = 1)", ylim=(0, None))
    axes[0].legend(*axes[0].get_legend_handles_labels(), fontsize=6.5)  # may have none
    rows = attack[attack["target"] == target]
    places = [(model, part) for model in MODELS for part in ("attack", "sustain")]
    groups = [_group(model, pivot_by_seed(rows, model, f"{part}_sdr")) for model, part in places]
    style.track_dots(axes[1], groups, [SHORT_LABELS[model] for model, _ in places])
    axes[1].set_xticks(2 * np.arange(len(MODELS)) + 0.5, [SHORT_LABELS[model] for model in MODELS])
    axes[1].set(title="SDR in attack (left) and sustain (right)", ylabel="SDR (dB)")
    style.model_legend(axes, MODELS)
    return axes


def hypothesis_table(hypotheses: pd.DataFrame) -> pd.DataFrame:
    """Format the table `hypotheses` for reading: effect, interval and unit in one column."""
    estimates = hypotheses.rename(columns={"effect": "median"})
    texts = estimates.apply(style.format_interval, axis=1) + " " + hypotheses["unit"]
    texts = texts.where(hypotheses["effect"].notna(), "–")
    columns = ["target", "hypothesis", "measure", "effect [95 % interval]", "tracks", "seeds"]
    return hypotheses.assign(**{columns[3]: texts})[[*columns, "verdict"]]
