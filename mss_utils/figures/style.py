"""Colours and labels of the models, saving and showing, and marks that several figures share."""

import html
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, SVG, Code, Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mss_utils.config import MODEL_LETTERS, ROOT, Run
from mss_utils.evaluation.bsseval import MAX_SCORE_DB
from mss_utils.files import atomic_write, safe_name

# A works on spectrograms (cold colour), B0, B1 and B2 on waveforms (warm). Colours differ in
# lightness, markers and lines in shape, so that a grey print is readable.
STYLES = {  # label, colour, marker, line
    "mixture": ("mixture", "#9a9a9a", "v", ":"),
    "unet": ("A U-Net", "#1f5a99", "o", "-"),
    "demucs_framewise": ("B0 Demucs, framewise", "#b08968", "P", (0, (4, 1, 1, 1, 1, 1))),
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
SHORT_LABELS = LABELS | MODEL_LETTERS | dict(mixture="mix.", irm="IRM", mwf="MWF")
SHOWN_METRICS = ("SDR", "SIR", "SAR")  # ISR is in the tables

WIDTH = 16 / 2.54  # inches: the text width of the report
INK = "#30363d"
FREQUENCIES = {100: "100", 300: "300", 1000: "1k", 3000: "3k", 10000: "10k"}  # ticks in Hz
DOTS = dict(s=12, edgecolors="white", linewidths=0.3)

plt.style.use("mss_utils.figures.report")  # report.mplstyle


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
    save(axes, run, name, ("svg", "png"))
    path = run.folder / "figures" / f"{safe_name(name)}.png"
    width = round(figure_of(axes).get_figwidth() * 120)
    image = Image(filename=str(path), width=width, alt=alt)
    display(image, HTML(f"<small>{html.escape(alt)}</small>"))


def show_diagram(name: str, alt: str) -> None:
    """Display the hand-drawn `report/diagrams/<name>.svg` (pipeline, unet or demucs)."""
    path = ROOT / "report" / "diagrams" / f"{name}.svg"
    display(SVG(filename=str(path)), HTML(f"<small>{html.escape(alt)}</small>"))


def show_source(*objects: Any) -> HTML:
    """Show the source code of classes or functions in a notebook, highlighted."""
    code = Code("\n\n".join(inspect.getsource(item) for item in objects), language="python")
    return HTML(f"<div style='font-family: monospace'>{code._repr_html_()}</div>")


def save(axes: Axes | np.ndarray, run: Run, name: str, kinds: Sequence[str] = ("svg",)) -> None:
    """Save a figure as `results/<run>/figures/<name>.<kind>` for each of `kinds`, and close it."""
    for kind in kinds:
        with atomic_write(run.folder / "figures" / f"{safe_name(name)}.{kind}") as part:
            # without the date, which would make every file differ
            figure_of(axes).savefig(part, format=kind, metadata={"Date": None})
    plt.close(figure_of(axes))


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
    names = ("median", "ci_low", "ci_high")
    median, low, high = (format_number(row[name], sign="+") for name in names)
    return f"{median} [{low}, {high}]"


def new_axes(height_cm: float, rows: int = 1, columns: int = 1, **options) -> Axes | np.ndarray:
    """Create a figure of report width and return its axes, as `plt.subplots` does."""
    size = (WIDTH, height_cm / 2.54)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)[1]


def figure_of(axes: Axes | np.ndarray) -> Figure:
    """Return the figure of axes."""
    return np.ravel(axes)[0].figure


def legend_below(axes: np.ndarray) -> None:
    """Add a legend below all axes with the labels of the first one."""
    lines = axes.flat[0].get_legend_handles_labels()
    figure_of(axes).legend(*lines, ncols=6, loc="outside lower center")


def model_legend(axes: np.ndarray, models: Iterable[str]) -> None:
    """Add a legend below all axes with the markers of models."""
    handles = [plt.Line2D([], [], ls="", label=LABELS[name], **look(name)) for name in models]
    figure_of(axes).legend(handles=handles, ncols=3, loc="outside lower center")


def ordered(models: Iterable[str]) -> list[str]:
    """Return models in reading order, each once."""
    return [name for name in LABELS if name in set(models)]


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


def labelled_line(ax: Axes, y: float, text: str, points: float = 3, **line) -> None:
    """Draw a horizontal line with a text at its left end, `points` above it."""
    line = dict(color=INK, linewidth=0.9) | line
    ax.axhline(y, **line)
    place = (0.01, y), (0, points), ax.get_yaxis_transform(), "offset points"
    ax.annotate(text, *place, fontsize=7, color=line["color"])


def jitter(count: int, spread: float) -> np.ndarray:
    """Return reproducible offsets within +-spread: multiples of the golden ratio, wrapped."""
    return spread * (2 * (np.arange(count) * 0.618034 % 1) - 1)


def error_bars(row: Mapping) -> np.ndarray:
    """Return the lengths of error bars, `(2, n)`, from median, ci_low and ci_high."""
    lengths = row["median"] - row["ci_low"], row["ci_high"] - row["median"]
    return np.reshape(lengths, (2, -1)).clip(min=0)


def track_dots(ax: Axes, groups: Iterable[tuple], labels: Sequence[str]) -> None:
    """Draw groups at x = 0, 1, ...: a dot per track, right of them the median and its interval.

    A group is a model, a series of values, and a row with median, ci_low and ci_high. An arrow
    replaces values from 80 dB on.
    """
    for x, (model, values, row) in enumerate(groups):
        shown = values[values.abs() < MAX_SCORE_DB]
        places = x - 0.14 + jitter(len(shown), 0.2)
        ax.scatter(places, shown, alpha=0.7, **look(model), **DOTS)
        if (values >= MAX_SCORE_DB).any():
            arrow = dict(arrowprops=dict(arrowstyle="-|>", color=COLOURS[model]))
            arrow |= dict(xycoords=ax.get_xaxis_transform(), ha="center", fontsize=6.5)
            ax.annotate(format_db(MAX_SCORE_DB, 0), (x, 1), (x, 0.86), **arrow)
        if abs(row["median"]) < MAX_SCORE_DB:
            marker = dict(marker=MARKERS[model], markerfacecolor=COLOURS[model], color=INK)
            sizes = dict(markersize=5.5, markeredgewidth=0.9, elinewidth=1.3, zorder=3)
            ax.errorbar(x + 0.27, row["median"], error_bars(row), **marker, **sizes)
    category_axis(ax, labels)
