"""Figures and tables of the scores and of the cost: notebook 05."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

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
    table = table.reindex(index=_ordered(table.index), columns=list(TABLE_METRICS))
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
        "difference [95 % interval]": list(map(style.format_interval, _differences(rows))),
    }
    return pd.DataFrame(columns).reset_index(drop=True)


def scores(tracks: pd.DataFrame, summary: pd.DataFrame, target: str) -> np.ndarray:
    """Plot SDR, SIR and SAR of every track and model, with the median and its interval.

    Dots are means over seeds. An arrow replaces values from 80 dB on: the SAR of the mixture.
    """
    axes = style.new_axes(8, 1, len(SHOWN_METRICS))
    means = _track_means(tracks, target)
    models = _ordered(means["SDR"])
    for ax, metric in zip(axes, SHOWN_METRICS, strict=True):
        _track_dots(ax, means[metric], _medians(summary, target, metric), models)
        ax.set_title(metric)
    axes[0].set_ylabel("score (dB): tracks; median, 95 % interval")
    style.model_legend(axes, models)
    return axes


def overview(parts: Mapping[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]]) -> np.ndarray:
    """Plot the SDR of every track and model for several runs and targets on one scale.

    `parts` is {(music, target): (tracks, summary)}, tables of a run.
    """
    axes = style.new_axes(7.2, 1, len(parts), sharey=True, squeeze=False)[0]
    models = _ordered(pd.concat([tracks["model"] for tracks, _ in parts.values()]))
    for ax, ((music, target), (tracks, summary)) in zip(axes, parts.items(), strict=True):
        _track_dots(ax, _track_means(tracks, target)["SDR"], _medians(summary, target), models)
        ax.set_title(f"{target}\n{music}", fontsize=7.5)
        ax.tick_params(axis="x", labelbottom=False, length=0)
    low, high = np.transpose([ax.dataLim.intervaly for ax in axes])
    axes[0].set_ylim(max(low.min(), LOWEST_SHOWN_DB) - 1, high.max() + 1)
    axes[0].set_ylabel("SDR (dB): tracks; median, 95 % interval")
    style.model_legend(axes, models)
    return axes


def _track_dots(ax: Axes, means: pd.DataFrame, medians: pd.DataFrame, models: list[str]) -> None:
    style.fit_ylim(ax, means.stack())
    for x, model in enumerate(models):
        style.dots(ax, x, means.get(model, pd.Series(dtype=float)), model, medians.loc[model])
    style.category_axis(ax, ["mix." if name == MIXTURE else SHORT_LABELS[name] for name in models])


def trade_off(tracks: pd.DataFrame, summary: pd.DataFrame, target: str) -> np.ndarray:
    """Plot SDR against SIR and against SAR: small markers are tracks, large ones medians."""
    axes = style.new_axes(7.6, 1, 2, sharey=True)
    means = _track_means(tracks, target)
    means = means.where(means.abs() < MAX_SCORE_DB)
    models = [name for name in _ordered(means["SDR"]) if name != MIXTURE]  # it has no artifacts
    for ax, metric in zip(axes, ("SIR", "SAR"), strict=True):
        x, y = (_medians(summary, target, name)["median"] for name in (metric, "SDR"))
        for model in models:
            pale = dict(s=11, edgecolors="white", linewidths=0.3, alpha=0.5)
            ax.scatter(means[metric, model], means["SDR", model], **style.look(model), **pale)
            if max(x[model], y[model]) < MAX_SCORE_DB:
                large = dict(s=50, edgecolors=INK, linewidths=1, zorder=3)
                ax.scatter(x[model], y[model], **style.look(model), **large)
        ax.set_xlabel(f"{metric} (dB)")
    axes[0].set_ylabel("SDR (dB): tracks; medians large")
    style.model_legend(axes, models)
    return axes


def track_lines(tracks: pd.DataFrame, paired: pd.DataFrame, target: str) -> np.ndarray:
    """Plot the SDR of every track under two models, joined by a line; one of the axes per pair.

    A line has the colour of the better model; the title is the median difference and its interval.
    """
    axes = style.new_axes(7, 1, 3, sharey=True)
    sdr = _track_means(tracks, target)["SDR"].replace([np.inf, -np.inf], np.nan)
    rows = paired[(paired["target"] == target) & (paired["metric"] == "SDR")]
    for ax, row in zip(axes, _differences(rows), strict=False):
        a, b = row["a"], row["b"]
        both = sdr[[b, a]].dropna()
        for left, right in both.itertuples(index=False):
            colour = COLOURS[a if right > left else b]
            ax.plot((0, 1), (left, right), color=colour, alpha=0.55, linewidth=0.9)
        for x, model in enumerate(both):
            white = dict(s=13, edgecolors="white", linewidths=0.3, zorder=3)
            ax.scatter([x] * len(both), both[model], **style.look(model), **white)
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
        rows = _differences(table[(table["target"] == target) & (table["metric"] == metric)])
        differences = [means[metric, row["a"]] - means[metric, row["b"]] for row in rows]
        ax.axhline(0, color=INK, linewidth=0.9)
        style.fit_ylim(ax, np.concatenate(differences))
        for x, row in enumerate(rows):
            style.dots(ax, x, differences[x], row["a"], row)
        style.category_axis(ax, list(map(_pair_label, rows)))
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
            row, bars = values.loc[model], style.error_bars(values.loc[model])
            options = dict(markersize=7, markeredgewidth=1.5, capsize=3) | style.look(model)
            ax.errorbar(row["median"], y, xerr=bars, **options)
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
    divisor, unit = (60, "min") if means["train_s"].max() > 300 else (1, "s")
    times = (means["train_s"] / divisor, 1000 * means["inference_rtf"])
    sdr, models = _medians(summary, target), _ordered(means.index)
    for ax, time in zip(axes, times, strict=True):
        for model in models:
            row = sdr.loc[model]
            options = dict(markersize=7, capsize=3) | style.look(model)
            ax.errorbar(time[model], row["median"], style.error_bars(row), **options)
        ax.axhline(sdr["median"][MIXTURE], color=COLOURS[MIXTURE], linestyle="--", linewidth=1.4)
        ax.axhline(sdr["median"]["irm"], color=COLOURS["irm"], linestyle=":", linewidth=1.4)
        ax.set_xlim(0, 1.12 * ax.get_xlim()[1])
    for name, points in ((MIXTURE, 3), ("irm", -9)):
        style.label_line(axes[0], sdr["median"][name], LABELS[name], points, color=COLOURS[name])
    axes[0].set(xlabel=f"training time ({unit})", ylabel="median SDR (dB)")
    axes[1].set_xlabel("time to separate one second of audio (ms)")
    style.model_legend(axes, models)
    return axes


def _ordered(models: Iterable[str]) -> list[str]:
    return [name for name in LABELS if name in set(models)]


def _track_means(tracks: pd.DataFrame, target: str) -> pd.DataFrame:
    """Average over seeds: a row per track, columns (metric, model)."""
    rows = tracks[tracks["target"] == target]
    return rows.groupby(["track", "model"])[list(SHOWN_METRICS)].mean().unstack("model")


def _medians(summary: pd.DataFrame, target: str, metric: str = "SDR") -> pd.DataFrame:
    """Select median, ci_low and ci_high: a row per model, NaN for models without a score."""
    rows = summary[(summary["target"] == target) & (summary["metric"] == metric)]
    return rows.set_index("model").reindex(LABELS)


def _differences(rows: pd.DataFrame) -> list[dict]:
    return rows.rename(columns={"median_difference": "median"}).to_dict("records")


def _pair_label(row: Mapping[str, str]) -> str:
    return f"{SHORT_LABELS[row['a']]} − {SHORT_LABELS[row['b']]}"
