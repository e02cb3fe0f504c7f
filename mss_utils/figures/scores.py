"""Figures and tables of the scores and of the cost: notebook 05."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mss_utils.config import COMPARED_MODELS
from mss_utils.data import MIXTURE
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.figures import style
from mss_utils.figures.style import COLOURS, INK, LABELS, SHORT_LABELS, SHOWN_METRICS, format_number

TABLE_METRICS = (*SHOWN_METRICS, "ISR", "utterance_SDR", "SI_SDR")
LOWEST_SHOWN_DB = -15.0  # the overview does not show tracks below


def score_table(summary: pd.DataFrame, target: str, aggregate: str = "median") -> pd.DataFrame:
    """Format the table `summary` for reading: a row per model, a column per metric, in dB.

    `aggregate` is "median" (with the 95 % interval) or "mean".
    """
    rows = summary[(summary["target"] == target) & summary["metric"].isin(TABLE_METRICS)]
    cells, title = rows[aggregate].map(format_number), f"{aggregate} over tracks"
    if aggregate == "median":
        low, high = (rows[end].map(lambda x: format_number(x, 1)) for end in ("ci_low", "ci_high"))
        cells, title = cells + " [" + low + ", " + high + "]", f"{title} [95 % interval]"
    table = rows.assign(cell=cells).pivot(index="model", columns="metric", values="cell")
    table = table.reindex(index=style.ordered(table.index), columns=list(TABLE_METRICS))
    table = table.rename(index=LABELS, columns=dict(utterance_SDR="utterance SDR", SI_SDR="SI-SDR"))
    return table.rename_axis(index=None, columns=f"{title}, dB")


def ablation_table(ablations: pd.DataFrame, target: str) -> pd.DataFrame:
    """Format the table `ablations` for reading: a row per ablation and metric, in dB."""
    rows = ablations[(ablations["target"] == target) & ablations["metric"].isin(SHOWN_METRICS)]
    columns = {
        "model": rows["model"].map(LABELS),
        "left out": rows["ablation"].str.replace("_", " "),
        "metric": rows["metric"],
        "with": rows["with_it"].map(format_number),
        "without": rows["without_it"].map(format_number),
        "difference [95 % interval]": list(map(style.format_interval, _records(rows))),
    }
    return pd.DataFrame(columns).reset_index(drop=True)


def scores(tracks: pd.DataFrame, summary: pd.DataFrame, target: str) -> np.ndarray:
    """Plot SDR, SIR and SAR of every track and model, with the median and its interval.

    Dots are means over seeds. An arrow replaces values from 80 dB on: the SAR of the mixture.
    """
    axes = style.new_axes(8, 1, len(SHOWN_METRICS))
    models = style.ordered(tracks["model"])
    for ax, metric in zip(axes, SHOWN_METRICS, strict=True):
        _model_dots(ax, tracks, summary, target, models, metric)
        ax.set_title(metric)
    axes[0].set_ylabel("score (dB): tracks; median, 95 % interval")
    style.model_legend(axes, models)
    return axes


def overview(parts: Mapping[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]]) -> np.ndarray:
    """Plot the SDR of every track and model for several runs and targets on one scale.

    `parts` is {(music, target): (tracks, summary)}, tables of a run.
    """
    axes = style.new_axes(7.2, 1, len(parts), sharey=True, squeeze=False)[0]
    models = style.ordered(pd.concat([tracks["model"] for tracks, _ in parts.values()]))
    for ax, ((music, target), (tracks, summary)) in zip(axes, parts.items(), strict=True):
        _model_dots(ax, tracks, summary, target, models)
        ax.set_title(f"{target}\n{music}", fontsize=7.5)
        ax.tick_params(axis="x", labelbottom=False, length=0)
    axes[0].set_ylim(bottom=max(axes[0].get_ylim()[0], LOWEST_SHOWN_DB))
    axes[0].set_ylabel("SDR (dB): tracks; median, 95 % interval")
    style.model_legend(axes, models)
    return axes


def _model_dots(ax: Axes, tracks, summary, target: str, models: list[str], metric="SDR") -> None:
    means = _track_means(tracks, target)[metric].reindex(columns=models)
    medians = _medians(summary, target, metric)
    groups = [(model, means[model], medians.loc[model]) for model in models]
    style.track_dots(ax, groups, [SHORT_LABELS[model] for model in models])


def trade_off(tracks: pd.DataFrame, summary: pd.DataFrame, target: str) -> np.ndarray:
    """Plot SDR against SIR and against SAR: small markers are tracks, large ones medians."""
    axes = style.new_axes(7.6, 1, 2, sharey=True)
    means = _track_means(tracks, target)
    means = means.where(means.abs() < MAX_SCORE_DB)
    models = style.ordered(set(means["SDR"]) - {MIXTURE})  # which has no artifacts
    for ax, metric in zip(axes, ("SIR", "SAR"), strict=True):
        x, y = (_medians(summary, target, name)["median"] for name in (metric, "SDR"))
        for model in models:
            look, pairs = style.look(model), means[[(metric, model), ("SDR", model)]]
            ax.scatter(*pairs.to_numpy().T, alpha=0.5, **look, **style.DOTS)
            ax.scatter(x[model], y[model], s=50, edgecolors=INK, zorder=3, **look)
        ax.set_xlabel(f"{metric} (dB)")
    axes[0].set_ylabel("SDR (dB): tracks; medians large")
    style.model_legend(axes, models)
    return axes


def track_lines(tracks: pd.DataFrame, paired: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the SDR of every track under two of A, B1 and B2, joined by a line; axes per pair.

    A line has the colour of the better model; the title is the median difference and its interval.
    """
    axes = style.new_axes(7, 1, 3, sharey=True)
    sdr = _track_means(tracks, target)["SDR"]
    paired = paired[paired[["a", "b"]].isin(COMPARED_MODELS).all(axis=1)]
    for ax, row in zip(axes, _differences(paired, target, "SDR"), strict=True):
        a, b = row["a"], row["b"]
        both = sdr[[b, a]].dropna()
        for left, right in both.itertuples(index=False):
            colour = COLOURS[a if right > left else b]
            ax.plot((0, 1), (left, right), color=colour, alpha=0.55, linewidth=0.9)
        for x, model in enumerate(both):
            ax.scatter([x] * len(both), both[model], zorder=3, **style.look(model), **style.DOTS)
        higher = f"{SHORT_LABELS[a]} higher on {(both[a] > both[b]).sum()} of {len(both)}"
        title = f"{_pair_label(row)}: {style.format_interval(row)} dB\n{higher}"
        ax.set_title(title, fontsize=7.2, fontweight="normal")
        style.category_axis(ax, [SHORT_LABELS[b], SHORT_LABELS[a]], margin=0.3)
    axes[0].set_ylabel("SDR (dB), one line per track")
    return axes


