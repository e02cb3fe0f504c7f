"""Models B1 and B2: a simplified Demucs on the waveform; only their bottlenecks differ.

After Defossez et al., "Music source separation in the waveform domain" (2019), for one target; the
gates on learned filters follow Luo and Mesgarani, "Conv-TasNet" (2019). Taught in notebooks 03
and 04. Shapes: B batch, C audio channels, W width (filters or convolution channels), T frames.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class Encoder(nn.Sequential):
    """Strided convolution, normalisation, GELU, then a 1x1 convolution and a gated linear unit."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__(
            nn.Conv1d(channels_in, channels_out, 2 * stride, stride, padding=stride // 2),
            nn.GroupNorm(1, channels_out),
            nn.GELU(),
            nn.Conv1d(channels_out, 2 * channels_out, 1),
            nn.GLU(dim=1),  # halves the channels
        )


class Decoder(nn.Sequential):
    """Mirror image of `Encoder`, with a transposed convolution."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__(
            nn.Conv1d(channels_in, 2 * channels_in, 1),
            nn.GLU(dim=1),
            nn.ConvTranspose1d(channels_in, channels_out, 2 * stride, stride, padding=stride // 2),
            nn.GroupNorm(1, channels_out),
            nn.GELU(),
        )


class Demucs(nn.Module):
    """Mixture -> filters -> encoder -> bottleneck -> decoder -> gated filters -> target.

    The first layer is linear: `width` filters, four strides long, initialised with a Fourier basis
    and learned. The last layer is its transpose. In between, each filter output is multiplied by
    a gate in [0, 1] from the decoder, and the decoder also adds a learned residual, initialised to
    zero. Channels double from layer to layer up to `max_width`.
    """

    def __init__(self, channels: int, width: int, max_width: int, strides: tuple[int, ...]):
        super().__init__()
        first, *rest = strides
        widths = [min(width * 2**layer, max_width) for layer in range(len(strides))]
        self.bottleneck_width, self.total_stride = widths[-1], math.prod(strides)
        layers = list(zip(widths[:-1], widths[1:], rest, strict=True))
        size: Any = dict(kernel_size=4 * first, stride=first, padding=3 * first // 2, bias=False)
        self.filters = nn.Conv1d(channels, width, **size)
        rewrite = nn.Sequential(nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1))
        self.encoder = nn.ModuleList([rewrite, *(Encoder(*layer) for layer in layers)])
        last = nn.Sequential(nn.GroupNorm(1, width), nn.Conv1d(width, 2 * width, 1))
        ups = (Decoder(b, a, stride) for a, b, stride in reversed(layers))
        self.decoder = nn.ModuleList([*ups, last])
        self.synthesis = nn.ConvTranspose1d(width, channels, **size)
        rescale_weights(self)
        for parameter in last[1].parameters():
            nn.init.zeros_(parameter[:width])  # the learned residual
        basis = fourier_basis(channels, width, 4 * first)
        self.filters.weight.data.copy_(basis)
        self.synthesis.weight.data.copy_(basis / 4)  # every sample lies in the frames of 4 filters
        self.bottleneck: nn.Module = nn.Identity()  # build_model replaces it

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        """Estimate the target, `(B, C, samples)`, in a mixture of any length and that shape."""
        samples = mixture.shape[-1]
        level = mixture.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-5  # (B, 1, 1)
        padding = -samples % self.total_stride  # so that every stride divides the length
        left, right = padding // 2, padding - padding // 2
        x = filtered = self.filters(nn.functional.pad(mixture / level, (left, right)))  # (B, W, T)
        skips = []
        for layer in self.encoder:
            x = layer(x)  # (B, W of the layer, T / stride of the layer)
            skips.append(x)
        x = self.bottleneck(x.transpose(1, 2)).transpose(1, 2)  # (B, T, W) inside
        for layer in self.decoder:
            x = layer(x + skips.pop())  # (B, W of the layer, T * stride of the layer)
        addition, gates = x.chunk(2, dim=1)  # each (B, W, T), as the filter outputs
        estimate = self.synthesis(filtered * torch.sigmoid(gates) + addition)  # (B, C, padded)
        return estimate[..., left : left + samples] * level


class LSTMBottleneck(nn.Module):
    """B1: two bidirectional LSTM layers and a linear layer, 42 W^2 weights."""

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, W)` to the same shape."""
        x, _ = self.lstm(x)  # (B, T, 2 * W): forward and backward
        return self.linear(x)  # (B, T, W)


class AttentionBottleneck(nn.Module):
    """B2: three pre-norm self-attention layers with sinusoidal positions, 42 W^2 weights like B1.

    A layer has 4 W^2 weights for attention and 2 * 5 W^2 for its feed-forward network.
    """

    def __init__(self, width: int, heads: int, n_layers: int = 3, expansion: int = 5):
        super().__init__()
        sizes = (width, heads, expansion * width)
        options: Any = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layers = [nn.TransformerEncoderLayer(*sizes, **options) for _ in range(n_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, W)` to the same shape, for any number of frames."""
        x = x + sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x)  # (T, W), broadcast
        for layer in self.layers:
            x = layer(x)
        return x


def sinusoidal_positions(frames: int, width: int, device=None) -> torch.Tensor:
    """Return the positional embedding `(frames, width)` of Vaswani et al. (2017), section 3.5."""
    position = torch.arange(frames, device=device)[:, None]
    rate = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=device) / width)
    pairs = [torch.sin(position * rate), torch.cos(position * rate)]  # each (frames, width / 2)
    return torch.stack(pairs, dim=-1).flatten(1)[:, :width]  # sine and cosine in turn


def fourier_basis(channels: int, n_filters: int, length: int) -> torch.Tensor:
    """Return Hann-windowed cosines and sines of unit norm, `(n_filters, channels, length)`."""
    n = n_filters // (2 * channels)
    time = torch.arange(length) - (length - 1) / 2
    phase = math.pi * torch.arange(1, n + 1)[:, None] / (n + 1) * time  # (n, length)
    waves = torch.cat([torch.cos(phase), torch.sin(phase)])  # (2 * n, length)
    waves = waves * torch.hann_window(length, periodic=False)
    waves = waves / waves.norm(dim=1, keepdim=True)
    basis = torch.zeros(channels, 2 * n, channels, length)
    for channel in range(channels):
        basis[channel, :, channel] = waves
    return basis.flatten(0, 1)


def rescale_weights(module: nn.Module, reference: float = 0.1) -> None:
    """Scale convolutions to a standard deviation near `reference` (Defossez et al., 2019, 4.3)."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            scale = (layer.weight.std().detach() / reference) ** 0.5
            layer.weight.data /= scale
            if layer.bias is not None:
                layer.bias.data /= scale
