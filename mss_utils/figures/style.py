"""The one style: names, colours and markers of the models, saving and showing, and marks that several plots share."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mss_utils.config import MODEL_LETTERS, Run
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.files import atomic_write, safe_name

LABELS = {
    "mixture": "mixture",
    "unet": "A U-Net",
    "demucs_lstm": "B1 Demucs + BiLSTM",
    "demucs_attention": "B2 Demucs + attention",
    "irm": "ratio-mask oracle",
    "mwf": "Wiener-filter oracle",
    "reference": "reference",
    "anchor": "low anchor",
}
SHORT_LABELS = LABELS | MODEL_LETTERS | {"irm": "IRM", "mwf": "MWF"}
# A works on spectrograms (cold), B1 and B2 on waveforms (warm); lightness rises from the oracle to B2.
COLOURS = {
    "mixture": "#9a9a9a",
    "unet": "#1f5a99",
    "demucs_lstm": "#d1553d",
    "demucs_attention": "#e9ae3c",
    "irm": "#2b2b2b",
    "mwf": "#5d5566",
    "reference": "#5f7f5f",
    "anchor": "#b99c7d",
}
MARKERS = {
    "mixture": "v",
    "unet": "o",
    "demucs_lstm": "s",
    "demucs_attention": "D",
    "irm": "^",
    "mwf": "p",
}
SPLIT_COLOURS = {"train": "#b9c4d0", "valid": "#6d8299", "test": "#27384a"}
SHOWN_METRICS = ("SDR", "SIR", "SAR")  # ISR is in the tables
TABLE_METRICS = (*SHOWN_METRICS, "ISR", "utterance_SDR", "SI_SDR")

WIDTH = 16 / 2.54  # inches: the text width of the report
DPI = 200
INK, PALE = "#30363d", "#eef1f4"

plt.rcParams.update(
    {
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "legend.fontsize": 7.5,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "axes.grid": True,
        "grid.color": "#e3e6ea",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "lines.linewidth": 1.5,
        "lines.markersize": 4.5,
        "legend.frameon": False,
        "axes.titleweight": "bold",
        "figure.dpi": 110,
        "svg.hashsalt": "mss",
        "text.parse_math": False,
        "image.interpolation": "nearest",
    }
)


def save(fig: Figure, run: Run, name: str, kinds: Sequence[str] = ("svg", "png")) -> Path:
    """Write `figures/<name>.svg` and `.png` of a run, each through a temporary name; return the path of the last of `kinds`."""
    for suffix in kinds:
        path = run.figure(f"{safe_name(name)}.{suffix}")
        with atomic_write(path) as part:
            # Without a date the same figure is the same file, and git sees a change only where there is one.
            fig.savefig(
                part, format=suffix, dpi=DPI, metadata={"Date": None} if suffix == "svg" else None
            )
    return path


def save_vector(axes: Axes | np.ndarray, run: Run, name: str) -> None:
    """Save the figure of `axes` as SVG alone, and close it."""
    save(figure_of(axes), run, name, kinds=("svg",))
    plt.close(figure_of(axes))


def show(axes: Axes | np.ndarray, run: Run, name: str, alt: str = "") -> None:
    """Save the figure of `axes`, display it here (not at the end of the cell) and close it.

    `alt` says what is to be seen: the caption below the figure, and what a screen reader reads out.
    """
    fig = figure_of(axes)
    path = save(fig, run, name)
    plt.close(fig)
    display(
        Image(
            filename=str(path),
            width=round(fig.get_figwidth() * 120),
            alt=alt or name.replace("_", " "),
        )
    )
    if alt:
        display(HTML(f"<small>{html.escape(alt)}</small>"))


def figure_of(axes: Axes | np.ndarray) -> Figure:
    return np.ravel(axes)[0].figure


def format_db(value: float, digits: int = 1) -> str:
    """A level or score as text."""
    return f"{format_number(value, digits)} dB"


def format_number(value: float, digits: int = 2, sign: str = "") -> str:
    """Decibels without the unit, with a real minus sign (and a plus for `sign="+"`); from 80 dB on, where digits are rounding
    noise, "> 80"; NaN is a dash.
    """
    if np.isnan(value):
        return "–"
    return (
        f"> {MAX_SCORE_DB:.0f}"
        if value >= MAX_SCORE_DB
        else f"{value:{sign}.{digits}f}".replace("-", "−")
    )


def create_axes(
    axes: Axes | np.ndarray | None, height_cm: float, rows: int = 1, columns: int = 1, **options
) -> Axes | np.ndarray:
    """The given axes, or those of a new figure of report width."""
    if axes is not None:
        return axes
    fig, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height_cm / 2.54), layout="constrained", **options
    )
    return axes


# --- shared marks ---------------------------------------------------------------------------------------------------------


def jitter(count: int, spread: float) -> np.ndarray:
    """Offsets in +-spread that neither repeat nor change from call to call: multiples of the golden ratio, wrapped."""
    return spread * (2 * (np.arange(count) * 0.618034 % 1) - 1)


def limit(ax: Axes, values: pd.Series, more: pd.Series | None) -> None:
    """Limits from the models' finite values, and from the mixture's where they are worth the room."""
    finite = pd.concat([values, more]) if more is not None else values
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if len(finite) else (-1, 1)
    margin = 0.07 * max(high - low, 1)
    ax.set_ylim(low - margin, high + margin)


def dots(ax: Axes, x: float, values: np.ndarray, model: str) -> None:
    """One dot a track, left of `x`: the interval stands on the right. What lies above the axes becomes an arrow with a number."""
    low, high = ax.get_ylim()
    inside = values[(values > low) & (values < high)]
    spread = x - 0.14 + jitter(len(inside), 0.2)
    ax.scatter(
        spread,
        inside,
        s=12,
        marker=MARKERS[model],
        color=COLOURS[model],
        alpha=0.7,
        edgecolors="white",
        linewidths=0.3,
    )
    if len(outside := values[values >= high]):
        ax.annotate(
            format_db(np.median(outside), 0),
            (x, high),
            (x, high - 0.14 * (high - low)),
            ha="center",
            fontsize=6.5,
            arrowprops=dict(arrowstyle="-|>", color=COLOURS[model]),
        )


def interval(ax: Axes, x: float, row: pd.Series | None, centre: str, model: str) -> None:
    """The median as a large marker with its interval, right of the dots."""
    low, high = ax.get_ylim()
    if row is not None and low < row[centre] < high:
        error = [[max(0, row[centre] - row["ci_low"])], [max(0, row["ci_high"] - row[centre])]]
        ax.errorbar(
            x + 0.27,
            row[centre],
            np.nan_to_num(error),
            color=INK,
            marker=MARKERS[model],
            markersize=5.5,
            capsize=2.5,
            markerfacecolor=COLOURS[model],
            markeredgewidth=0.9,
            elinewidth=1.3,
            zorder=3,
        )


def model_legend(axes: np.ndarray, models: Sequence[str]) -> None:
    handles = [
        plt.Line2D(
            [], [], linestyle="", marker=MARKERS[name], color=COLOURS[name], label=LABELS[name]
        )
        for name in models
    ]
    columns = len(models) if len(models) < 5 else 3
    figure_of(axes).legend(
        handles=handles,
        ncols=columns,
        loc="outside lower center",
        columnspacing=1.2,
        handletextpad=0.2,
    )


def difference_text(row) -> str:
    """Median difference and interval of a row of paired statistics, with signs, in dB."""
    median, low, high = (
        format_number(value, sign="+") for value in (row.median_difference, row.ci_low, row.ci_high)
    )
    return f"{median} [{low}, {high}]"
