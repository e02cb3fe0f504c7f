"""Every plot of the report: axes in, axes out, one style, saved as SVG for the report and PNG for everything else.

A function that draws takes `ax` (or `axes`) and makes a figure of report width (16 cm) when it gets None. `show` is what
notebooks call: it saves under `results/<run>/figures/` and displays. A model has the same colour and marker everywhere;
colours differ in lightness too, so a grey print stays readable. Used by all notebooks.
"""

from __future__ import annotations

import html
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mss_utils.data import MIXTURE, SILENCE_DB, window_levels_db
from mss_utils.metrics import ROUNDING_DB
from mss_utils.models import count_parameters
from mss_utils.settings import Run, Settings, replacing, safe_name

LABELS = {
    "mixture": "mixture",
    "unet": "A U-Net",
    "demucs_lstm": "B1 Demucs + BiLSTM",
    "demucs_attention": "B2 Demucs + attention",
    "irm": "ratio-mask oracle",
    "mwf": "Wiener-filter oracle",
    "reference": "reference",
}
SHORT = LABELS | {"unet": "A", "demucs_lstm": "B1", "demucs_attention": "B2", "irm": "IRM", "mwf": "MWF"}
# A works on spectrograms (cold), B1 and B2 on waveforms (warm); lightness rises from the oracle to B2.
COLOURS = {
    "mixture": "#9a9a9a",
    "unet": "#1f5a99",
    "demucs_lstm": "#d1553d",
    "demucs_attention": "#e9ae3c",
    "irm": "#2b2b2b",
    "mwf": "#5d5566",
    "reference": "#5f7f5f",
}
MARKERS = {"mixture": "v", "unet": "o", "demucs_lstm": "s", "demucs_attention": "D", "irm": "^", "mwf": "p"}
SPLITS = {"train": "#b9c4d0", "valid": "#6d8299", "test": "#27384a"}
METRICS = ("SDR", "SIR", "SAR")  # ISR is in the tables
TABLE_METRICS = (*METRICS, "ISR", "utterance_SDR", "SI_SDR")

WIDTH = 16 / 2.54  # inches: the text width of the report
DPI = 200
INK, PALE = "#30363d", "#eef1f4"
LOWEST_HZ = 50.0
RANGE_DB = 70.0

plt.rcParams.update({
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7.5, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK,
    "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "axes.grid": True, "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.5, "lines.markersize": 4.5, "legend.frameon": False,
    "axes.titleweight": "bold", "figure.dpi": 110, "svg.hashsalt": "mss", "text.parse_math": False, "image.interpolation": "nearest",
})


# --- saving and showing -------------------------------------------------------------------------------------------------


def save(fig: Figure, run: Run, name: str) -> Path:
    """Write `figures/<name>.svg` and `.png` of a run, each through a temporary name; return the path of the PNG."""
    for suffix in ("svg", "png"):
        path = run.figure(f"{safe_name(name)}.{suffix}")
        with replacing(path) as part:
            # Without a date the same figure is the same file, and git sees a change only where there is one.
            fig.savefig(part, format=suffix, dpi=DPI, metadata={"Date": None} if suffix == "svg" else None)
    return path


def show(axes: Axes | np.ndarray, run: Run, name: str, alt: str = "") -> None:
    """Save the figure of `axes`, display it here (not at the end of the cell) and close it.

    `alt` says what is to be seen: the caption below the figure, and what a screen reader reads out.
    """
    fig = _figure(axes)
    path = save(fig, run, name)
    plt.close(fig)
    display(Image(filename=str(path), width=round(fig.get_figwidth() * 120), alt=alt or name.replace("_", " ")))
    if alt:
        display(HTML(f"<small>{html.escape(alt)}</small>"))


def _figure(axes: Axes | np.ndarray) -> Figure:
    return np.ravel(axes)[0].figure


def decibels(value: float, digits: int = 1) -> str:
    """A level or score as text."""
    return f"{number(value, digits)} dB"


def number(value: float, digits: int = 2, sign: str = "") -> str:
    """Decibels without the unit, with a real minus sign (and a plus for `sign="+"`); from 80 dB on, where digits are rounding
    noise, "> 80"; NaN is a dash.
    """
    if np.isnan(value):
        return "–"
    return f"> {ROUNDING_DB:.0f}" if value >= ROUNDING_DB else f"{value:{sign}.{digits}f}".replace("-", "−")


def _make(axes: Axes | np.ndarray | None, height_cm: float, rows: int = 1, columns: int = 1, **options) -> Axes | np.ndarray:
    """The given axes, or those of a new figure of report width."""
    if axes is not None:
        return axes
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, height_cm / 2.54), layout="constrained", **options)
    return axes


# --- data ---------------------------------------------------------------------------------------------------------------


