"""Drawings: the pipeline of a run, and the models as block diagrams, read off the models themselves. Notebooks 01 to 04."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mss_utils.config import Settings
from mss_utils.figures.style import INK, WIDTH, create_axes, figure_of
from mss_utils.models import count_parameters


def architecture(model: torch.nn.Module, settings: Settings, ax: Axes | None = None) -> Axes:
    """Block diagram of a U-Net or Demucs: channels and rate of every level, as one training segment meets them.

    Nothing is computed from settings: a model that changes is drawn as it is. Boxes get narrower where rates get lower.
    """
    shapes = output_shapes(model, settings)
    rows, bottom, ends, joins = (_unet_texts if hasattr(model, "stft") else _demucs_texts)(
        model, shapes, settings
    )
    top = 1.16 * len(rows) + 3.45
    ax = _canvas(ax, top + 0.6)
    left = [
        _Box(ax, (3.2 + 0.25 * i, top - 1.3 - 1.16 * i), (5.2 - 0.5 * i, 0.8), text, BLUE)
        for i, (text, _) in enumerate(rows)
    ]
    right = [
        _Box(ax, (16 - box.centre[0], box.centre[1]), box.size, text, ROSE)
        for box, (_, text) in zip(left, rows)
    ]
    below = _Box(ax, (8, left[-1].centre[1] - 1.3), (6.2, 1.15), bottom, "#e4efe2")
    first, last = (
        _Box(ax, (x, top), (5.2, 0.8), text, "white") for x, text in zip((3.2, 12.8), ends[:2])
    )
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
    catch = lambda name: (
        lambda _layer, _inputs, output: caught[name].append(tuple(output.shape[1:]))
    )
    hooks = [
        layer.register_forward_hook(catch(name))
        for name in caught
        for layer in getattr(model, name)
    ]
    was_training = model.training
    with torch.inference_mode():
        model.eval()(
            torch.zeros(
                1, settings.channels, settings.segment, device=next(model.parameters()).device
            )
        )
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return caught


def _unet_texts(
    model: torch.nn.Module, shapes: dict, settings: Settings
) -> tuple[list, str, tuple, list]:
    """What the boxes say: rows of (encoder, decoder), the lowest box, the two ends and what joins them, the skip of each row."""
    bins, frames = model.stft.n_fft // 2, settings.segment / model.stft.hop
    size = lambda shape: (
        f"{shape[0]} channels\n{shape[1]} bins, {_rate(shape[2] / shapes['decoder'][-1][2] * frames / settings.segment_s)}"
    )
    channels = model.encoder[0][0].in_channels
    inputs = f"log magnitude, tall path, frequency\n{channels} channels, {bins} bins, {_rate(frames / settings.segment_s)}"
    lefts = [inputs, *map(size, shapes["encoder"][:-1])]
    logits = f"{_count(settings.channels, 'channel')} for the mask\n{bins} bins, {_rate(frames / settings.segment_s)}"
    rights = [logits, *map(size, shapes["decoder"][::-1])]
    ends = (
        f"mixture waveform, {_rate(settings.sample_rate)}\nSTFT, {model.stft.n_fft} samples, hop {model.stft.hop}",
        "soft mask × mixture spectrogram\ninverse STFT: target waveform",
        "magnitude and phase of the mixture",
    )
    skips = ["add the tall path", *["concatenate"] * len(shapes["decoder"])]
    return list(zip(lefts, rights)), size(shapes["encoder"][-1]), ends, skips


def _demucs_texts(
    model: torch.nn.Module, shapes: dict, settings: Settings
) -> tuple[list, str, tuple, list]:
    """As `_unet_texts`. A decoder block takes the skip of its row and gives what its box says to the row above."""
    # Rates by design (a factor per layer), not by counting frames: padding would make them 15.9 Hz for 15.6.
    factors = [
        round(a[-1] / b[-1])
        for a, b in zip([(settings.segment,), *shapes["encoder"]], shapes["encoder"])
    ]
    rates = settings.sample_rate / np.cumprod([1, *factors])
    lefts = [
        f"{shape[0]} channels\n{_rate(rate)}" for shape, rate in zip(shapes["encoder"], rates[1:])
    ]
    gates, *ups = shapes["decoder"][::-1]
    rights = [f"to {shape[0]} channels\n{_rate(rate)}" for shape, rate in zip(ups, rates[1:])]
    rights.insert(0, f"{gates[0] // 2} gates, {gates[0] // 2} additions\n{_rate(rates[1])}")
    width = shapes["encoder"][-1][0]
    bottom = f"{_bottleneck_text(model.bottleneck)}\n{width} channels, {_rate(rates[-1])}"
    filters, length_ms = (
        model.filters.out_channels,
        1000 * model.filters.kernel_size[0] / settings.sample_rate,
    )
    ends = (
        f"mixture waveform, {_rate(settings.sample_rate)}\n{filters} learnt filters, {length_ms:.3g} ms",
        "gates × filter outputs + additions\ntransposed filters: target waveform",
        "outputs of the filters",
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
    alike = lambda blocks, kind: [
        block for block in blocks if isinstance(block, kind)
    ]  # a Demucs begins and ends otherwise
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
    for layers in zip(
        *([layer for layer in block.modules() if not list(layer.children())] for block in blocks)
    ):
        kind = type(layers[0]).__name__
        name = {
            "BatchNorm2d": "batch norm",
            "GroupNorm": "group norm",
            "LeakyReLU": "leaky ReLU",
        }.get(kind, kind)
        if kind.startswith("Conv"):
            sizes = dict.fromkeys(_kernel_text(layer) for layer in layers)
            name = ("transposed conv " if "Transpose" in kind else "conv ") + ", ".join(sizes)
        yield name


def _kernel_text(layer: torch.nn.Module) -> str:
    return "×".join(map(str, layer.kernel_size)) + (
        f" / {layer.stride[0]}" if layer.stride[0] > 1 else ""
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _rate(hz: float) -> str:
    return f"{hz / 1000:.3g} kHz" if hz >= 1000 else f"{hz:.3g} Hz"


BLUE, ROSE = "#dfe9f5", "#fbe8dc"


class _Box:
    """A drawn block: its centre, its size, and the points where arrows meet it."""

    def __init__(
        self, ax: Axes, centre: tuple[float, float], size: tuple[float, float], text: str, face: str
    ):
        (x, y), (w, h) = centre, size
        self.centre, self.size, self.left, self.right = (
            (x, y),
            (w, h),
            (x - w / 2, y),
            (x + w / 2, y),
        )
        self.top, self.bottom = (x, y + h / 2), (x, y - h / 2)
        style = "round,pad=0,rounding_size=0.12"
        ax.add_patch(
            FancyBboxPatch(
                (x - w / 2, y - h / 2),
                w,
                h,
                boxstyle=style,
                facecolor=face,
                edgecolor=INK,
                linewidth=0.8,
            )
        )
        _text(ax, (x, y), text)


def _canvas(ax: Axes | None, height_cm: float) -> Axes:
    """Empty axes measured in centimetres of the printed page."""
    if ax is None:
        fig = plt.figure(figsize=(WIDTH, height_cm / 2.54))
        ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 16), ylim=(0, height_cm), aspect="equal")
    ax.axis("off")
    return ax


def _text(
    ax: Axes, at: tuple[float, float], text: str, size: float = 7.2, colour: str = INK, **options
) -> None:
    ax.text(
        *at,
        text,
        ha=options.pop("ha", "center"),
        va="center",
        fontsize=size,
        color=colour,
        linespacing=1.3,
        **options,
    )


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3", **options
) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=8,
            shrinkA=1,
            shrinkB=1,
            linewidth=1,
            connectionstyle=bend,
            **dict(color=INK) | options,
        )
    )


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
    axes = create_axes(axes, 5.4, 1, 2, sharey=True)
    for ax, part, name in zip(axes, (table[:, 0::2], table[:, 1::2]), ("sines", "cosines")):
        extent = (0, len(part) / rate_hz, 0, part.shape[1])
        shown = ax.imshow(
            np.asarray(part).T,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
        )
        ax.set(xlabel="position in the segment (s)", title=name.capitalize())
        ax.grid(visible=False)
    axes[0].set_ylabel("component (slower upwards)")
    figure_of(axes).colorbar(shown, ax=axes, label="value", pad=0.01)
    return axes
