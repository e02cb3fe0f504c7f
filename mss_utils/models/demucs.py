"""Models B1 and B2: a simplified Demucs on the raw waveform; the two differ in nothing but the bottleneck.

After Defossez et al., "Music source separation in the waveform domain" (2019), without its resampling and with one target;
the gated first layer after Luo and Mesgarani, "Conv-TasNet" (2019). Taught in notebooks 03 (BiLSTM) and 04 (self-attention).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from mss_utils.models.level import Level


class Encoder(nn.Sequential):
    """Strided convolution, normalisation, GELU, then a 1x1 "rewrite" whose output a gated linear unit halves."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__(
            nn.Conv1d(channels_in, channels_out, 2 * stride, stride, padding=stride // 2),
            nn.GroupNorm(1, channels_out),
            nn.GELU(),
            nn.Conv1d(channels_out, 2 * channels_out, 1),
            nn.GLU(dim=1),
        )


class Decoder(nn.Sequential):
    """Mirror of `Encoder`: rewrite, gate, transposed convolution, normalisation, GELU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__(
            nn.Conv1d(channels_in, 2 * channels_in, 1),
            nn.GLU(dim=1),
            nn.ConvTranspose1d(channels_in, channels_out, 2 * stride, stride, padding=stride // 2),
            nn.GroupNorm(1, channels_out),
            nn.GELU(),
        )


class Demucs(nn.Module):
    """Mixture waveform -> filters -> strided encoder -> bottleneck -> transposed decoder with skips -> gated filters -> target waveform.

    The first layer is linear: `width` filters four strides long, which begin as a Fourier basis and are learnt. The last one
    undoes them: each filter's output passes through a gate between 0 and 1 that the decoder sets, and the decoder adds what
    it likes, at first nothing. In between, kernels are twice the stride, and channels double from layer to layer up to
    `max_width`, the width of the bottleneck. `bottleneck` maps `(batch, frames, width)` to the same shape; it is the
    identity until one is put in. The input is scaled to unit power and the output scaled back. Strides are even, so
    that layers pad alike on both sides, and `width` is a multiple of twice the channels; `Settings` sees to both.
    """

    def __init__(self, channels: int, width: int, max_width: int, strides: Sequence[int]):
        super().__init__()
        self.level = Level()
        first, *rest = strides
        widths = [min(width * 2**layer, max_width) for layer in range(len(strides))]
        self.bottleneck_width, self.total_stride = widths[-1], math.prod(strides)
        layers = list(zip(widths, widths[1:], rest))
        self.filters = nn.Conv1d(
            channels, width, 4 * first, first, padding=3 * first // 2, bias=False
        )
        rewrite = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1))
        self.encoder = nn.ModuleList([rewrite, *(Encoder(*layer) for layer in layers)])
        last = nn.Sequential(nn.GroupNorm(1, width), nn.Conv1d(width, 2 * width, 1))
        self.decoder = nn.ModuleList(
            [*(Decoder(b, a, stride) for a, b, stride in reversed(layers)), last]
        )
        self.synthesis = nn.ConvTranspose1d(
            width, channels, 4 * first, first, padding=3 * first // 2, bias=False
        )
        rescale_weights(self)
        nn.init.zeros_(last[1].weight[:width])  # at first nothing is added
        nn.init.zeros_(last[1].bias[:width])
        basis = fourier_basis(channels, width, 4 * first)
        self.filters.weight.data.copy_(basis)
        self.synthesis.weight.data.copy_(basis / 4)  # every sample lies in four filters' frames
        self.bottleneck = nn.Identity()

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, samples)` -> target estimate of the same shape, for any number of samples."""
        samples = mixture.shape[-1]
        scale = self.level(mixture)
        padding = (
            -samples % self.total_stride
        )  # every layer divides the padded length without a remainder
        x = filtered = self.filters(
            nn.functional.pad(mixture / scale, (padding // 2, padding - padding // 2))
        )
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)  # (batch, width of the layer, frames)
        x = self.bottleneck(x.transpose(1, 2)).transpose(1, 2)  # (batch, frames, width) inside
        for layer in self.decoder:
            x = layer(x + skips.pop())
        added, gates = x.chunk(
            2, dim=1
        )  # each (batch, width, samples / first stride), like the filters' outputs
        estimate = self.synthesis(filtered * torch.sigmoid(gates) + added)
        return estimate[..., padding // 2 : padding // 2 + samples] * scale


class LSTMBottleneck(nn.Module):
    """B1: two bidirectional LSTM layers and a linear layer back to `width`; 42 width^2 weights."""

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, width)` -> the same shape."""
        return self.linear(self.lstm(x)[0])


class AttentionBottleneck(nn.Module):
    """B2: three pre-norm self-attention layers with sinusoidal positions; 42 width^2 weights like B1's.

    Each layer costs 4 width^2 for attention and 2 * 5 width^2 for its feed-forward part (Vaswani et al., 2017).
    """

    def __init__(self, width: int, heads: int, n_layers: int = 3, expansion: int = 5):
        super().__init__()
        layers = [
            nn.TransformerEncoderLayer(
                width,
                heads,
                expansion * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(n_layers)
        ]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, frames, width)` -> the same shape; any number of frames, positions are computed."""
        x = x + sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x)
        for layer in self.layers:
            x = layer(x)
        return x


def sinusoidal_positions(
    frames: int, width: int, device: torch.device | None = None
) -> torch.Tensor:
    """Positional embedding `(frames, width)`: sines and cosines of geometrically spaced periods (Vaswani et al., 2017, 3.5)."""
    position = torch.arange(frames, device=device)[:, None]
    rate = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=device) / width)
    return torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1).flatten(1)[
        :, :width
    ]


def fourier_basis(channels: int, n_filters: int, length: int) -> torch.Tensor:
    """Hann-windowed cosines and sines of equally spaced frequencies, unit norm: `(n_filters, channels, length)`.

    Every filter listens to one channel; each channel has equally many cosines and sines.
    """
    n = n_filters // (2 * channels)
    phase = (
        math.pi
        * torch.arange(1, n + 1)[:, None]
        / (n + 1)
        * (torch.arange(length) - (length - 1) / 2)
    )
    waves = torch.cat([torch.cos(phase), torch.sin(phase)]) * torch.hann_window(
        length, periodic=False
    )  # (2 * n, length)
    waves = waves / waves.norm(dim=1, keepdim=True)
    basis = torch.zeros(channels, 2 * n, channels, length)
    for channel in range(channels):
        basis[channel, :, channel] = waves
    return basis.flatten(0, 1)


def rescale_weights(module: nn.Module, reference: float = 0.1) -> None:
    """Scale every convolution so that its weights' standard deviation nears `reference` (Defossez et al., 2019, section 4.3)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            scale = (layer.weight.std().detach() / reference) ** 0.5
            layer.weight.data /= scale
            if layer.bias is not None:
                layer.bias.data /= scale