def paired(tracks: pd.DataFrame, table: pd.DataFrame, target: str) -> np.ndarray:
    """Plot differences between two models on every track, with the median from table `paired`."""
    axes = style.new_axes(7, 1, len(SHOWN_METRICS))
    means = _track_means(tracks, target)
    for ax, metric in zip(axes, SHOWN_METRICS, strict=True):
        rows = _differences(table, target, metric)
        groups = [
            (row["a"], means[metric, row["a"]] - means[metric, row["b"]], row) for row in rows
        ]
        ax.axhline(0, color=INK, linewidth=0.9)
        labels = [_pair_label(row).replace(" − ", "\n− ") for row in rows]
        style.track_dots(ax, groups, labels)
        ax.set_title(metric)
    axes[0].set_ylabel("difference (dB): tracks; median, 95 % interval")
    return axes


def opinion(table: pd.DataFrame, summary: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the mean opinion of the listeners beside the median SDR, both with intervals."""
    axes = style.new_axes(5.2, 1, 2, sharey=True)
    rows = table[table["target"] == target].iloc[::-1].set_index("model")
    columns = (rows.assign(median=rows["mean"]), _medians(summary, target))
    for ax, values in zip(axes, columns, strict=True):
        for y, model in enumerate(rows.index):
            row, options = values.loc[model], dict(markersize=7, mew=1.5) | style.look(model)
            ax.errorbar(row["median"], y, xerr=style.error_bars(row), **options)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [LABELS[model] for model in rows.index])
    axes[0].set(xlim=(-3, 103), ylim=(-0.6, len(rows) - 0.4))
    axes[0].set_xlabel("mean opinion (0 bad, 100 excellent)")
    axes[1].set_xlabel("median SDR (dB)")
    return axes


def cost(table: pd.DataFrame, summary: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the median SDR against training time and against separation time."""
    axes = style.new_axes(6.4, 1, 2, sharey=True)
    means = table[table["target"] == target].groupby("model")[["train_s", "inference_rtf"]].mean()
    sdr, models = _medians(summary, target), style.ordered(means.index)
    for ax, time in zip(axes, (means["train_s"] / 60, 1000 * means["inference_rtf"]), strict=True):
        for model in models:
            row, options = sdr.loc[model], dict(markersize=7) | style.look(model)
            ax.errorbar(time[model], row["median"], style.error_bars(row), **options)
        for name, points in ((MIXTURE, 3), ("irm", -9)):
            line = dict(color=COLOURS[name], linestyle=style.LINES[name])
            style.labelled_line(ax, sdr["median"][name], LABELS[name], points, **line)
        ax.set_xlim(0, 1.15 * time.max())
    axes[0].set(xlabel="training time (min)", ylabel="median SDR (dB)")
    axes[1].set_xlabel("time to separate one second of audio (ms)")
    style.model_legend(axes, models)
    return axes


def _track_means(tracks: pd.DataFrame, target: str) -> pd.DataFrame:
    """Average over seeds: a row per track, columns (metric, model)."""
    rows = tracks[tracks["target"] == target]
    return rows.groupby(["track", "model"])[list(SHOWN_METRICS)].mean().unstack("model")


def _medians(summary: pd.DataFrame, target: str, metric: str = "SDR") -> pd.DataFrame:
    """Select median, ci_low and ci_high: a row per model, NaN for models without a score."""
    rows = summary[(summary["target"] == target) & (summary["metric"] == metric)]
    return rows.set_index("model").reindex(LABELS)


def _differences(paired: pd.DataFrame, target: str, metric: str) -> list[dict]:
    return _records(paired[(paired["target"] == target) & (paired["metric"] == metric)])


def _records(differences: pd.DataFrame) -> list[dict]:
    return differences.rename(columns={"median_difference": "median"}).to_dict("records")


def _pair_label(row: Mapping[str, str]) -> str:
    return f"{SHORT_LABELS[row['a']]} − {SHORT_LABELS[row['b']]}"
