"""Plots of the three questions: phase, repetition, attack; and the verdicts as a table. Notebook 05."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mss_utils.analysis.hypotheses import (
    RHO,
    SHARE,
    pivot_by_seed,
    repetition_gains,
    whole_band_rows,
)
from mss_utils.analysis.repetition import CONDITIONS, SHARES
from mss_utils.config import MODELS, WAVEFORM_MODELS
from mss_utils.evaluation.statistics import median_interval
from mss_utils.figures.style import (
    COLOURS,
    INK,
    LABELS,
    MARKERS,
    SHORT_LABELS,
    create_axes,
    dots,
    figure_of,
    format_number,
    interval,
    limit,
    model_legend,
)

LINES = {
    "mixture": ":",
    "unet": "-",
    "demucs_lstm": "--",
    "demucs_attention": "-.",
    "irm": (0, (1, 1)),
    "reference": "-",
}
PARTS = {
    "sdr": ("o", "as it is"),
    "sdr_true_phase": ("^", "its magnitude, true phase"),
    "sdr_true_magnitude": ("v", "true magnitude, its phase"),
}
BAR_GRID = np.arange(0, 1.26, 0.02)  # lags in bars


def _line(model: str) -> dict:
    return dict(linestyle=LINES[model], color=COLOURS[model])


# --- phase --------------------------------------------------------------------------------------------------------------


def phase(table: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """Phase error by frequency, and the SDR of an estimate, of its magnitude and of its phase: medians over tracks. Two axes."""
    axes = create_axes(axes, 6.4, 1, 2, width_ratios=(1.25, 1))
    rows = table[table["target"] == target]
    means = (
        rows.groupby(["model", "track", "band_low_hz", "band_high_hz"])[["phase_error_rad", *PARTS]]
        .mean()
        .reset_index()
    )
    medians = (
        means.groupby(["model", "band_low_hz", "band_high_hz"])[["phase_error_rad", *PARTS]]
        .median()
        .reset_index()
    )
    whole = whole_band_rows(medians)
    bands = medians.drop(whole.index)
    models = [name for name in ("mixture", *MODELS, "irm") if name in set(rows["model"])]
    for model in models:
        part = bands[bands["model"] == model]
        centre = np.sqrt(part["band_low_hz"].clip(lower=60) * part["band_high_hz"])
        axes[0].plot(
            centre,
            part["phase_error_rad"],
            marker=MARKERS[model],
            label=SHORT_LABELS[model],
            **_line(model),
        )
    axes[0].axhline(np.pi / 2, color=INK, linewidth=0.9)
    axes[0].annotate(
        "random phase",
        (0, np.pi / 2),
        (4, -9),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=7,
    )
    axes[0].set(
        xscale="log",
        xlabel="frequency (Hz), one mark a band",
        ylabel="phase error (rad)",
        ylim=(0, 1.7),
        title="Phase error",
    )
    ticks = [hz for hz in (100, 300, 1000, 3000, 10000) if hz < rows["band_high_hz"].max()]
    axes[0].set_xticks(ticks, [f"{hz // 1000}k" if hz >= 1000 else str(hz) for hz in ticks])
    axes[0].minorticks_off()
    _phase_parts(axes[1], whole.set_index("model"), models[1:])
    figure_of(axes).legend(
        *axes[0].get_legend_handles_labels(), ncols=len(models), loc="outside lower center"
    )
    return axes


def _phase_parts(ax: Axes, medians: pd.DataFrame, models: Sequence[str]) -> None:
    for x, model in enumerate(models):
        ax.plot(
            (x, x),
            (medians.loc[model, list(PARTS)].min(), medians.loc[model, list(PARTS)].max()),
            color=COLOURS[model],
            linewidth=1,
        )
        for part, (marker, _) in PARTS.items():
            ax.scatter(
                x,
                medians.loc[model, part],
                s=34,
                marker=marker,
                color=COLOURS[model],
                edgecolors=INK,
                linewidths=0.6,
                zorder=3,
            )
    ax.set_xticks(range(len(models)), [SHORT_LABELS[model] for model in models])
    ax.set(xlim=(-0.5, len(models) - 0.5), ylabel="SDR (dB)", title="With one half of the truth")
    ax.grid(axis="x", visible=False)
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, color=INK, label=text)
        for marker, text in PARTS.values()
    ]
    ax.legend(handles=handles, loc="best", fontsize=6.5, handletextpad=0.1)


# --- repetition ---------------------------------------------------------------------------------------------------------


def reach(table: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """How far each model looks, and where the attention of B2 lies by lag in seconds and in bars. Three axes."""
    axes = create_axes(axes, 6.2, 1, 3)
    rows = table[table["target"] == target]
    for model in MODELS:
        profile = (
            rows[(rows["probe"] == "reach_profile") & (rows["model"] == model)]
            .groupby("lag_s")["value"]
            .mean()
        )
        beyond = 1 - profile.cumsum()
        axes[0].plot(
            beyond.index[:-1],
            beyond.iloc[:-1].clip(lower=1e-9),
            label=LABELS[model],
            **_line(model),
        )
    for share in SHARES:
        axes[0].axhline(1 - share, color=INK, linewidth=0.7, linestyle=":")
        axes[0].annotate(
            f"{100 * share:g} % within",
            (1, 1 - share),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=6.5,
            ha="right",
        )
    furthest = rows[(rows["probe"] == "reach_profile") & (rows["value"] > 0)]["lag_s"].max()
    axes[0].set(yscale="log", ylim=(1e-6, 1), xlim=(0, furthest), title="Reach")
    axes[0].set(xlabel="distance (s)", ylabel="share of the gradient beyond")
    axes[0].set_yticks(
        [10.0**-n for n in range(7)], ["1", "0.1", "0.01", "0.001", "10⁻⁴", "10⁻⁵", "10⁻⁶"]
    )
    axes[0].minorticks_off()
    _attention_by_lag(
        axes[1], rows[(rows["probe"] == "attention") & (rows["item"] == "all tracks")]
    )
    _attention_by_bar(axes[2], rows)
    figure_of(axes).legend(
        *axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center"
    )
    return axes


def _attention_by_lag(ax: Axes, rows: pd.DataFrame) -> None:
    for (layer, part), line in zip(rows.groupby("condition"), ("-", "--", ":", "-.")):
        mean = part.groupby("lag_s")["value"].mean()
        ax.plot(
            mean.index,
            mean,
            line,
            color=COLOURS["demucs_attention"] if line == "-" else INK,
            linewidth=1.2,
            label=layer,
        )
    _uniform(ax)
    ax.set(xlabel="lag (s)", ylabel="attention (times uniform)", title="Attention of B2")
    ax.legend(fontsize=6.5)


def _uniform(ax: Axes) -> None:
    ax.axhline(1, color="#7d8590", linewidth=2.5, alpha=0.5, label="uniform")


def _attention_by_bar(ax: Axes, rows: pd.DataFrame) -> None:
    """Mean over the tracks whose bar fits, at lags in bars; the grey area holds the middle half of them."""
    bars = rows[rows["condition"] == "bar"].set_index("item")["value"]
    asked = rows[rows["probe"] == "attention_at_bar"].dropna(subset="value")["item"].unique()
    by_track = (
        rows[(rows["probe"] == "attention") & rows["item"].isin(asked)]
        .groupby(["item", "lag_s"])["value"]
        .mean()
    )
    curves = [
        np.interp(BAR_GRID, by_track[item].index / bars[item], by_track[item]) for item in asked
    ]
    ax.set(xlabel="lag (bars)", title="Attention of B2, by bar")
    if not curves:
        return _nothing(ax, "no bar fits into\na training segment")
    low, middle, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
    ax.fill_between(BAR_GRID, low, high, color="#d5d9de")
    ax.plot(BAR_GRID, middle, color=COLOURS["demucs_attention"], label=f"{len(curves)} tracks")
    beats = (rows[rows["condition"] == "beat"].set_index("item")["value"] / bars)[asked].median()
    for beat in np.arange(beats, 1.26, beats):
        ax.axvline(
            beat,
            color=INK,
            linewidth=1.2 if abs(beat - 1) < 0.01 else 0.5,
            linestyle="-" if abs(beat - 1) < 0.01 else ":",
        )
    _uniform(ax)
    ax.legend(fontsize=6.5)


def _nothing(ax: Axes, why: str) -> None:
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", fontsize=7.5)
    ax.set_xticks([])
    ax.set_yticks([])


def repeat(
    table: pd.DataFrame,
    tracks: pd.DataFrame,
    verdicts: pd.DataFrame,
    target: str,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """The damaged repeat: SDR by what is around it, and gains; and the advantage of B2 against repetitiveness. Three axes."""
    axes = create_axes(axes, 6.6, 1, 3)
    rows = table[table["target"] == target]
    damaged = rows[rows["probe"] == "damaged_repeat"].dropna(subset="value")
    lags = sorted(damaged["lag_s"].unique())
    if lags:
        _conditions(axes[0], damaged, lags)
        _gains(axes[1], rows, lags)
    else:
        for ax in axes[:2]:
            _nothing(ax, "not askable: segments are\nshorter than twice the lag")
    axes[0].set_title("Damaged repetition")
    axes[1].set_title("What the context brings")
    _repetitiveness(axes[2], rows, tracks[tracks["target"] == target], verdicts, target)
    model_legend(axes, WAVEFORM_MODELS)
    return axes


def _conditions(ax: Axes, damaged: pd.DataFrame, lags: Sequence[float]) -> None:
    for lag, line in zip(lags, ("-", "--", ":", "-.")):
        for model in WAVEFORM_MODELS:
            part = damaged[(damaged["lag_s"] == lag) & (damaged["model"] == model)]
            medians = (
                part.groupby(["condition", "item"])["value"]
                .mean()
                .groupby("condition")
                .median()[list(CONDITIONS[::-1])]
            )
            ax.plot(range(3), medians, line, color=COLOURS[model], marker=MARKERS[model])
        ax.plot([], [], line, color=INK, label=f"lag {lag:g} s")
    ax.set_xticks(range(3), ["silence", "other\nmusic", "the\nrepeat"])
    ax.set(xlim=(-0.3, 2.3), ylabel="SDR (dB), median over loops", xlabel="around the damage")
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.2 * (high - low), high)  # room for the legend below the lines
    ax.legend(
        fontsize=6,
        loc="lower center",
        ncols=len(lags),
        handlelength=1.3,
        columnspacing=0.6,
        handletextpad=0.3,
        borderpad=0,
    )


def _gains(ax: Axes, rows: pd.DataFrame, lags: Sequence[float]) -> None:
    """Repetition gain and context gain of B1 and B2: a dot a track, medians with their intervals."""
    places = [(kind, lag, model) for kind in (0, 1) for lag in lags for model in WAVEFORM_MODELS]
    values = [repetition_gains(rows, model, lag)[kind] for kind, lag, model in places]
    ax.axhline(0, color=INK, linewidth=0.9)
    limit(ax, pd.concat([value.mean(axis=1) for value in values] + [pd.Series([0.0])]), None)
    for x, ((_, _, model), value) in enumerate(zip(places, values)):
        _with_interval(ax, x, value, model)
    middle = lambda kind: np.mean([x for x, place in enumerate(places) if place[0] == kind])
    per_lag = ", ".join(f"{lag:g}" for lag in lags)
    ax.set_xticks(
        [middle(0), middle(1)], [f"repetition\nlag {per_lag} s", f"context\nlag {per_lag} s"]
    )
    ax.set(ylabel="gain (dB)", xlim=(-0.6, len(places) - 0.3))
    ax.grid(axis="x", visible=False)


def _with_interval(ax: Axes, x: float, values: pd.DataFrame, model: str) -> None:
    """Dots of the tracks (means over seeds) and the median with its interval; `values` has a row a track and a column a seed."""
    values = values.replace([np.inf, -np.inf], np.nan).dropna(how="all")
    if len(values):
        means = values.mean(axis=1)
        low, high = median_interval(values.to_numpy())
        dots(ax, x, means.to_numpy(), model)
        interval(
            ax, x, pd.Series(dict(median=means.median(), ci_low=low, ci_high=high)), "median", model
        )


def _repetitiveness(
    ax: Axes, rows: pd.DataFrame, tracks: pd.DataFrame, verdicts: pd.DataFrame, target: str
) -> None:
    index = rows[rows["probe"] == "repetitiveness"].set_index("item")["value"]
    advantage = (
        pivot_by_seed(tracks, "demucs_attention", "SDR")
        - pivot_by_seed(tracks, "demucs_lstm", "SDR")
    ).mean(axis=1)
    both = pd.DataFrame(dict(index=index, advantage=advantage)).dropna()
    ax.axhline(0, color=INK, linewidth=0.9)
    model = "demucs_attention"
    ax.scatter(
        both["index"],
        both["advantage"],
        s=14,
        marker=MARKERS[model],
        color=COLOURS[model],
        edgecolors="white",
        linewidths=0.3,
    )
    found = verdicts[
        (verdicts["unit"] == RHO) & verdicts["measure"].str.startswith(f"{target}: ")
    ].iloc[0]
    values = (format_number(found[name], sign="+") for name in ("effect", "ci_low", "ci_high"))
    ax.text(
        0.02, 0.98, "ρ = {} [{}, {}]".format(*values), transform=ax.transAxes, va="top", fontsize=7
    )
    ax.margins(y=0.15)
    ax.set(
        xlabel="repetitiveness at the bar",
        ylabel="SDR of B2 − B1 (dB)",
        title="In repetitive songs",
    )


def data_amount(table: pd.DataFrame, target: str, ax: Axes | None = None) -> Axes:
    """SDR of B1 and B2 against the share of the training tracks: medians over the test tracks, and their intervals."""
    ax = create_axes(ax, 5.6)
    rows = table[table["target"] == target]
    for offset, model in zip((0.985, 1.015), WAVEFORM_MODELS):
        points = []
        for share in sorted(rows["share"].unique()):
            values = pivot_by_seed(rows[rows["share"] == share], model, "SDR").dropna(how="all")
            points.append(
                (
                    100 * share * offset,
                    values.mean(axis=1).median(),
                    *median_interval(values.to_numpy()),
                )
            )
        x, middle, low, high = np.transpose(points)
        error = np.nan_to_num([middle - low, high - middle])
        ax.errorbar(
            x,
            middle,
            error,
            marker=MARKERS[model],
            capsize=2.5,
            label=LABELS[model],
            **_line(model),
        )
    ax.set(xscale="log", xlabel="share of the training tracks (%)", ylabel="median SDR (dB)")
    ax.set_xticks(
        100 * np.sort(rows["share"].unique()),
        [f"{100 * share:g}" for share in np.sort(rows["share"].unique())],
    )
    ax.minorticks_off()
    ax.legend()
    return ax


# --- attack -------------------------------------------------------------------------------------------------------------


def attack(
    envelopes: pd.DataFrame, table: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """The mean envelope around an onset; SDR in the attack minus SDR in the sustain; pre-echo. Three axes."""
    axes = create_axes(axes, 6.6, 1, 3, width_ratios=(1.5, 1, 1))
    curves = envelopes[envelopes["target"] == target]
    for model in [name for name in ("reference", *MODELS) if name in set(curves["model"])]:
        mean = curves[curves["model"] == model].groupby("time_ms")["level"].mean()
        axes[0].plot(
            mean.index,
            mean,
            linewidth=2.4 if model == "reference" else 1.3,
            label=SHORT_LABELS[model],
            **_line(model),
        )
    axes[0].axvline(0, color=INK, linewidth=0.7)
    axes[0].set(
        xlabel="time after the onset (ms)",
        ylabel="level (peak of the reference = 1)",
        ylim=(0, None),
        title="Mean envelope of an onset",
    )
    axes[0].legend(fontsize=6.5)
    rows = table[table["target"] == target].assign(
        kept=lambda rows: rows["attack_sdr"] - rows["sustain_sdr"]
    )
    for ax, value, title in zip(
        axes[1:], ("kept", "pre_echo_db"), ("Attack − sustain, SDR", "Pre-echo")
    ):
        values = {model: pivot_by_seed(rows, model, value) for model in MODELS}
        finite = pd.concat([part.mean(axis=1) for part in values.values()]).dropna()
        limit(ax, finite, pd.Series([0.0]) if value == "kept" else None)
        for x, model in enumerate(MODELS):
            _with_interval(ax, x, values[model], model)
        ax.set_xticks(range(3), [SHORT_LABELS[model] for model in MODELS])
        ax.set(
            xlim=(-0.6, 2.6),
            title=title,
            ylabel="difference (dB)" if value == "kept" else "error before (dB re. onset)",
        )
        ax.grid(axis="x", visible=False)
    axes[1].axhline(0, color=INK, linewidth=0.9)
    model_legend(axes, MODELS)
    return axes


# --- verdicts -----------------------------------------------------------------------------------------------------------


def verdict_table(hypotheses: pd.DataFrame) -> pd.DataFrame:
    """The table `hypotheses` for reading: the effect with its interval and unit as one text."""

    def effect(row: pd.Series) -> str:
        if np.isnan(row["effect"]):
            return "–"
        middle, low, high = (
            format_number(row[name], sign="+") for name in ("effect", "ci_low", "ci_high")
        )
        return f"{middle} [{low}, {high}]" + (
            "" if row["unit"] in (RHO, SHARE) else f" {row['unit']}"
        )

    shown = hypotheses.assign(effect=hypotheses.apply(effect, axis=1))[
        ["hypothesis", "measure", "effect", "tracks", "seeds", "verdict"]
    ]
    return shown.rename(columns=dict(effect="effect [95 % interval]"))
