"""Plots of the data: levels, who plays together, spectrograms, random mixing, the curriculum. Notebooks 01 to 04 and 06."""

from __future__ import annotations

from typing import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from mss_utils.config import Settings
from mss_utils.data import SILENCE_DB, window_levels_db
from mss_utils.figures.style import (
    COLOURS,
    INK,
    LABELS,
    PALE,
    SPLIT_COLOURS,
    create_axes,
    figure_of,
    format_db,
    jitter,
)

LOWEST_HZ = 50.0
RANGE_DB = 70.0


def data_levels(audit: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Durations, stem levels and silent shares of an `audit` table, one dot a track, coloured by split. Three axes."""
    stems = list(dict.fromkeys(audit["stem"]))
    axes = create_axes(axes, 6.2 + 0.25 * len(stems), 1, 3, width_ratios=(1, 1.5, 1.5))
    durations = audit.drop_duplicates(["split", "track"])
    _strips(axes[0], durations, "duration_s", "split", list(SPLIT_COLOURS), spread=0.25)
    axes[0].set(title="Tracks", xlabel="duration (s)")
    axes[0].set_xlim(left=0)
    _strips(axes[1], audit, "level_db", "stem", stems)
    axes[1].set(title="Level", xlabel="RMS level (dB re. full scale)")
    axes[1].xaxis.set_major_locator(plt.MaxNLocator(5, integer=True))
    _strips(axes[2], audit.assign(silent=100 * audit["silent_share"]), "silent", "stem", stems)
    axes[2].set(
        title="Silence", xlabel=f"half seconds under {format_db(SILENCE_DB, 0)} (%)", xlim=(-3, 103)
    )
    axes[2].tick_params(labelleft=False)
    figure_of(axes).legend(
        *axes[1].get_legend_handles_labels(), ncols=3, loc="outside lower center"
    )
    return axes


def co_activity(shares: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where the row's stem sounds, how often the column's does too: `data.co_activity` as a table of shades and per cents."""
    ax = create_axes(ax, 2.6 + 0.7 * len(shares))
    values = 100 * shares.to_numpy()
    ax.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.0f} %"
        ax.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color="white" if value > 60 else INK,
            fontsize=8,
        )
    ax.set_xticks(range(len(shares)), shares.columns)
    ax.set_yticks(range(len(shares)), shares.index)
    ax.set(
        xlabel="... this one sounds too",
        ylabel="where this one sounds ...",
        title="Who plays together (share of half seconds)",
    )
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def _strips(
    ax: Axes,
    table: pd.DataFrame,
    value: str,
    group: str,
    groups: Sequence[str],
    spread: float = 0.12,
) -> None:
    """Horizontal strips of dots, one row a group from the top down; splits lie beside each other within a row."""
    for offset, (split, colour) in zip((-0.25, 0, 0.25), SPLIT_COLOURS.items()):
        part = table[table["split"] == split]
        centre = part[group].map(groups.index) + (0 if group == "split" else offset)
        y = centre + jitter(len(part), spread)
        ax.scatter(
            part[value].replace(-np.inf, np.nan),
            y,
            s=9,
            color=colour,
            edgecolors="white",
            linewidths=0.3,
            label=split,
        )
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def spectrogram_db(
    audio: np.ndarray, sample_rate: int, columns: int = 300, rows: int = 112
) -> np.ndarray:
    """Power of `(channels, samples)` in dB, `(rows, columns)`, with rows in equal musical steps from 50 Hz to half the rate.

    Each cell is the mean power of its stretch of time and its band, so a picture of a whole song hides nothing.
    """
    n_fft = 2 ** round(
        np.log2(0.128 * sample_rate)
    )  # 128 ms: narrow enough in frequency for single notes
    hop = max(n_fft // 16, min(n_fft // 4, audio.shape[-1] // columns))
    spec = torch.stft(
        torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32)),
        n_fft,
        hop,
        window=torch.hann_window(n_fft),
        pad_mode="constant",
        return_complex=True,
    )
    power = spec.abs().square().mean(dim=0).numpy() / n_fft  # (bins, frames)
    bins = np.geomspace(LOWEST_HZ, sample_rate / 2, rows + 1) / sample_rate * n_fft
    power = mean_between(power, bins + 0.5)  # bin k is the band from k - 1/2 to k + 1/2
    power = mean_between(power.T, np.linspace(0, power.shape[1], columns + 1)).T
    return 10 * np.log10(power + 1e-10)


