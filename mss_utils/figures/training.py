"""Plots of trainings: curves, also while they grow, and the reconstruction check. Notebooks 02 to 05."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.axes import Axes

from mss_utils.figures.style import COLOURS, INK, LABELS, MARKERS, create_axes, figure_of


def training_curves(
    histories: Mapping[str, Sequence[pd.DataFrame]], axes: np.ndarray | None = None
) -> np.ndarray:
    """Training loss and validation SDR against steps and against time.

    `histories` is `{model: [history of each seed]}` with the columns of `training.history`. Returns axes `(2, 2)`: the
    rows are loss and SDR, the columns steps and time.
    """
    axes = create_axes(axes, 8.4, 2, 2, sharex="col", sharey="row")
    longest = max(history["train_s"].max() for seeds in histories.values() for history in seeds)
    divisor, unit = (60, "min") if longest > 300 else (1, "s")
    for model, seeds in histories.items():
        for number, history in enumerate(seeds):
            look = dict(
                color=COLOURS[model],
                marker=MARKERS[model],
                markersize=3.2,
                alpha=1 if number == 0 else 0.45,
            )
            label = LABELS[model] if number == 0 else None
            for column, x in enumerate((history["step"], history["train_s"] / divisor)):
                axes[0, column].plot(x, history["train_loss_db"], label=label, **look)
                axes[1, column].plot(x, history["valid_sdr_db"], label=label, **look)
    axes[0, 0].set(ylabel="training loss (dB)", title="Loss: negative SNR, lower is better")
    axes[1, 0].set(
        ylabel="SDR (dB)", xlabel="training step", title="Validation SDR, higher is better"
    )
    axes[1, 1].set(xlabel=f"training time ({unit})")
    axes[0, 0].set_xlim(left=0)
    axes[0, 1].set_xlim(left=0)
    if len(histories) > 1:
        figure_of(axes).legend(
            *axes[0, 0].get_legend_handles_labels(),
            ncols=len(histories),
            loc="outside lower center",
        )
    return axes


@contextmanager
def live_curves(model: str) -> Iterator:
    """Curves that grow while a model trains: `with live_curves(name) as live: train(..., on_validation=live)`.

    They vanish at the end, when the notebook draws the final ones from history.csv; a loaded model shows none.
    """
    handle = display(display_id=True)

    def update(history: pd.DataFrame) -> None:
        axes = training_curves({model: [history]})
        fig = figure_of(axes)
        if handle:
            handle.update(fig)
        plt.close(fig)

    yield update
    if handle:
        handle.update(HTML(""))


def reconstruction(table: pd.DataFrame, model: str, ax: Axes | None = None) -> Axes:
    """SDR in dB against step of a network that learns to return its input, beside the 20 dB line; columns step, sdr_db."""
    ax = create_axes(ax, 5)
    ax.plot(table["step"], table["sdr_db"], color=COLOURS[model], marker=MARKERS[model])
    ax.axhline(20, color=INK, linewidth=0.9, linestyle="--")
    ax.annotate(
        "20 dB: the error has a hundredth of the energy",
        (0, 20),
        (4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=7,
    )
    ax.set(xlabel="training step", ylabel="SDR of the copy (dB)")
    ax.set_ylim(top=max(23, table["sdr_db"].max() + 2))
    return ax
