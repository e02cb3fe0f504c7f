"""Colours and labels of the models, saving and showing, and marks that several figures share."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, SVG, Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mss_utils.config import MODEL_LETTERS, ROOT, Run
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.files import atomic_write, safe_name

# A works on spectrograms (cold colour), B1 and B2 on waveforms (warm). Colours differ in lightness,
# markers and lines in shape, so that a grey print is readable.
STYLES = {  # label, colour, marker, line
    "mixture": ("mixture", "#9a9a9a", "v", ":"),
    "unet": ("A U-Net", "#1f5a99", "o", "-"),
    "demucs_lstm": ("B1 Demucs + BiLSTM", "#d1553d", "s", "--"),
    "demucs_attention": ("B2 Demucs + attention", "#e9ae3c", "D", "-."),
    "irm": ("ratio-mask oracle", "#2b2b2b", "^", (0, (1, 1))),
    "mwf": ("Wiener-filter oracle", "#5d5566", "p", "-"),
    "reference": ("reference", "#5f7f5f", "|", "-"),
    "anchor": ("low anchor", "#b99c7d", "|", "-"),
}
LABELS = {name: label for name, (label, _, _, _) in STYLES.items()}
COLOURS = {name: colour for name, (_, colour, _, _) in STYLES.items()}
MARKERS = {name: marker for name, (_, _, marker, _) in STYLES.items()}
LINES = {name: line for name, (_, _, _, line) in STYLES.items()}
SHORT_LABELS = LABELS | MODEL_LETTERS | {"irm": "IRM", "mwf": "MWF"}
SHOWN_METRICS = ("SDR", "SIR", "SAR")  # ISR is in the tables

ESTIMATE = ("median", "ci_low", "ci_high")
WIDTH = 16 / 2.54  # inches: the text width of the report
INK, PALE = "#30363d", "#eef1f4"

plt.rc("font", size=8)
plt.rc("axes", edgecolor=INK, linewidth=0.7, grid=True, axisbelow=True)
plt.rc("axes", labelsize=8, titlesize=8.5, titleweight="bold")
plt.rc("axes.spines", top=False, right=False)
plt.rc(("xtick", "ytick"), labelsize=7.5)
plt.rc(("xtick.major", "ytick.major"), width=0.7)
plt.rc("grid", color="#e3e6ea", linewidth=0.6)
plt.rc("lines", linewidth=1.5, markersize=4.5)
plt.rc("legend", fontsize=7.5, frameon=False)
plt.rc("figure", dpi=110)
plt.rc("image", interpolation="nearest")
plt.rc("text", parse_math=False)  # stem names may contain dollar signs
plt.rc("svg", hashsalt="mss")  # the same figure is the same file


def show(axes: Axes | np.ndarray, run: Run, name: str, alt: str) -> None:
    """Save a figure, display it with a caption, and close it.

    Parameters
    ----------
    axes : Axes or array of Axes
    run : Run
    name : str
        The files are `results/<run>/figures/<name>.svg` and `.png`.
    alt : str
        Description of the figure: caption, and text for screen readers.
    """
    fig = figure_of(axes)
    _save(fig, run, name, "svg")
    path = _save(fig, run, name, "png")
    plt.close(fig)
    image = Image(filename=str(path), width=round(fig.get_figwidth() * 120), alt=alt)
    display(image, HTML(f"<small>{html.escape(alt)}</small>"))


def show_diagram(name: str, alt: str) -> None:
    """Display the hand-drawn `report/diagrams/<name>.svg` (pipeline, unet or demucs)."""
    diagram = SVG(filename=str(ROOT / "report" / "diagrams" / f"{name}.svg"))
    display(diagram, HTML(f"<small>{html.escape(alt)}</small>"))


def save_vector(axes: Axes | np.ndarray, run: Run, name: str) -> None:
    """Save a figure as `results/<run>/figures/<name>.svg` and close it."""
    _save(figure_of(axes), run, name, "svg")
    plt.close(figure_of(axes))


def _save(fig: Figure, run: Run, name: str, suffix: str) -> Path:
    path = run.folder / "figures" / f"{safe_name(name)}.{suffix}"
    metadata = {"Date": None} if suffix == "svg" else None  # else every save would differ
    with atomic_write(path) as part:
        fig.savefig(part, format=suffix, dpi=200, metadata=metadata)
    return path


def format_db(value: float, digits: int = 1) -> str:
    """Format a level or score with its unit."""
    return f"{format_number(value, digits)} dB"


def format_number(value: float, digits: int = 2, sign: str = "") -> str:
    """Format a score; from 80 dB on as "> 80", NaN as a dash, with a plus for `sign="+"`."""
    if np.isnan(value):
        return "–"
    if value >= MAX_SCORE_DB:
        return f"> {MAX_SCORE_DB:.0f}"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def format_interval(row: Mapping[str, float]) -> str:
    """Format median, ci_low and ci_high of a difference, with signs."""
    median, low, high = (format_number(row[name], sign="+") for name in ESTIMATE)
    return f"{median} [{low}, {high}]"


def new_axes(height_cm: float, rows: int = 1, columns: int = 1, **options) -> Axes | np.ndarray:
    """Create a figure of report width and return its axes, as `plt.subplots` does."""
    size = (WIDTH, height_cm / 2.54)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)[1]


def figure_of(axes: Axes | np.ndarray) -> Figure:
    """Return the figure of axes."""
    return np.ravel(axes)[0].figure


def legend_below(axes: np.ndarray, columns: int) -> None:
    """Add a legend below all axes with the labels of the first one."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure_of(axes).legend(handles, labels, ncols=columns, loc="outside lower center")