def data_levels(audit: pd.DataFrame, axes: np.ndarray | None = None) -> np.ndarray:
    """Durations, stem levels and silent shares of an `audit` table, one dot a track, coloured by split. Three axes."""
    stems = list(dict.fromkeys(audit["stem"]))
    axes = _make(axes, 6.2 + 0.25 * len(stems), 1, 3, width_ratios=(1, 1.5, 1.5))
    durations = audit.drop_duplicates(["split", "track"])
    _strips(axes[0], durations, "duration_s", "split", list(SPLITS), spread=0.25)
    axes[0].set(title="Tracks", xlabel="duration (s)")
    axes[0].set_xlim(left=0)
    _strips(axes[1], audit, "level_db", "stem", stems)
    axes[1].set(title="Level", xlabel="RMS level (dB re. full scale)")
    axes[1].xaxis.set_major_locator(plt.MaxNLocator(5, integer=True))
    _strips(axes[2], audit.assign(silent=100 * audit["silent_share"]), "silent", "stem", stems)
    axes[2].set(title="Silence", xlabel=f"half seconds under {decibels(SILENCE_DB, 0)} (%)", xlim=(-3, 103))
    axes[2].tick_params(labelleft=False)
    _figure(axes).legend(*axes[1].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return axes


def co_activity(shares: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where the row's stem sounds, how often the column's does too: `data.co_activity` as a table of shades and per cents."""
    ax = _make(ax, 2.6 + 0.7 * len(shares))
    values = 100 * shares.to_numpy()
    ax.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value:.0f} %"
        ax.text(column, row, text, ha="center", va="center", color="white" if value > 60 else INK, fontsize=8)
    ax.set_xticks(range(len(shares)), shares.columns)
    ax.set_yticks(range(len(shares)), shares.index)
    ax.set(xlabel="... this one sounds too", ylabel="where this one sounds ...", title="Who plays together (share of half seconds)")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def _strips(ax: Axes, table: pd.DataFrame, value: str, group: str, groups: Sequence[str], spread: float = 0.12) -> None:
    """Horizontal strips of dots, one row a group from the top down; splits lie beside each other within a row."""
    for offset, (split, colour) in zip((-0.25, 0, 0.25), SPLITS.items()):
        part = table[table["split"] == split]
        centre = part[group].map(groups.index) + (0 if group == "split" else offset)
        y = centre + _jitter(len(part), spread)
        ax.scatter(part[value].replace(-np.inf, np.nan), y, s=9, color=colour, edgecolors="white", linewidths=0.3, label=split)
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)


def _jitter(count: int, spread: float) -> np.ndarray:
    """Offsets in +-spread that neither repeat nor change from call to call: multiples of the golden ratio, wrapped."""
    return spread * (2 * (np.arange(count) * 0.618034 % 1) - 1)


def spectrogram_db(audio: np.ndarray, sample_rate: int, columns: int = 300, rows: int = 112) -> np.ndarray:
    """Power of `(channels, samples)` in dB, `(rows, columns)`, with rows in equal musical steps from 50 Hz to half the rate.

    Each cell is the mean power of its stretch of time and its band, so a picture of a whole song hides nothing.
    """
    n_fft = 2 ** round(np.log2(0.128 * sample_rate))  # 128 ms: narrow enough in frequency for single notes
    hop = max(n_fft // 16, min(n_fft // 4, audio.shape[-1] // columns))
    spec = torch.stft(
        torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32)), n_fft, hop, window=torch.hann_window(n_fft),
        pad_mode="constant", return_complex=True,
    )
    power = spec.abs().square().mean(dim=0).numpy() / n_fft  # (bins, frames)
    bins = np.geomspace(LOWEST_HZ, sample_rate / 2, rows + 1) / sample_rate * n_fft
    power = _mean_between(power, bins + 0.5)  # bin k is the band from k - 1/2 to k + 1/2
    power = _mean_between(power.T, np.linspace(0, power.shape[1], columns + 1)).T
    return 10 * np.log10(power + 1e-10)


def _mean_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean of `(n, ...)` between successive fractional edges along the first axis: differences of the interpolated sum."""
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0, dtype=np.float64)])
    edges = np.clip(edges, 0, len(values))
    below = np.minimum(edges.astype(int), len(values) - 1)
    at = total[below] + (edges - below)[:, None] * values[below]
    return np.diff(at, axis=0) / np.diff(edges)[:, None]


