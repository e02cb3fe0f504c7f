"""Figures of levels, co-activity, spectrograms, random mixing and curriculum: notebook 01."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from scipy.interpolate import interp1d

from mss_utils.config import Settings
from mss_utils.data import SILENCE_DB, window_levels_db
from mss_utils.figures import style
from mss_utils.figures.style import COLOURS, INK, LABELS, PALE, format_db

SPLIT_COLOURS = {"train": "#b9c4d0", "valid": "#6d8299", "test": "#27384a"}
LOWEST_HZ = 50.0
RANGE_DB = 70.0
N_BANDS = 112


def data_levels(audit: pd.DataFrame) -> np.ndarray:
    """Plot durations, levels and silence of a table from `data.audit`, one dot per track."""
    stems = list(dict.fromkeys(audit["stem"]))
    axes = style.new_axes(6.2 + 0.25 * len(stems), 1, 3, width_ratios=(1, 1.5, 1.5))
    audit = audit.assign(silent_percent=100 * audit["silent_share"])
    tracks = audit.drop_duplicates(["split", "track"])
    _strips(axes[0], tracks, "duration_s", "split", list(SPLIT_COLOURS))
    _strips(axes[1], audit, "level_db", "stem", stems)
    _strips(axes[2], audit, "silent_percent", "stem", stems)
    axes[0].set(title="Tracks", xlabel="duration (s)", xlim=(0, None))
    axes[1].set(title="Level", xlabel="RMS level (dB re. full scale)")
    axes[1].xaxis.set_major_locator(plt.MaxNLocator(5, integer=True))
    axes[2].set(title="Silence", xlim=(-3, 103))
    axes[2].set_xlabel(f"0.5 s windows below {format_db(SILENCE_DB, 0)} (%)")
    axes[2].tick_params(labelleft=False)
    style.legend_below(axes, 3)
    return axes


def _strips(ax: Axes, table: pd.DataFrame, value: str, group: str, groups: Sequence[str]) -> None:
    """Draw a strip of dots for each group, from the top down; within it, one for each split."""
    by_split = group == "split"
    for offset, (split, colour) in zip((-0.25, 0, 0.25), SPLIT_COLOURS.items(), strict=True):
        part = table[table["split"] == split]
        y = part[group].map(groups.index) + (0 if by_split else offset)
        y += style.jitter(len(part), 0.25 if by_split else 0.12)
        x = part[value].replace(-np.inf, np.nan)
        ax.scatter(x, y, s=9, color=colour, edgecolors="white", linewidths=0.3, label=split)
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def co_activity(shares: pd.DataFrame) -> Axes:
    """Show the table `data.co_activity` as an annotated heat map."""
    ax = style.new_axes(2.6 + 0.7 * len(shares))
    values = 100 * shares.to_numpy()
    ax.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.0f} %"
        colour = "white" if value > 60 else INK
        ax.text(column, row, text, ha="center", va="center", color=colour)
    ax.set_xticks(range(len(shares)), shares.columns)
    ax.set_yticks(range(len(shares)), shares.index)
    ax.set(ylabel="while this stem is active ...", xlabel="... this stem is active too")
    ax.set_title("Co-activity of stems (share of 0.5 s windows)")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def spectrogram_db(audio: np.ndarray, sample_rate: int, columns: int = 300) -> np.ndarray:
    """Compute the power of `(channels, samples)` in dB, `(bands, columns)`.

    Bands are equally wide in octaves, from 50 Hz to half the sample rate. A cell is the mean over
    its time and frequency range, so that no short event is lost in a long track.
    """
    n_fft = 2 ** round(np.log2(0.128 * sample_rate))  # 128 ms resolves single notes
    hop = max(n_fft // 16, min(n_fft // 4, audio.shape[-1] // columns))
    waveform = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
    options = dict(window=torch.hann_window(n_fft), pad_mode="constant", return_complex=True)
    power = torch.stft(waveform, n_fft, hop, **options).abs().square().mean(dim=0).numpy() / n_fft
    bins = np.geomspace(LOWEST_HZ, sample_rate / 2, N_BANDS + 1) / sample_rate * n_fft
    power = mean_between(power, bins + 0.5)  # bin k is the band from k - 1/2 to k + 1/2
    power = mean_between(power.T, np.linspace(0, power.shape[1], columns + 1)).T
    return 10 * np.log10(power + 1e-10)


def mean_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Average `values` along the first axis between successive fractional edges."""
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0, dtype=np.float64)])
    edges = np.clip(edges, 0, len(values))
    sums = np.diff(interp1d(np.arange(len(total)), total, axis=0)(edges), axis=0)
    return sums / np.diff(edges)[:, None]


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
    images = [spectrogram_db(audio, sample_rate, 840 // columns) for audio in signals.values()]
    loudest = max(image.max() for image in images)
    for i, (name, audio) in enumerate(signals.items()):
        ax, end_s = axes.flat[i], start_s + audio.shape[-1] / sample_rate
        shown = _draw_spectrogram(ax, images[i] - loudest, sample_rate, (start_s, end_s))
        score = f"\nSDR {format_db(scores[name])}" if name in (scores or {}) else ""
        ax.set(title=LABELS.get(name, name) + score, ylabel="" if i % columns else "frequency (Hz)")
        if i + columns >= len(signals):  # no axes below
            ax.set_xlabel("time (s)")
            ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(signals) :]:
        ax.set_visible(False)
    options = dict(aspect=12 * rows, pad=0.01, ticks=[0, -20, -40, -60])
    style.figure_of(axes).colorbar(shown, ax=axes, label="power (dB)", **options)
    return axes


def _draw_spectrogram(ax: Axes, image_db: np.ndarray, sample_rate: int, span_s: tuple):
    extent = (*span_s, np.log2(LOWEST_HZ), np.log2(sample_rate / 2))
    image_db = 3 * np.round(image_db / 3)  # hardly visible, and the files have half the size
    ticks, labels = style.frequency_ticks(sample_rate / 2)
    ax.set_yticks(np.log2(ticks), labels)
    ax.grid(visible=False)
    options = dict(cmap="magma", vmin=-RANGE_DB, vmax=0, origin="lower", aspect="auto")
    return ax.imshow(image_db, extent=extent, **options)


def mixing(
    before: np.ndarray, after: np.ndarray, stems: Sequence[str], target: str, sample_rate: int
) -> np.ndarray:
    """Show levels and mixture of a training example without and with random mixing.

    `before` holds stems of one track, `after` of different tracks: `(stems, channels, samples)`.
    """
    axes = style.new_axes(9.6, 2, 2, sharex=True, width_ratios=(1.25, 1))
    images = [spectrogram_db(example.sum(axis=0), sample_rate) for example in (before, after)]
    loudest = max(image.max() for image in images)
    colours = plt.colormaps["viridis"](np.linspace(0.05, 0.9, len(stems)))
    end_s = before.shape[-1] / sample_rate
    window_s = min(0.1, end_s)
    for row, example, image in zip(axes, (before, after), images, strict=True):
        for i, name in enumerate(stems):
            levels = window_levels_db(example[i], sample_rate, window_s).clip(min=-80)
            time = (np.arange(len(levels)) + 0.5) * window_s
            line = dict(color=colours[i], linewidth=2.4 if name == target else 1.1, label=name)
            row[0].plot(time, levels, ("-", "--", "-.", ":")[i % 4], **line)
        row[0].set(ylabel="level (dB)", ylim=(-82, 0))
        shown = _draw_spectrogram(row[1], image - loudest, sample_rate, (0, end_s))
        row[1].set(title="Mixture", ylabel="frequency (Hz)")
    axes[0, 0].set(title="Levels: stems of one track")
    axes[1, 0].set(title="Levels: stems of different tracks", xlabel="time (s)")
    axes[1, 1].set(xlabel="time (s)")
    style.figure_of(axes).colorbar(shown, ax=axes[:, 1], label="power (dB)", aspect=24, pad=0.01)
    style.legend_below(axes, len(stems))
    return axes


def curriculum(settings: Settings, n_stems: int) -> Axes:
    """Plot the number of sources in a training example against the training step."""
    ax = style.new_axes(4.4)
    edges, counts = np.array([0, settings.steps]), np.array([n_stems])
    if settings.curriculum:
        edges = np.array([0, settings.stage2_step, settings.stage3_step, settings.steps])
        edges, counts = edges.clip(max=settings.steps), np.array([2, 3, n_stems]).clip(max=n_stems)
    ax.stairs(counts, edges, fill=True, color=PALE)
    ax.stairs(counts, edges, color=COLOURS["unet"], linewidth=1.8, baseline=None)
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if end - start > 0.08 * settings.steps:
            ax.text((start + end) / 2, count + 0.2, f"{count} sources", ha="center")
    ax.set(xlabel="training step", xlim=(0, settings.steps))
    ax.set(ylabel="sources in an example", ylim=(0, n_stems + 0.9), yticks=range(n_stems + 1))
    return ax