def mean_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of `(n, ...)` between successive fractional edges along the first axis: differences of the interpolated sum."""
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0, dtype=np.float64)])
    edges = np.clip(edges, 0, len(values))
    below = np.minimum(edges.astype(int), len(values) - 1)
    at = total[below] + (edges - below)[:, None] * values[below]
    return np.diff(at, axis=0) / np.diff(edges)[:, None]


def spectrograms(
    signals: Mapping[str, np.ndarray],
    sample_rate: int,
    titles: Mapping[str, str] | None = None,
    columns: int = 3,
    axes: np.ndarray | None = None,
    start_s: float = 0.0,
) -> np.ndarray:
    """Spectrograms of `{name: (channels, samples)}` in a grid on one colour scale: 0 dB is the loudest cell of them all.

    `titles` replaces the names; `start_s` is what the time axis starts at. Returns the axes as an array `(rows, columns)`.
    """
    columns = min(columns, len(signals))
    rows = -(-len(signals) // columns)
    axes = np.reshape(
        create_axes(axes, 0.8 + 3.7 * rows, rows, columns, sharex=True, sharey=True, squeeze=False),
        (rows, columns),
    )
    # Near the resolution of print; more would only make the files larger.
    images = {
        name: spectrogram_db(audio, sample_rate, 840 // columns) for name, audio in signals.items()
    }
    loudest = max(image.max() for image in images.values())
    for ax, (name, image) in zip(axes.flat, images.items()):
        seconds = signals[name].shape[-1] / sample_rate
        shown = _draw_spectrogram(ax, image - loudest, sample_rate, (start_s, start_s + seconds))
        ax.set_title((titles or {}).get(name, LABELS.get(name, name)))
    for ax in axes.flat[len(images) :]:
        ax.set_visible(False)
    _label_grid(axes, len(images))
    figure_of(axes).colorbar(
        shown, ax=axes, label="power (dB)", aspect=12 * rows, pad=0.01, ticks=[0, -20, -40, -60]
    )
    return axes


def _draw_spectrogram(
    ax: Axes, image_db: np.ndarray, sample_rate: int, span_s: tuple[float, float]
):
    """One picture with time in seconds and frequency in octaves. 3 dB steps: hardly visible, and the files become half as large."""
    extent = (*span_s, np.log2(LOWEST_HZ), np.log2(sample_rate / 2))
    image = 3 * np.round(image_db / 3)
    shown = ax.imshow(
        image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-RANGE_DB, vmax=0
    )
    ticks = [hz for hz in (100, 300, 1000, 3000, 10000) if hz < sample_rate / 2]
    ax.set_yticks(np.log2(ticks), [f"{hz // 1000}k" if hz >= 1000 else str(hz) for hz in ticks])
    ax.grid(visible=False)
    return shown


def _label_grid(axes: np.ndarray, used: int) -> None:
    for row in axes:
        row[0].set_ylabel("frequency (Hz)")
    for number, ax in enumerate(axes.flat[:used]):
        if number + axes.shape[1] >= used:  # nothing below it
            ax.set_xlabel("time (s)")
            ax.tick_params(labelbottom=True)


def mixing(
    before: np.ndarray, after: np.ndarray, stems: Sequence[str], target: str, sample_rate: int
) -> np.ndarray:
    """A training example as one song has it and as random mixing makes it, both `(stems, channels, samples)`.

    Left the level of every stem over time, right the spectrogram of their sum. Returns axes `(2, 2)`.
    """
    axes = create_axes(None, 9.6, 2, 2, sharex=True, width_ratios=(1.25, 1))
    images = [spectrogram_db(example.sum(axis=0), sample_rate) for example in (before, after)]
    loudest = max(image.max() for image in images)
    for row, example, image, title in zip(
        axes, (before, after), images, ("stems of one song", "stems of different songs")
    ):
        stem_levels(example, stems, target, sample_rate, row[0])
        row[0].set_title(f"Levels: {title}")
        shown = _draw_spectrogram(
            row[1], image - loudest, sample_rate, (0, example.shape[-1] / sample_rate)
        )
        row[1].set(title="Their mixture", ylabel="frequency (Hz)")
    for ax in axes[1]:
        ax.set_xlabel("time (s)")
    fig = figure_of(axes)
    fig.colorbar(shown, ax=axes[:, 1], label="power (dB)", aspect=24, pad=0.01)
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), ncols=len(stems), loc="outside lower center"
    )
    return axes


def stem_levels(
    example: np.ndarray, stems: Sequence[str], target: str, sample_rate: int, ax: Axes | None = None
) -> Axes:
    """Level over time of every stem of `(stems, channels, samples)`; the target is the thick line."""
    ax = create_axes(ax, 5)
    window_s = min(0.1, example.shape[-1] / sample_rate)
    shades = plt.colormaps["viridis"](np.linspace(0.05, 0.9, len(stems)))
    for name, audio, shade, line in zip(
        stems, example, shades, ["-", "--", "-.", ":"] * len(stems)
    ):
        levels = np.maximum(window_levels_db(audio, sample_rate, window_s), -80)
        time = (np.arange(len(levels)) + 0.5) * window_s
        ax.plot(
            time, levels, line, color=shade, linewidth=2.4 if name == target else 1.1, label=name
        )
    ax.set(ylabel="level (dB)", ylim=(-82, 0))
    return ax


def curriculum(settings: Settings, n_stems: int, ax: Axes | None = None) -> Axes:
    """How many sources a training example has at each step of the training."""
    ax = create_axes(ax, 4.4)
    edges, counts = [0, settings.steps], [n_stems]
    if settings.curriculum:
        inner = [
            min(settings.stage2_step, settings.steps),
            min(settings.stage3_step, settings.steps),
        ]
        edges, counts = [0, *inner, settings.steps], [min(2, n_stems), min(3, n_stems), n_stems]
    ax.stairs(counts, edges, fill=True, color=PALE)
    ax.stairs(counts, edges, color=COLOURS["unet"], linewidth=1.8, baseline=None)
    for start, end, count in zip(edges, edges[1:], counts):
        if end - start > 0.08 * settings.steps:
            ax.annotate(
                f"{count} sources",
                ((start + end) / 2, count),
                (0, 3),
                textcoords="offset points",
                ha="center",
            )
    ax.set(
        xlabel="training step",
        ylabel="sources in an example",
        xlim=(0, settings.steps),
        ylim=(0, n_stems + 0.9),
    )
    ax.set_yticks(range(n_stems + 1))
    return ax


def excerpt(
    versions: Mapping[str, np.ndarray],
    sample_rate: int,
    scores: Mapping[str, float],
    start_s: float = 0.0,
) -> np.ndarray:
    """Spectrograms of all versions of an excerpt; `scores`, SDR in dB by version, are written into the titles."""
    titles = {
        name: f"{LABELS.get(name, name)}\nSDR {format_db(scores[name])}"
        for name in versions
        if name in scores
    }
    return spectrograms(versions, sample_rate, titles, start_s=start_s)