def spectrograms(
    signals: Mapping[str, np.ndarray], sample_rate: int, titles: Mapping[str, str] | None = None, columns: int = 3,
    axes: np.ndarray | None = None, start_s: float = 0.0,
) -> np.ndarray:
    """Spectrograms of `{name: (channels, samples)}` in a grid on one colour scale: 0 dB is the loudest cell of them all.

    `titles` replaces the names; `start_s` is what the time axis starts at. Returns the axes as an array `(rows, columns)`.
    """
    columns = min(columns, len(signals))
    rows = -(-len(signals) // columns)
    axes = np.reshape(_make(axes, 0.8 + 3.7 * rows, rows, columns, sharex=True, sharey=True, squeeze=False), (rows, columns))
    # Near the resolution of print; more would only make the files larger.
    images = {name: spectrogram_db(audio, sample_rate, 840 // columns) for name, audio in signals.items()}
    loudest = max(image.max() for image in images.values())
    for ax, (name, image) in zip(axes.flat, images.items()):
        seconds = signals[name].shape[-1] / sample_rate
        shown = _draw_spectrogram(ax, image - loudest, sample_rate, (start_s, start_s + seconds))
        ax.set_title((titles or {}).get(name, LABELS.get(name, name)))
    for ax in axes.flat[len(images):]:
        ax.set_visible(False)
    _label_grid(axes, len(images))
    _figure(axes).colorbar(shown, ax=axes, label="power (dB)", aspect=12 * rows, pad=0.01, ticks=[0, -20, -40, -60])
    return axes


def _draw_spectrogram(ax: Axes, image_db: np.ndarray, sample_rate: int, span_s: tuple[float, float]):
    """One picture with time in seconds and frequency in octaves. 3 dB steps: hardly visible, and the files become half as large."""
    extent = (*span_s, np.log2(LOWEST_HZ), np.log2(sample_rate / 2))
    image = 3 * np.round(image_db / 3)
    shown = ax.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=-RANGE_DB, vmax=0)
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


def mixing(before: np.ndarray, after: np.ndarray, stems: Sequence[str], target: str, sample_rate: int) -> np.ndarray:
    """A training example as one song has it and as random mixing makes it, both `(stems, channels, samples)`.

    Left the level of every stem over time, right the spectrogram of their sum. Returns axes `(2, 2)`.
    """
    axes = _make(None, 9.6, 2, 2, sharex=True, width_ratios=(1.25, 1))
    images = [spectrogram_db(example.sum(axis=0), sample_rate) for example in (before, after)]
    loudest = max(image.max() for image in images)
    for row, example, image, title in zip(axes, (before, after), images, ("stems of one song", "stems of different songs")):
        stem_levels(example, stems, target, sample_rate, row[0])
        row[0].set_title(f"Levels: {title}")
        shown = _draw_spectrogram(row[1], image - loudest, sample_rate, (0, example.shape[-1] / sample_rate))
        row[1].set(title="Their mixture", ylabel="frequency (Hz)")
    for ax in axes[1]:
        ax.set_xlabel("time (s)")
    fig = _figure(axes)
    fig.colorbar(shown, ax=axes[:, 1], label="power (dB)", aspect=24, pad=0.01)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(stems), loc="outside lower center")
    return axes


def stem_levels(example: np.ndarray, stems: Sequence[str], target: str, sample_rate: int, ax: Axes | None = None) -> Axes:
    """Level over time of every stem of `(stems, channels, samples)`; the target is the thick line."""
    ax = _make(ax, 5)
    window_s = min(0.1, example.shape[-1] / sample_rate)
    shades = plt.colormaps["viridis"](np.linspace(0.05, 0.9, len(stems)))
    for name, audio, shade, line in zip(stems, example, shades, ["-", "--", "-.", ":"] * len(stems)):
        levels = np.maximum(window_levels_db(audio, sample_rate, window_s), -80)
        time = (np.arange(len(levels)) + 0.5) * window_s
        ax.plot(time, levels, line, color=shade, linewidth=2.4 if name == target else 1.1, label=name)
    ax.set(ylabel="level (dB)", ylim=(-82, 0))
    return ax


def curriculum(settings: Settings, n_stems: int, ax: Axes | None = None) -> Axes:
    """How many sources a training example has at each step of the training."""
    ax = _make(ax, 4.4)
    edges, counts = [0, settings.steps], [n_stems]
    if settings.curriculum:
        inner = [min(settings.stage2_step, settings.steps), min(settings.stage3_step, settings.steps)]
        edges, counts = [0, *inner, settings.steps], [min(2, n_stems), min(3, n_stems), n_stems]
    ax.stairs(counts, edges, fill=True, color=PALE)
    ax.stairs(counts, edges, color=COLOURS["unet"], linewidth=1.8, baseline=None)
    for start, end, count in zip(edges, edges[1:], counts):
        if end - start > 0.08 * settings.steps:
            ax.annotate(f"{count} sources", ((start + end) / 2, count), (0, 3), textcoords="offset points", ha="center")
    ax.set(xlabel="training step", ylabel="sources in an example", xlim=(0, settings.steps), ylim=(0, n_stems + 0.9))
    ax.set_yticks(range(n_stems + 1))
    return ax


# --- architecture -------------------------------------------------------------------------------------------------------


def architecture(model: torch.nn.Module, settings: Settings, ax: Axes | None = None) -> Axes:
    """Block diagram of a U-Net or Demucs: channels and rate of every level, as one training segment meets them.

    Nothing is computed from settings: a model that changes is drawn as it is. Boxes get narrower where rates get lower.
    """
    shapes = output_shapes(model, settings)
    rows, bottom, ends, joins = (_unet_texts if hasattr(model, "stft") else _demucs_texts)(model, shapes, settings)
    top = 1.16 * len(rows) + 3.45
    ax = _canvas(ax, top + 0.6)
    left = [_Box(ax, (3.2 + 0.25 * i, top - 1.3 - 1.16 * i), (5.2 - 0.5 * i, 0.8), text, BLUE) for i, (text, _) in enumerate(rows)]
    right = [_Box(ax, (16 - box.centre[0], box.centre[1]), box.size, text, ROSE) for box, (_, text) in zip(left, rows)]
    below = _Box(ax, (8, left[-1].centre[1] - 1.3), (6.2, 1.15), bottom, "#e4efe2")
    first, last = (_Box(ax, (x, top), (5.2, 0.8), text, "white") for x, text in zip((3.2, 12.8), ends[:2]))
    for upper, lower in zip([first, *left], left):
        _arrow(ax, upper.bottom, lower.top)
    for upper, lower in zip([last, *right], right):
        _arrow(ax, lower.top, upper.bottom)
    _arrow(ax, left[-1].bottom, below.left, bend="angle,angleA=-90,angleB=0,rad=4")
    _arrow(ax, below.right, right[-1].bottom, bend="angle,angleA=0,angleB=-90,rad=4")
    for a, b, text in [(first, last, ends[2]), *zip(left, right, joins)]:
        _draw_skip(ax, a, b, text)
    _text(ax, (8, 0.6), _block_contents(model), size=6.8, colour="#4a4a4a")
    return ax


def output_shapes(model: torch.nn.Module, settings: Settings) -> dict[str, list[tuple[int, ...]]]:
    """Output shapes, without the batch, of every encoder and decoder layer for one silent segment, caught by hooks."""
    caught: dict[str, list] = dict(encoder=[], decoder=[])
    catch = lambda name: lambda _layer, _inputs, output: caught[name].append(tuple(output.shape[1:]))
    hooks = [layer.register_forward_hook(catch(name)) for name in caught for layer in getattr(model, name)]
    was_training = model.training
    with torch.inference_mode():
        model.eval()(torch.zeros(1, settings.channels, settings.segment, device=next(model.parameters()).device))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return caught


def _unet_texts(model: torch.nn.Module, shapes: dict, settings: Settings) -> tuple[list, str, tuple, list]:
    """What the boxes say: rows of (encoder, decoder), the lowest box, the two ends and what joins them, the skip of each row."""
    bins, frames = model.stft.n_fft // 2, settings.segment / model.stft.hop
    size = lambda shape: f"{shape[0]} channels\n{shape[1]} bins, {_rate(shape[2] / shapes['decoder'][-1][2] * frames / settings.segment_s)}"
    channels = model.encoder[0][0].in_channels
    inputs = f"log magnitude, tall path, frequency\n{channels} channels, {bins} bins, {_rate(frames / settings.segment_s)}"
    lefts = [inputs, *map(size, shapes["encoder"][:-1])]
    logits = f"{_count(settings.channels, 'channel')} for the mask\n{bins} bins, {_rate(frames / settings.segment_s)}"
    rights = [logits, *map(size, shapes["decoder"][::-1])]
    ends = (
        f"mixture waveform, {_rate(settings.sample_rate)}\nSTFT, {model.stft.n_fft} samples, hop {model.stft.hop}",
        "soft mask × mixture spectrogram\ninverse STFT: target waveform", "magnitude and phase of the mixture",
    )
    skips = ["add the tall path", *["concatenate"] * len(shapes["decoder"])]
    return list(zip(lefts, rights)), size(shapes["encoder"][-1]), ends, skips


def _demucs_texts(model: torch.nn.Module, shapes: dict, settings: Settings) -> tuple[list, str, tuple, list]:
    """As `_unet_texts`. A decoder block takes the skip of its row and gives what its box says to the row above."""
    # Rates by design (a factor per layer), not by counting frames: padding would make them 15.9 Hz for 15.6.
    factors = [round(a[-1] / b[-1]) for a, b in zip([(settings.segment,), *shapes["encoder"]], shapes["encoder"])]
    rates = settings.sample_rate / np.cumprod([1, *factors])
    lefts = [f"{shape[0]} channels\n{_rate(rate)}" for shape, rate in zip(shapes["encoder"], rates[1:])]
    gates, *ups = shapes["decoder"][::-1]
    rights = [f"to {shape[0]} channels\n{_rate(rate)}" for shape, rate in zip(ups, rates[1:])]
    rights.insert(0, f"{gates[0] // 2} gates, {gates[0] // 2} additions\n{_rate(rates[1])}")
    width = shapes["encoder"][-1][0]
    bottom = f"{_bottleneck_text(model.bottleneck)}\n{width} channels, {_rate(rates[-1])}"
    filters, length_ms = model.filters.out_channels, 1000 * model.filters.kernel_size[0] / settings.sample_rate
    ends = (
        f"mixture waveform, {_rate(settings.sample_rate)}\n{filters} learnt filters, {length_ms:.3g} ms",
        "gates × filter outputs + additions\ntransposed filters: target waveform", "outputs of the filters",
    )
    return list(zip(lefts, rights)), bottom, ends, ["add"] * len(lefts)


def _bottleneck_text(bottleneck: torch.nn.Module) -> str:
    if hasattr(bottleneck, "lstm"):
        lstm = bottleneck.lstm
        return f"{lstm.num_layers} bidirectional LSTM layers,\n{lstm.hidden_size} units each way; linear layer"
    if hasattr(bottleneck, "layers"):
        layer = bottleneck.layers[0]
        heads, units = layer.self_attn.num_heads, layer.linear1.out_features
        return f"sinusoidal positions, {len(bottleneck.layers)} × (self-attention,\n{heads} heads; feed-forward, {units} units)"
    return type(bottleneck).__name__


def _block_contents(model: torch.nn.Module) -> str:
    """What a block down and a block up are made of, and the number of parameters; `k / s` is kernel / stride."""
    alike = lambda blocks, kind: [block for block in blocks if isinstance(block, kind)]  # a Demucs begins and ends otherwise
    down = " → ".join(_layer_names(alike(model.encoder, type(model.encoder[-1]))))
    up = " → ".join(_layer_names(alike(model.decoder, type(model.decoder[0]))))
    tall = f"tall path: {_tall_text(model.tall)}\n" if hasattr(model, "tall") else ""
    return f"down: {down}\nup: {up}\n{tall}{count_parameters(model):,} parameters   (conv kernel / stride, where above 1)"


def _tall_text(path: torch.nn.Module) -> str:
    """The path of model A that takes bins as channels: conv from all bins, over time, back to all bins."""
    steps = ", ".join(str(layer[0].dilation[-1]) for layer in path.over_time)
    rows, width = path.up.out_channels, path.up.in_channels
    return f"{rows} bins → {width} channels, conv 1×3 dilated by {steps} frames, each added → {rows} bins"


def _layer_names(blocks: Sequence[torch.nn.Module]) -> Iterator[str]:
    """Names of the layers of all blocks together; where their convolutions differ, every size is listed once."""
    for layers in zip(*([layer for layer in block.modules() if not list(layer.children())] for block in blocks)):
        kind = type(layers[0]).__name__
        name = {"BatchNorm2d": "batch norm", "GroupNorm": "group norm", "LeakyReLU": "leaky ReLU"}.get(kind, kind)
        if kind.startswith("Conv"):
            sizes = dict.fromkeys(_kernel_text(layer) for layer in layers)
            name = ("transposed conv " if "Transpose" in kind else "conv ") + ", ".join(sizes)
        yield name


def _kernel_text(layer: torch.nn.Module) -> str:
    return "×".join(map(str, layer.kernel_size)) + (f" / {layer.stride[0]}" if layer.stride[0] > 1 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _rate(hz: float) -> str:
    return f"{hz / 1000:.3g} kHz" if hz >= 1000 else f"{hz:.3g} Hz"


BLUE, ROSE = "#dfe9f5", "#fbe8dc"


class _Box:
    """A drawn block: its centre, its size, and the points where arrows meet it."""

    def __init__(self, ax: Axes, centre: tuple[float, float], size: tuple[float, float], text: str, face: str):
        (x, y), (w, h) = centre, size
        self.centre, self.size, self.left, self.right = (x, y), (w, h), (x - w / 2, y), (x + w / 2, y)
        self.top, self.bottom = (x, y + h / 2), (x, y - h / 2)
        style = "round,pad=0,rounding_size=0.12"
        ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=style, facecolor=face, edgecolor=INK, linewidth=0.8))
        _text(ax, (x, y), text)