def model_legend(axes: np.ndarray, models: Sequence[str]) -> None:
    """Add a legend below all axes with the markers of models."""
    handles = [
        plt.Line2D([], [], linestyle="", label=LABELS[name], **look(name)) for name in models
    ]
    options = dict(
        ncols=3 if len(models) > 4 else len(models), columnspacing=1.2, handletextpad=0.2
    )
    figure_of(axes).legend(handles=handles, loc="outside lower center", **options)


def look(model: str) -> dict:
    """Return colour and marker of a model as arguments of plot and scatter."""
    return dict(color=COLOURS[model], marker=MARKERS[model])


def line_look(model: str) -> dict:
    """Return colour and line of a model as arguments of plot."""
    return dict(color=COLOURS[model], linestyle=LINES[model])


def category_axis(ax: Axes, labels: Sequence[str], margin: float = 0.6) -> None:
    """Label the positions 0, 1, ... of the x axis."""
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-margin, len(labels) - 1 + margin)
    ax.grid(axis="x", visible=False)


def label_line(ax: Axes, y: float, text: str, points: float, **options) -> None:
    """Write a text at the left end of a horizontal line, `points` above it."""
    coordinates = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
    ax.annotate(text, (0, y), (4, points), fontsize=7, **coordinates, **options)


def frequency_ticks(highest_hz: float) -> tuple[list[int], list[str]]:
    """Return tick positions in Hz and their labels."""
    ticks = [hz for hz in (100, 300, 1000, 3000, 10000) if hz < highest_hz]
    return ticks, [f"{hz // 1000}k" if hz >= 1000 else str(hz) for hz in ticks]


def jitter(count: int, spread: float) -> np.ndarray:
    """Return reproducible offsets within +-spread: multiples of the golden ratio, wrapped."""
    return spread * (2 * (np.arange(count) * 0.618034 % 1) - 1)


def fit_ylim(ax: Axes, values: Sequence[float]) -> None:
    """Set limits that show all values below 80 dB, and lines that have been drawn before."""
    finite = np.append(values, ax.dataLim.intervaly)
    finite = finite[np.abs(finite) < MAX_SCORE_DB]
    low, high = (finite.min(), finite.max()) if len(finite) else (-1, 1)
    margin = 0.07 * max(high - low, 1)
    ax.set_ylim(low - margin, high + margin)


def error_bars(row: Mapping) -> np.ndarray:
    """Return lengths of error bars from median, ci_low and ci_high; zero without an interval."""
    lengths = row["median"] - row["ci_low"], row["ci_high"] - row["median"]
    return np.nan_to_num(lengths).clip(min=0).reshape(2, -1)


def dots(ax: Axes, x: float, values: pd.Series, model: str, row: Mapping[str, float]) -> None:
    """Draw a dot per track, and right of them median, ci_low and ci_high of `row`.

    Values above the limits of the axes become an arrow with their median.
    """
    low, high = ax.get_ylim()
    inside, outside = values[(values > low) & (values < high)], values[values >= high]
    white = dict(edgecolors="white", linewidths=0.3, alpha=0.7)
    ax.scatter(x - 0.14 + jitter(len(inside), 0.2), inside, s=12, **look(model), **white)
    if len(outside):
        text, below = format_db(np.median(outside), 0), high - 0.14 * (high - low)
        arrow = dict(arrowstyle="-|>", color=COLOURS[model])
        ax.annotate(text, (x, high), (x, below), ha="center", fontsize=6.5, arrowprops=arrow)
    if low < row["median"] < high:
        marker = dict(marker=MARKERS[model], markerfacecolor=COLOURS[model], color=INK, zorder=3)
        sizes = dict(markersize=5.5, markeredgewidth=0.9, elinewidth=1.3, capsize=2.5)
        ax.errorbar(x + 0.27, row["median"], error_bars(row), **marker, **sizes)
