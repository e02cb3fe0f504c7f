"""Figures of levels, co-activity, spectrograms and random mixing: notebook 01."""

from collections.abc import Mapping, Sequence

import librosa
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mss_utils.data import SILENCE_DB, window_levels_db
from mss_utils.figures import style
from mss_utils.figures.style import INK, LABELS, format_db

SPLIT_COLOURS = {"train": "#b9c4d0", "valid": "#6d8299", "test": "#27384a"}
LOWEST_HZ = 50.0
RANGE_DB = 70.0
N_BANDS = 112


def data_levels(audit: pd.DataFrame) -> np.ndarray:
    """Plot durations, levels and silence of a table from `data.audit`, one dot per track."""
    axes = style.new_axes(7.5, 1, 3, width_ratios=(1, 1.5, 1.5))
    audit = audit.assign(silent_percent=100 * audit["silent_share"])
    _strips(axes[0], audit.drop_duplicates(["split", "track"]), "duration_s", "split")
    _strips(axes[1], audit, "level_db", "stem", spread=0.25)
    _strips(axes[2], audit, "silent_percent", "stem", spread=0.25)
    axes[0].set(title="Tracks", xlabel="duration (s)", xlim=(0, None))
    axes[1].set(title="Level", xlabel="RMS level (dB re. full scale)")
    axes[2].set(title="Silence", xlim=(-3, 103))
    axes[2].set_xlabel(f"0.5 s windows below {format_db(SILENCE_DB, 0)} (%)")
    axes[2].tick_params(labelleft=False)
    style.legend_below(axes)
    return axes


def _strips(ax: Axes, table: pd.DataFrame, value: str, group: str, spread: float = 0.0) -> None:
    """Draw a strip of dots for each group, from the top down; its splits are `spread` apart."""
    groups = list(dict.fromkeys(table[group]))
    for i, (split, colour) in enumerate(SPLIT_COLOURS.items()):
        rows = table[table["split"] == split]
        y = rows[group].map(groups.index) + (i - 1) * spread + style.jitter(len(rows), 0.12)
        ax.scatter(rows[value], y, color=colour, label=split, **style.DOTS)
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def co_activity(shares: pd.DataFrame) -> Axes:
    """Show the table `data.co_activity` as an annotated heat map."""
    ax = style.new_axes(2.6 + 0.7 * len(shares))
    values = 100 * shares.to_numpy()
    ax.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto", zorder=1)
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.0f} %"
        colour = "white" if value > 60 else INK
        ax.text(column, row, text, ha="center", va="center", color=colour)
    ax.set_xticks(range(len(shares)), shares.columns)
    ax.set_yticks(range(len(shares)), shares.index)
    ax.set(ylabel="while this stem is active ...", xlabel="... this stem is active too")
    ax.set(title="Co-activity of stems (share of 0.5 s windows)", frame_on=False)
    ax.tick_params(length=0)
    return ax