def _canvas(ax: Axes | None, height_cm: float) -> Axes:
    """Empty axes measured in centimetres of the printed page."""
    if ax is None:
        fig = plt.figure(figsize=(WIDTH, height_cm / 2.54))
        ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 16), ylim=(0, height_cm), aspect="equal")
    ax.axis("off")
    return ax


def _text(ax: Axes, at: tuple[float, float], text: str, size: float = 7.2, colour: str = INK, **options) -> None:
    ax.text(*at, text, ha=options.pop("ha", "center"), va="center", fontsize=size, color=colour, linespacing=1.3, **options)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3", **options) -> None:
    ax.add_patch(FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, shrinkA=1, shrinkB=1, linewidth=1, connectionstyle=bend,
        **dict(color=INK) | options,
    ))


def _draw_skip(ax: Axes, start: _Box, end: _Box, text: str) -> None:
    _arrow(ax, start.right, end.left, color="#7d8590", linestyle=(0, (4, 2)))
    _text(ax, (8, start.centre[1] + 0.17), text, size=6.5, colour="#6a6f76")


PIPELINE = (  # stage, notebooks, what it does, what it leaves in results/<run>/
    ("settings", "", "one profile,\nevery value\nchecked", "settings.json"),
    ("data", "notebook 01", "decoded once,\naudited, mixed\non the fly", "environment.json"),
    ("training", "notebooks 02–04", "A, B1 and B2\nfor the same\nnumber of steps", "models/"),
    ("evaluation", "notebook 05", "BSSEval v4\non the\ntest tracks", "tables/*.csv"),
    ("listening", "notebook 06", "excerpts at\none common\nlevel", "audio/"),
    ("report", "", "reads tables\nand figures,\nadds no number", "report.pdf"),
)


