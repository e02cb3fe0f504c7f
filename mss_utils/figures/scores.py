"""Plots and tables of scores and of what they cost. Notebook 05."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mss_utils.data import MIXTURE
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.figures.style import (
    COLOURS,
    INK,
    LABELS,
    MARKERS,
    SHORT_LABELS,
    SHOWN_METRICS,
    TABLE_METRICS,
    create_axes,
    difference_text,
    dots,
    figure_of,
    format_number,
    interval,
    limit,
    model_legend,
)

LOWEST_SHOWN_DB = -15.0  # single tracks below leave the overview


def score_table(summary: pd.DataFrame, target: str, aggregate: str = "median") -> pd.DataFrame:
    """The table `summary` for reading: a row a model, a column a metric, in dB; "median [interval]", or the `mean` over tracks."""
    rows = summary[(summary["target"] == target) & summary["metric"].isin(TABLE_METRICS)]
    brackets = lambda row: (
        f" [{format_number(row.ci_low, 1)}, {format_number(row.ci_high, 1)}]"
        if aggregate == "median"
        else ""
    )
    cells = rows.assign(
        cell=[format_number(getattr(row, aggregate)) + brackets(row) for row in rows.itertuples()]
    )
    table = cells.pivot(index="model", columns="metric", values="cell")
    table = table.reindex(
        index=[name for name in LABELS if name in table.index], columns=list(TABLE_METRICS)
    )
    words = (
        "median over tracks [95 % interval], dB"
        if aggregate == "median"
        else "mean over tracks, dB"
    )
    return table.rename(
        index=LABELS, columns=dict(utterance_SDR="utterance SDR", SI_SDR="SI-SDR")
    ).rename_axis(index=None, columns=words)


def ablation_table(ablations: pd.DataFrame, target: str) -> pd.DataFrame:
    """The table `ablations` for reading: a row an ablation and metric, scores in dB with and without, and the difference."""
    rows = ablations[(ablations["target"] == target) & ablations["metric"].isin(SHOWN_METRICS)]
    return pd.DataFrame(
        {
            "model": rows["model"].map(LABELS),
            "left out": rows["ablation"].str.replace("_", " "),
            "metric": rows["metric"],
            "with": rows["with_it"].map(format_number),
            "without": rows["without_it"].map(format_number),
            "difference [95 % interval]": [difference_text(row) for row in rows.itertuples()],
        }
    ).reset_index(drop=True)


def scores(
    tracks: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """SDR, SIR and SAR of every track as a dot for every model, with the median and its bootstrap interval. Three axes.

    Dots are means over seeds. A value far outside the models' range (the mixture's SAR has no meaning: nothing was
    processed) is written at the edge as an arrow with its number.
    """
    axes = create_axes(axes, 8, 1, len(SHOWN_METRICS))
    table = tracks[tracks["target"] == target]
    models = [name for name in LABELS if name in set(table["model"])]
    for ax, metric in zip(axes, SHOWN_METRICS):
        _clouds(ax, table, summary, target, metric, models)
        ax.set(title=metric)
    axes[0].set_ylabel("score (dB): tracks; median, 95 % interval")
    model_legend(axes, models)
    return axes


def overview(
    parts: Mapping[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]],
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """SDR of every track for every model, an axis a part: `{(music, target): (tracks, summary)}`, tables of those names."""
    axes = np.ravel(create_axes(axes, 7.2, 1, len(parts), sharey=True))
    models = [
        name for name in LABELS if any(name in set(tracks["model"]) for tracks, _ in parts.values())
    ]
    for ax, ((music, target), (tracks, summary)) in zip(axes, parts.items()):
        _clouds(ax, tracks[tracks["target"] == target], summary, target, "SDR", models)
        ax.set_title(f"{target}\n{music}", fontsize=7.5)
        ax.tick_params(axis="x", labelbottom=False, length=0)
    # One scale for all: what the models and the mixture need anywhere.
    low, high = zip(*(ax.dataLim.intervaly for ax in axes))
    axes[0].set_ylim(max(min(low), LOWEST_SHOWN_DB) - 1, max(high) + 1)
    axes[0].set_ylabel("SDR (dB): tracks; median, 95 % interval")
    model_legend(axes, models)
    return axes


def _clouds(
    ax: Axes,
    table: pd.DataFrame,
    summary: pd.DataFrame,
    target: str,
    metric: str,
    models: Sequence[str],
) -> None:
    """A metric of every track, a cloud a model, with its median and interval; `table` holds the tracks of `target`."""
    means = table.groupby(["model", "track"])[metric].mean()
    limit(
        ax,
        means[means.index.get_level_values("model") != MIXTURE],
        means.get(MIXTURE) if metric != "SAR" else None,
    )
    for x, model in enumerate(models):
        values = means.get(model, pd.Series(dtype=float)).dropna()
        dots(ax, x, values.to_numpy(), model)
        interval(ax, x, _summary_row(summary, target, model, metric), "median", model)
    ax.set_xticks(
        range(len(models)), ["mix." if name == MIXTURE else SHORT_LABELS[name] for name in models]
    )
    ax.set_xlim(-0.6, len(models) - 0.4)
    ax.grid(axis="x", visible=False)


def _summary_row(summary: pd.DataFrame, target: str, model: str, metric: str) -> pd.Series | None:
    rows = summary.query("target == @target and model == @model and metric == @metric")
    return rows.iloc[0] if len(rows) else None


def slopes(
    tracks: pd.DataFrame, table: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """SDR of every test track under two models, joined by a line in the colour of the better one. One of three axes a pair.

    `table` is `tables/paired.csv`, whose median difference and interval stand above each pair.
    """
    axes = create_axes(axes, 7, 1, 3, sharey=True)
    rows = table[(table["target"] == target) & (table["metric"] == "SDR")]
    wide = (
        tracks[tracks["target"] == target]
        .groupby(["track", "model"])["SDR"]
        .mean()
        .unstack("model")
    )
    for ax, row in zip(axes, rows.itertuples()):
        ends = (row.b, row.a)
        both = wide[list(ends)].replace([np.inf, -np.inf], np.nan).dropna()
        for first, second in both.itertuples(index=False):
            ax.plot(
                (0, 1),
                (first, second),
                color=COLOURS[ends[second > first]],
                alpha=0.55,
                linewidth=0.9,
            )
        for x, model in enumerate(ends):
            look = dict(
                marker=MARKERS[model], color=COLOURS[model], edgecolors="white", linewidths=0.3
            )
            ax.scatter([x] * len(both), both[model], s=13, zorder=3, **look)
        ahead = int((both[row.a] > both[row.b]).sum())
        title = f"{SHORT_LABELS[row.a]} − {SHORT_LABELS[row.b]}: {difference_text(row)} dB"
        ax.set_title(
            f"{title}\n{SHORT_LABELS[row.a]} ahead on {ahead} of {len(both)}",
            fontsize=7.2,
            fontweight="normal",
        )
        ax.set_xticks((0, 1), [SHORT_LABELS[model] for model in ends])
        ax.set_xlim(-0.3, 1.3)
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("SDR (dB), a line a track")
    return axes


def trade_off(
    tracks: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """SDR against SIR and against SAR: every test track a small mark, the median of each model a large one. Two axes.

    The mixture is left out: untouched, it has no artifacts to measure.
    """
    axes = create_axes(axes, 7.6, 1, 2, sharey=True)
    rows = tracks[tracks["target"] == target]
    models = [name for name in LABELS if name in set(rows["model"]) and name != MIXTURE]
    means = (
        rows.groupby(["model", "track"])[list(SHOWN_METRICS)]
        .mean()
        .replace([np.inf, -np.inf], np.nan)
    )
    means = means.mask(means > MAX_SCORE_DB)
    for ax, metric in zip(axes, ("SIR", "SAR")):
        for model in models:
            look = dict(marker=MARKERS[model], color=COLOURS[model], edgecolors="white")
            ax.scatter(
                means.loc[model, metric],
                means.loc[model, "SDR"],
                s=11,
                alpha=0.5,
                linewidths=0.3,
                **look,
            )
        for model in models:
            middle = [
                _summary_row(summary, target, model, name)["median"] for name in (metric, "SDR")
            ]
            if max(middle) >= MAX_SCORE_DB:
                continue
            ax.scatter(
                *middle,
                s=50,
                marker=MARKERS[model],
                color=COLOURS[model],
                edgecolors=INK,
                linewidths=1,
                zorder=3,
            )
        ax.set(xlabel=f"{metric} (dB)")
    axes[0].set_ylabel("SDR (dB): tracks; medians large")
    model_legend(axes, models)
    return axes


def paired(
    tracks: pd.DataFrame, table: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """Differences between two models track by track, with the median and its interval from `tables/paired.csv`. Three axes."""
    axes = create_axes(axes, 7, 1, len(SHOWN_METRICS))
    rows = table[table["target"] == target]
    pairs = list(dict.fromkeys(zip(rows["a"], rows["b"])))
    wide = (
        tracks[tracks["target"] == target]
        .groupby(["track", "model"])[list(SHOWN_METRICS)]
        .mean()
        .unstack("model")
    )
    for ax, metric in zip(axes, SHOWN_METRICS):
        ax.axhline(0, color=INK, linewidth=0.9)
        differences = {(a, b): (wide[metric][a] - wide[metric][b]).dropna() for a, b in pairs}
        limit(ax, pd.concat([*differences.values(), pd.Series([0.0])]), None)
        for x, (a, b) in enumerate(pairs):
            dots(ax, x, differences[a, b].to_numpy(), a)
            match = rows.query("a == @a and b == @b and metric == @metric")
            interval(ax, x, match.iloc[0] if len(match) else None, "median_difference", a)
        ax.set_xticks(
            range(len(pairs)), [f"{SHORT_LABELS[a]} − {SHORT_LABELS[b]}" for a, b in pairs]
        )
        ax.set(title=metric, xlim=(-0.6, len(pairs) - 0.4))
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("difference (dB): tracks; median, 95 % interval")
    return axes


def opinion(
    table: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """Mean opinion of the listeners, `tables/opinion.csv`, beside the median SDR of the same models; both with intervals. Two axes."""
    axes = create_axes(axes, 5.2, 1, 2, sharey=True)
    rows = table[table["target"] == target].set_index("model")
    names = list(rows.index)[::-1]
    for y, name in enumerate(names):
        scored = _summary_row(summary, target, name, "SDR")
        for ax, row, centre in ((axes[0], rows.loc[name], "mean"), (axes[1], scored, "median")):
            if row is not None:
                error = np.nan_to_num(
                    [[row[centre] - row["ci_low"]], [row["ci_high"] - row[centre]]]
                )
                look = dict(
                    color=COLOURS[name],
                    marker=MARKERS.get(name, "|"),
                    markersize=7,
                    markeredgewidth=1.5,
                    capsize=3,
                )
                ax.errorbar(row[centre], y, xerr=error, **look)
    axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes[0].set(
        xlim=(-3, 103), ylim=(-0.6, len(names) - 0.4), xlabel="mean opinion (0 bad, 100 excellent)"
    )
    axes[1].set(xlabel="median SDR (dB)")
    for ax in axes:
        ax.grid(axis="y", visible=False)
    return axes


def cost(
    table: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None
) -> np.ndarray:
    """Median SDR against training time and against time to separate, between mixture (floor) and oracle (ceiling). Two axes."""
    axes = create_axes(axes, 6.4, 1, 2, sharey=True)
    rows = table[table["target"] == target]
    divisor, unit = (60, "min") if rows["train_s"].max() > 300 else (1, "s")
    for model in [name for name in LABELS if name in set(rows["model"])]:
        part = rows[rows["model"] == model]
        row = _summary_row(summary, target, model, "SDR")
        if row is None:
            continue
        error = np.nan_to_num([[row["median"] - row["ci_low"]], [row["ci_high"] - row["median"]]])
        look = dict(
            color=COLOURS[model],
            marker=MARKERS[model],
            markersize=7,
            capsize=3,
            linestyle="",
            label=LABELS[model],
        )
        for ax, x in zip(
            axes, (part["train_s"].mean() / divisor, 1000 * part["inference_rtf"].mean())
        ):
            ax.errorbar(x, row["median"], error, **look)
    for name, line, above in ((MIXTURE, "--", 3), ("irm", ":", -9)):
        _level_line(axes, _summary_row(summary, target, name, "SDR"), name, line, above)
    axes[0].set(xlabel=f"training time ({unit})", ylabel="median SDR (dB)")
    axes[1].set(xlabel="time to separate one second of audio (ms)")
    for ax in axes:
        ax.set_xlim(0, 1.12 * ax.get_xlim()[1])
    figure_of(axes).legend(
        *axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center"
    )
    return axes


def _level_line(axes: np.ndarray, row: pd.Series | None, name: str, line: str, above: int) -> None:
    if row is None or not np.isfinite(row["median"]):
        return
    for ax in axes:
        ax.axhline(row["median"], color=COLOURS[name], linestyle=line, linewidth=1.4)
    axes[0].annotate(
        LABELS[name],
        (0.01, row["median"]),
        (2, above),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=7,
        color=COLOURS[name],
    )
