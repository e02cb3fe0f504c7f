"""Figures of the models and their training: notebooks 02 to 04."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, Code, display
from matplotlib.axes import Axes

from mss_utils.figures import style
from mss_utils.figures.style import INK, LABELS


def training_curves(histories: Mapping[str, Sequence[pd.DataFrame]]) -> np.ndarray:
    """Plot training loss and validation SDR (rows) against steps and against time (columns).

    `histories` is {model: [history of each seed]}, tables with the columns of `history.csv`.
    """
    axes = style.new_axes(8.4, 2, 2, sharex="col", sharey="row")
    longest = max(history["train_s"].max() for seeds in histories.values() for history in seeds)
    divisor, unit = (60, "min") if longest > 300 else (1, "s")
    for model, seeds in histories.items():
        for seed, history in enumerate(seeds):
            options = dict(alpha=0.45) if seed else dict(label=LABELS[model])
            options |= dict(markersize=3.2) | style.look(model)
            for column, x in enumerate((history["step"], history["train_s"] / divisor)):
                axes[0, column].plot(x, history["train_loss_db"], **options)
                axes[1, column].plot(x, history["valid_sdr_db"], **options)
    axes[0, 0].set(ylabel="training loss (dB)", title="Loss: negative SNR, lower is better")
    axes[1, 0].set(ylabel="SDR (dB)", title="Validation SDR, higher is better")
    for ax, label in zip(axes[1], ("training step", f"training time ({unit})"), strict=True):
        ax.set(xlabel=label, xlim=(0, None))
    if len(histories) > 1:
        style.legend_below(axes, len(histories))
    return axes


@contextmanager
def live_curves(model: str) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Show one figure that is updated during a training and removed at its end.

    Use it as `with live_curves(model) as live: train(..., on_validation=live)`.
    """
    handle = display(display_id=True)  # None outside notebooks

    def update(history: pd.DataFrame) -> None:
        fig = style.figure_of(training_curves({model: [history]}))
        if handle:
            handle.update(fig)
        plt.close(fig)

    yield update
    if handle:
        handle.update(HTML(""))


def reconstruction(table: pd.DataFrame, model: str) -> Axes:
    """Plot the SDR of a network that is trained to return its input; columns step, sdr_db."""
    ax = style.new_axes(5)
    ax.plot(table["step"], table["sdr_db"], **style.look(model))
    ax.axhline(20, color=INK, linewidth=0.9, linestyle="--")
    style.label_line(ax, 20, "20 dB: the error has 1 % of the energy", 3)
    ax.set(xlabel="training step", ylabel="reconstruction SDR (dB)")
    ax.set_ylim(top=max(23, table["sdr_db"].max() + 2))
    return ax


def positions(table: np.ndarray, rate_hz: float) -> np.ndarray:
    """Show a positional embedding `(frames, width)`; `rate_hz` is frames per second."""
    axes = style.new_axes(5.4, 1, 2, sharey=True)
    for ax, first, name in zip(axes, (0, 1), ("Sines", "Cosines"), strict=True):
        part = np.asarray(table)[:, first::2].T  # (components, frames)
        extent = (0, part.shape[1] / rate_hz, 0, len(part))
        options = dict(origin="lower", aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
        image = ax.imshow(part, extent=extent, **options)
        ax.set(xlabel="position in the segment (s)", title=name)
        ax.grid(visible=False)
    axes[0].set_ylabel("component (slower upwards)")
    style.figure_of(axes).colorbar(image, ax=axes, label="value", pad=0.01)
    return axes


def show_source(*objects: Any) -> HTML:
    """Show the source code of classes or functions in a notebook, highlighted."""
    code = Code("\n\n".join(inspect.getsource(item) for item in objects), language="python")
    return HTML(f"<div style='font-family: monospace'>{code._repr_html_()}</div>")