def pipeline(ax: Axes | None = None) -> Axes:
    """The stages of a run from settings to report, with what each leaves in the run's folder."""
    ax = _canvas(ax, 4.1)
    boxes = []
    for i, (stage, pages, does, leaves) in enumerate(PIPELINE):
        x = 1.4 + 2.64 * i
        boxes.append(_Box(ax, (x, 2.3), (2.25, 1.8), "", BLUE))
        ax.text(x, 2.78, stage, size=8, weight="bold", ha="center", color=INK)
        _text(ax, (x, 2.08), does, size=6.6)
        ax.text(x, 3.45, pages, size=6.6, ha="center", color="#6a6f76")
        ax.text(x, 0.4, leaves, size=6.8, ha="center", color=INK, family="monospace")
        _arrow(ax, boxes[-1].bottom, (x, 0.75), color="#7d8590", linestyle=(0, (4, 2)))
    for a, b in zip(boxes, boxes[1:]):
        _arrow(ax, a.right, b.left)
    return ax


def positions(table: np.ndarray, rate_hz: float, axes: np.ndarray | None = None) -> np.ndarray:
    """Positional embedding `(frames, width)` as pictures of its sines and its cosines; `rate_hz` is frames a second. Two axes."""
    axes = _make(axes, 5.4, 1, 2, sharey=True)
    for ax, part, name in zip(axes, (table[:, 0::2], table[:, 1::2]), ("sines", "cosines")):
        extent = (0, len(part) / rate_hz, 0, part.shape[1])
        shown = ax.imshow(np.asarray(part).T, origin="lower", aspect="auto", extent=extent, cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set(xlabel="position in the segment (s)", title=name.capitalize())
        ax.grid(visible=False)
    axes[0].set_ylabel("component (slower upwards)")
    _figure(axes).colorbar(shown, ax=axes, label="value", pad=0.01)
    return axes


# --- training -----------------------------------------------------------------------------------------------------------


def training_curves(histories: Mapping[str, Sequence[pd.DataFrame]], axes: np.ndarray | None = None) -> np.ndarray:
    """Training loss and validation SDR against steps and against time.

    `histories` is `{model: [history of each seed]}` with the columns of `training.history`. Returns axes `(2, 2)`: the
    rows are loss and SDR, the columns steps and time.
    """
    axes = _make(axes, 8.4, 2, 2, sharex="col", sharey="row")
    longest = max(history["train_s"].max() for seeds in histories.values() for history in seeds)
    divisor, unit = (60, "min") if longest > 300 else (1, "s")
    for model, seeds in histories.items():
        for number, history in enumerate(seeds):
            look = dict(color=COLOURS[model], marker=MARKERS[model], markersize=3.2, alpha=1 if number == 0 else 0.45)
            label = LABELS[model] if number == 0 else None
            for column, x in enumerate((history["step"], history["train_s"] / divisor)):
                axes[0, column].plot(x, history["train_loss_db"], label=label, **look)
                axes[1, column].plot(x, history["valid_sdr_db"], label=label, **look)
    axes[0, 0].set(ylabel="training loss (dB)", title="Loss: negative SNR, lower is better")
    axes[1, 0].set(ylabel="SDR (dB)", xlabel="training step", title="Validation SDR, higher is better")
    axes[1, 1].set(xlabel=f"training time ({unit})")
    axes[0, 0].set_xlim(left=0)
    axes[0, 1].set_xlim(left=0)
    if len(histories) > 1:
        _figure(axes).legend(*axes[0, 0].get_legend_handles_labels(), ncols=len(histories), loc="outside lower center")
    return axes


@contextmanager
def live_curves(model: str) -> Iterator:
    """Curves that grow while a model trains: `with live_curves(name) as live: train(..., on_validation=live)`.

    They vanish at the end, when the notebook draws the final ones from history.csv; a loaded model shows none.
    """
    handle = display(display_id=True)

    def update(history: pd.DataFrame) -> None:
        axes = training_curves({model: [history]})
        fig = _figure(axes)
        if handle:
            handle.update(fig)
        plt.close(fig)

    yield update
    if handle:
        handle.update(HTML(""))


def reconstruction(table: pd.DataFrame, model: str, ax: Axes | None = None) -> Axes:
    """SDR in dB against step of a network that learns to return its input, beside the 20 dB line; columns step, sdr_db."""
    ax = _make(ax, 5)
    ax.plot(table["step"], table["sdr_db"], color=COLOURS[model], marker=MARKERS[model])
    ax.axhline(20, color=INK, linewidth=0.9, linestyle="--")
    ax.annotate("20 dB: the error has a hundredth of the energy", (0, 20), (4, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=7)
    ax.set(xlabel="training step", ylabel="SDR of the copy (dB)")
    ax.set_ylim(top=max(23, table["sdr_db"].max() + 2))
    return ax


def excerpt(versions: Mapping[str, np.ndarray], sample_rate: int, scores: Mapping[str, float], start_s: float = 0.0) -> np.ndarray:
    """Spectrograms of all versions of an excerpt; `scores` is the SDR of the track in dB, written into the titles."""
    titles = {name: f"{LABELS.get(name, name)}\nSDR {decibels(scores[name])}" for name in versions if name in scores}
    return spectrograms(versions, sample_rate, titles, start_s=start_s)


# --- scores -------------------------------------------------------------------------------------------------------------


def score_table(summary: pd.DataFrame, target: str, aggregate: str = "median") -> pd.DataFrame:
    """The table `summary` for reading: a row a model, a column a metric, in dB; "median [interval]", or the `mean` over tracks."""
    rows = summary[(summary["target"] == target) & summary["metric"].isin(TABLE_METRICS)]
    interval = lambda row: f" [{number(row.ci_low, 1)}, {number(row.ci_high, 1)}]" if aggregate == "median" else ""
    cells = rows.assign(cell=[number(getattr(row, aggregate)) + interval(row) for row in rows.itertuples()])
    table = cells.pivot(index="model", columns="metric", values="cell")
    table = table.reindex(index=[name for name in LABELS if name in table.index], columns=list(TABLE_METRICS))
    words = "median over tracks [95 % interval], dB" if aggregate == "median" else "mean over tracks, dB"
    return table.rename(index=LABELS, columns=dict(utterance_SDR="utterance SDR", SI_SDR="SI-SDR")).rename_axis(index=None, columns=words)


def ablation_table(ablations: pd.DataFrame, target: str) -> pd.DataFrame:
    """The table `ablations` for reading: a row an ablation and metric, scores in dB with and without, and the difference."""
    rows = ablations[(ablations["target"] == target) & ablations["metric"].isin(METRICS)]
    return pd.DataFrame({
        "model": rows["model"].map(LABELS), "left out": rows["ablation"].str.replace("_", " "), "metric": rows["metric"],
        "with": rows["with_it"].map(number), "without": rows["without_it"].map(number),
        "difference [95 % interval]": [_difference(row) for row in rows.itertuples()],
    }).reset_index(drop=True)


def _difference(row) -> str:
    """Median difference and interval of a row of paired statistics, with signs, in dB."""
    median, low, high = (number(value, sign="+") for value in (row.median_difference, row.ci_low, row.ci_high))
    return f"{median} [{low}, {high}]"


def scores(tracks: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """SDR, SIR and SAR of every track as a dot for every model, with the median and its bootstrap interval. Three axes.

    Dots are means over seeds. A value far outside the models' range (the mixture's SAR has no meaning: nothing was
    processed) is written at the edge as an arrow with its number.
    """
    axes = _make(axes, 8, 1, len(METRICS))
    table = tracks[tracks["target"] == target]
    models = [name for name in LABELS if name in set(table["model"])]
    for ax, metric in zip(axes, METRICS):
        means = table.groupby(["model", "track"])[metric].mean()
        _limit(ax, means[means.index.get_level_values("model") != MIXTURE], means.get(MIXTURE) if metric != "SAR" else None)
        for x, model in enumerate(models):
            values = means.get(model, pd.Series(dtype=float)).dropna()
            _dots(ax, x, values.to_numpy(), model)
            _interval(ax, x, _summary_row(summary, target, model, metric), "median", model)
        ax.set_xticks(range(len(models)), ["mix." if name == MIXTURE else SHORT[name] for name in models])
        ax.set(title=metric, xlim=(-0.6, len(models) - 0.4))
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("score (dB): tracks; median, 95 % interval")
    _model_legend(axes, models)
    return axes


def _limit(ax: Axes, values: pd.Series, more: pd.Series | None) -> None:
    """Limits from the models' finite values, and from the mixture's where they are worth the room."""
    finite = pd.concat([values, more]) if more is not None else values
    finite = finite[np.isfinite(finite)]
    low, high = (finite.min(), finite.max()) if len(finite) else (-1, 1)
    margin = 0.07 * max(high - low, 1)
    ax.set_ylim(low - margin, high + margin)


def _dots(ax: Axes, x: float, values: np.ndarray, model: str) -> None:
    """One dot a track, left of `x`: the interval stands on the right. What lies above the axes becomes an arrow with a number."""
    low, high = ax.get_ylim()
    inside = values[(values > low) & (values < high)]
    spread = x - 0.14 + _jitter(len(inside), 0.2)
    ax.scatter(spread, inside, s=12, marker=MARKERS[model], color=COLOURS[model], alpha=0.7, edgecolors="white", linewidths=0.3)
    if len(outside := values[values >= high]):
        ax.annotate(decibels(np.median(outside), 0), (x, high), (x, high - 0.14 * (high - low)), ha="center", fontsize=6.5,
                    arrowprops=dict(arrowstyle="-|>", color=COLOURS[model]))


def _summary_row(summary: pd.DataFrame, target: str, model: str, metric: str) -> pd.Series | None:
    rows = summary.query("target == @target and model == @model and metric == @metric")
    return rows.iloc[0] if len(rows) else None


def _interval(ax: Axes, x: float, row: pd.Series | None, centre: str, model: str) -> None:
    """The median as a large marker with its interval, right of the dots."""
    low, high = ax.get_ylim()
    if row is not None and low < row[centre] < high:
        error = [[max(0, row[centre] - row["ci_low"])], [max(0, row["ci_high"] - row[centre])]]
        ax.errorbar(x + 0.27, row[centre], np.nan_to_num(error), color=INK, marker=MARKERS[model], markersize=5.5, capsize=2.5,
                    markerfacecolor=COLOURS[model], markeredgewidth=0.9, elinewidth=1.3, zorder=3)


def _model_legend(axes: np.ndarray, models: Sequence[str]) -> None:
    handles = [plt.Line2D([], [], linestyle="", marker=MARKERS[name], color=COLOURS[name], label=LABELS[name]) for name in models]
    columns = len(models) if len(models) < 5 else 3
    _figure(axes).legend(handles=handles, ncols=columns, loc="outside lower center", columnspacing=1.2, handletextpad=0.2)


def slopes(tracks: pd.DataFrame, table: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """SDR of every test track under two models, joined by a line in the colour of the better one. One of three axes a pair.

    `table` is `tables/paired.csv`, whose median difference and interval stand above each pair.
    """
    axes = _make(axes, 7, 1, 3, sharey=True)
    rows = table[(table["target"] == target) & (table["metric"] == "SDR")]
    wide = tracks[tracks["target"] == target].groupby(["track", "model"])["SDR"].mean().unstack("model")
    for ax, row in zip(axes, rows.itertuples()):
        ends = (row.b, row.a)
        both = wide[list(ends)].replace([np.inf, -np.inf], np.nan).dropna()
        for first, second in both.itertuples(index=False):
            ax.plot((0, 1), (first, second), color=COLOURS[ends[second > first]], alpha=0.55, linewidth=0.9)
        for x, model in enumerate(ends):
            look = dict(marker=MARKERS[model], color=COLOURS[model], edgecolors="white", linewidths=0.3)
            ax.scatter([x] * len(both), both[model], s=13, zorder=3, **look)
        ahead = int((both[row.a] > both[row.b]).sum())
        title = f"{SHORT[row.a]} − {SHORT[row.b]}: {_difference(row)} dB"
        ax.set_title(f"{title}\n{SHORT[row.a]} ahead on {ahead} of {len(both)}", fontsize=7.2, fontweight="normal")
        ax.set_xticks((0, 1), [SHORT[model] for model in ends])
        ax.set_xlim(-0.3, 1.3)
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("SDR (dB), a line a track")
    return axes


def trade_off(tracks: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """SDR against SIR and against SAR: every test track a small mark, the median of each model a large one. Two axes.

    The mixture is left out: untouched, it has no artifacts to measure.
    """
    axes = _make(axes, 7.6, 1, 2, sharey=True)
    rows = tracks[tracks["target"] == target]
    models = [name for name in LABELS if name in set(rows["model"]) and name != MIXTURE]
    means = rows.groupby(["model", "track"])[list(METRICS)].mean().replace([np.inf, -np.inf], np.nan)
    means = means.mask(means > ROUNDING_DB)
    for ax, metric in zip(axes, ("SIR", "SAR")):
        for model in models:
            look = dict(marker=MARKERS[model], color=COLOURS[model], edgecolors="white")
            ax.scatter(means.loc[model, metric], means.loc[model, "SDR"], s=11, alpha=0.5, linewidths=0.3, **look)
        for model in models:
            middle = [_summary_row(summary, target, model, name)["median"] for name in (metric, "SDR")]
            if max(middle) >= ROUNDING_DB:
                continue
            ax.scatter(*middle, s=50, marker=MARKERS[model], color=COLOURS[model], edgecolors=INK, linewidths=1, zorder=3)
        ax.set(xlabel=f"{metric} (dB)")
    axes[0].set_ylabel("SDR (dB): tracks; medians large")
    _model_legend(axes, models)
    return axes


def paired(tracks: pd.DataFrame, table: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """Differences between two models track by track, with the median and its interval from `tables/paired.csv`. Three axes."""
    axes = _make(axes, 7, 1, len(METRICS))
    rows = table[table["target"] == target]
    pairs = list(dict.fromkeys(zip(rows["a"], rows["b"])))
    wide = tracks[tracks["target"] == target].groupby(["track", "model"])[list(METRICS)].mean().unstack("model")
    for ax, metric in zip(axes, METRICS):
        ax.axhline(0, color=INK, linewidth=0.9)
        differences = {(a, b): (wide[metric][a] - wide[metric][b]).dropna() for a, b in pairs}
        _limit(ax, pd.concat([*differences.values(), pd.Series([0.0])]), None)
        for x, (a, b) in enumerate(pairs):
            _dots(ax, x, differences[a, b].to_numpy(), a)
            match = rows.query("a == @a and b == @b and metric == @metric")
            _interval(ax, x, match.iloc[0] if len(match) else None, "median_difference", a)
        ax.set_xticks(range(len(pairs)), [f"{SHORT[a]} − {SHORT[b]}" for a, b in pairs])
        ax.set(title=metric, xlim=(-0.6, len(pairs) - 0.4))
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("difference (dB): tracks; median, 95 % interval")
    return axes


def cost(table: pd.DataFrame, summary: pd.DataFrame, target: str, axes: np.ndarray | None = None) -> np.ndarray:
    """Median SDR against training time and against time to separate, between mixture (floor) and oracle (ceiling). Two axes."""
    axes = _make(axes, 6.4, 1, 2, sharey=True)
    rows = table[table["target"] == target]
    divisor, unit = (60, "min") if rows["train_s"].max() > 300 else (1, "s")
    for model in [name for name in LABELS if name in set(rows["model"])]:
        part = rows[rows["model"] == model]
        row = _summary_row(summary, target, model, "SDR")
        if row is None:
            continue
        error = np.nan_to_num([[row["median"] - row["ci_low"]], [row["ci_high"] - row["median"]]])
        look = dict(color=COLOURS[model], marker=MARKERS[model], markersize=7, capsize=3, linestyle="", label=LABELS[model])
        for ax, x in zip(axes, (part["train_s"].mean() / divisor, 1000 * part["inference_rtf"].mean())):
            ax.errorbar(x, row["median"], error, **look)
    for name, line, above in ((MIXTURE, "--", 3), ("irm", ":", -9)):
        _level_line(axes, _summary_row(summary, target, name, "SDR"), name, line, above)
    axes[0].set(xlabel=f"training time ({unit})", ylabel="median SDR (dB)")
    axes[1].set(xlabel="time to separate one second of audio (ms)")
    for ax in axes:
        ax.set_xlim(0, 1.12 * ax.get_xlim()[1])
    _figure(axes).legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return axes


def _level_line(axes: np.ndarray, row: pd.Series | None, name: str, line: str, above: int) -> None:
    if row is None or not np.isfinite(row["median"]):
        return
    for ax in axes:
        ax.axhline(row["median"], color=COLOURS[name], linestyle=line, linewidth=1.4)
    axes[0].annotate(LABELS[name], (0.01, row["median"]), (2, above), xycoords=("axes fraction", "data"),
                     textcoords="offset points", fontsize=7, color=COLOURS[name])
