"""Figures of the models and their training: notebooks 02 to 04."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.axes import Axes

from mss_utils.figures import style
from mss_utils.figures.style import LABELS


def training_curves(histories: Mapping[str, Sequence[pd.DataFrame]]) -> np.ndarray:
    """Plot training loss and validation SDR (rows) against steps and against time (columns).

    `histories` is {model: [history of each seed]}, tables with the columns of `history.csv`.
    """
    axes = style.new_axes(8.4, 2, 2, sharex="col", sharey="row")
    for model, seeds in histories.items():
        for seed, history in enumerate(seeds):
            options = dict(alpha=0.45) if seed else dict(label=LABELS[model])
            for column, x in enumerate((history["step"], history["train_s"] / 60)):
                for row, y in enumerate(("train_loss_db", "valid_sdr_db")):
                    axes[row, column].plot(x, history[y], ms=3.2, **style.look(model), **options)
    axes[0, 0].set(ylabel="training loss (dB)", title="Loss: negative SNR, lower is better")
    axes[1, 0].set(ylabel="SDR (dB)", title="Validation SDR, higher is better")
    axes[1, 0].set(xlabel="training step", xlim=(0, None))
    axes[1, 1].set(xlabel="training time (min)", xlim=(0, None))
    style.legend_below(axes)
    return axes


@contextmanager
def live_curves(model: str) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Show one figure that is updated during a training and removed at its end.

    Use it as `with live_curves(model) as live: train(..., on_validation=live)`.
    """
    handle = display(display_id=True)

    def update(history: pd.DataFrame) -> None:
        fig = style.figure_of(training_curves({model: [history]}))
        handle.update(fig)
        plt.close(fig)

    yield update
    handle.update(HTML(""))


def reconstruction(table: pd.DataFrame, model: str) -> Axes:
    """Plot the SDR of a network that is trained to return its input; columns step, sdr_db."""
    ax = style.new_axes(5)
    ax.plot(table["step"], table["sdr_db"], **style.look(model))
    style.labelled_line(ax, 20, "20 dB: the error has 1 % of the energy", linestyle="--")
    ax.set(xlabel="training step", ylabel="reconstruction SDR (dB)")
    ax.margins(y=0.12)
    return ax