def spectrogram_db(audio: np.ndarray, sample_rate: int, columns: int = 300) -> np.ndarray:
    """Compute the power of `(channels, samples)` in dB, `(bands, columns)`.

    Bands are equally wide in octaves, from 50 Hz to half the sample rate. A cell is the mean over
    its time and frequency range, so that no short event is lost in a long track.
    """
    n_fft = 2 ** round(np.log2(0.128 * sample_rate))  # 128 ms resolves single notes
    hop = max(n_fft // 16, min(n_fft // 4, audio.shape[-1] // columns))
    power = np.abs(librosa.stft(audio, n_fft=n_fft, hop_length=hop)) ** 2 / n_fft
    bins = np.geomspace(LOWEST_HZ, sample_rate / 2, N_BANDS + 1) / sample_rate * n_fft
    power = _mean_between(power.mean(axis=0), bins.round().astype(int))
    power = _mean_between(power.T, np.linspace(0, power.shape[1], columns + 1).astype(int)).T
    return 10 * np.log10(power + 1e-10)


def _mean_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Average rows from each edge to the next; one row where two edges are the same."""
    sums = np.add.reduceat(values[: edges[-1]], edges[:-1])
    return sums / np.diff(edges).clip(min=1)[:, None]


def spectrograms(
    signals: Mapping[str, np.ndarray],
    sample_rate: int,
    scores: Mapping[str, float] | None = None,
    start_s: float = 0.0,
) -> np.ndarray:
    """Show spectrograms on one colour scale: 0 dB is the largest power of all signals.

    Parameters
    ----------
    signals : {name: (channels, samples)}
    sample_rate : int
    scores : {name: SDR in dB}
        Added to the titles.
    start_s : float
        Start of the time axis.
    """
    columns = min(3, len(signals))
    rows = -(-len(signals) // columns)
    axes = style.new_axes(0.8 + 3.7 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(signals) :]:
        ax.remove()
    shown = axes.flat[: len(signals)]
    _draw_spectrograms(shown, list(signals.values()), sample_rate, start_s)
    for i, (ax, name) in enumerate(zip(shown, signals, strict=True)):
        score = f"\nSDR {format_db(scores[name])}" if name in (scores or {}) else ""
        ax.set_title(LABELS.get(name, name) + score)
        ax.label_outer()
        if i + columns >= len(signals):  # no axes below
            ax.set_xlabel("time (s)")
            ax.tick_params(labelbottom=True)
    return axes


def _draw_spectrograms(axes, signals, sample_rate: int, start_s: float = 0.0) -> None:
    images = [spectrogram_db(audio, sample_rate) for audio in signals]
    loudest = max(image.max() for image in images)
    options = dict(cmap="magma", vmin=-RANGE_DB, vmax=0, origin="lower", aspect="auto", zorder=1)
    for ax, image, audio in zip(axes, images, signals, strict=True):
        image = 3 * np.round((image - loudest) / 3)  # hardly visible, and half the size of a file
        times = start_s, start_s + audio.shape[-1] / sample_rate
        extent = (*times, np.log2(LOWEST_HZ), np.log2(sample_rate / 2))
        ax.set_yticks(np.log2(list(style.FREQUENCIES)), style.FREQUENCIES.values())
        shown = ax.imshow(image, extent=extent, **options)  # which sets the limits
        ax.set(xlabel="time (s)", ylabel="frequency (Hz)")
    style.figure_of(axes).colorbar(shown, ax=list(axes), label="power (dB)", pad=0.01)


def mixing(
    before: np.ndarray, after: np.ndarray, stems: Sequence[str], target: str, sample_rate: int
) -> np.ndarray:
    """Show levels and mixture of a training example without and with random mixing.

    `before` holds stems of one track, `after` of different tracks: `(stems, channels, samples)`.
    """
    axes = style.new_axes(9.6, 2, 2, width_ratios=(1.25, 1))
    window_s = min(0.1, before.shape[-1] / sample_rate)
    colours = plt.colormaps["viridis"](np.linspace(0.05, 0.9, len(stems)))
    options = dict(color=list(colours), style=["-", "--", "-.", ":"], linewidth=1.1, legend=False)
    titles = {"stems of one track": before, "stems of different tracks": after}
    for ax, (title, example) in zip(axes[:, 0], titles.items(), strict=True):
        levels = pd.DataFrame(window_levels_db(example, sample_rate, window_s).T, columns=stems)
        levels.index = (levels.index + 0.5) * window_s
        levels.clip(lower=-80).plot(ax=ax, **options)
        ax.lines[stems.index(target)].set_linewidth(2.4)
        ax.set(title=f"Levels: {title}", xlabel="time (s)", ylabel="level (dB)", ylim=(-82, 0))
    _draw_spectrograms(axes[:, 1], [before.sum(axis=0), after.sum(axis=0)], sample_rate)
    for ax in axes[:, 1]:
        ax.set_title("Mixture")
    style.legend_below(axes)
    return axes
