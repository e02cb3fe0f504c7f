"""Models B0, B1 and B2: a simplified Demucs on the waveform; only their bottlenecks differ.

After Defossez et al., "Music source separation in the waveform domain" (2019), for one target; the
gates on learned filters follow Luo and Mesgarani, "Conv-TasNet" (2019). Taught in notebooks 03
and 04. Shapes: B batch, C audio channels, K taps (and filters), P = K / 2 pairs of filters,
T frames, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class Filters(nn.Module):
    """K learned filters of K taps with stride K / 2: a cosine and a sine per frequency at first.

    A strided convolution, computed as a matrix product with overlapping frames, which is faster on
    a CPU. Weights are stored sqrt(K) times as large as they are used (equalized learning rate,
    Karras et al., "Progressive growing of GANs", 2018, section 4.1): Adam's steps, which do not
    depend on the size of a weight, then change the filters slowly.
    """

    def __init__(self, taps: int):
        super().__init__()
        self.taps, self.hop = taps, taps // 2
        self.weight = nn.Parameter(math.sqrt(taps) * fourier_basis(taps))  # (K, K): filters, taps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, C, samples)` to `(B, C, T, K)`."""
        frames = x.unfold(-1, self.taps, self.hop)  # (B, C, T, K)
        return nn.functional.linear(frames, self.weight / math.sqrt(self.taps))


class Synthesis(nn.Module):
    """Transposed convolution that at first inverts `Filters`: matrix product and overlap-add."""

    def __init__(self, taps: int):
        super().__init__()
        self.weight = nn.Parameter(math.sqrt(taps) / 2 * fourier_basis(taps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, C, T, K)` to `(B, C, samples)`."""
        frames = x @ (self.weight / math.sqrt(len(self.weight)))  # (B, C, T, K)
        first, second = frames.chunk(2, dim=-1)  # the halves of frames that overlap
        first = nn.functional.pad(first, (0, 0, 0, 1))
        return (first + nn.functional.pad(second, (0, 0, 1, 0))).flatten(-2)


class Layer(nn.Sequential):
    """Linear layer, batch normalisation, GELU for every frame on its own: a 1x1 convolution."""

    def __init__(self, n_inputs: int, n_outputs: int):
        super().__init__(nn.Linear(n_inputs, n_outputs), nn.BatchNorm1d(n_outputs), nn.GELU())


class Demucs(nn.Module):
    """Mixture -> filters -> encoder -> bottleneck -> decoder -> gated filters -> target.

    The encoder gets the magnitude of every pair of filters, and both outputs of the pair on the
    same logarithmic scale. The decoder returns a gate in [0, 1] for every pair and a learned
    residual, at first zero, for every filter. Outside the bottleneck, a frame depends on its own K
    samples and the level of the mixture.
    """

    def __init__(self, channels: int, taps: int, width: int, bottleneck_width: int):
        super().__init__()
        n_filters = channels * taps
        self.filters, self.synthesis = Filters(taps), Synthesis(taps)
        self.norm = nn.BatchNorm1d(3 * n_filters // 2)
        layers = [Layer(3 * n_filters // 2, width), Layer(width, bottleneck_width)]
        self.encoder = nn.ModuleList(layers)
        self.bottleneck: nn.Module = nn.Identity()  # build_model replaces it
        self.decoder = Layer(bottleneck_width, width)
        self.gates = nn.Linear(width, n_filters // 2)
        self.residual = nn.Linear(width, n_filters)
        for parameter in self.residual.parameters():
            nn.init.zeros_(parameter)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        """Estimate the target, `(B, C, samples)`, in a mixture of any length and that shape."""
        samples, hop = mixture.shape[-1], self.filters.hop
        level = mixture.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-5  # (B, 1, 1)
        padded = nn.functional.pad(mixture / level, (hop, hop + -samples % hop))
        pairs = self.filters(padded).unflatten(-1, (2, -1)).transpose(1, 2)  # (B, T, C, 2, P)
        size = pairs.shape[:2]
        skip = self.encoder[0](self.norm(features(pairs).flatten(0, 1)))  # (B * T, W)
        x = self.encoder[1](skip).unflatten(0, size)  # (B, T, W of the bottleneck)
        x = self.decoder(self.bottleneck(x).flatten(0, 1)) + skip  # (B * T, W)
        gates = torch.sigmoid(self.gates(x)).view_as(pairs[:, :, :, :1])  # one for a pair
        pairs = pairs * gates + self.residual(x).view_as(pairs)
        estimate = self.synthesis(pairs.flatten(-2).transpose(1, 2))  # (B, C, padded)
        return estimate[..., hop : hop + samples] * level


class Bottleneck(nn.Module):
    """Layer normalisation, a core, and a residual connection around both."""

    def __init__(self, width: int, core: nn.Module):
        super().__init__()
        self.norm, self.core = nn.LayerNorm(width), core

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, W)` to the same shape, for any number of frames."""
        return x + self.core(self.norm(x))


class FramewiseCore(nn.Sequential):
    """B0, the control: a feed-forward network for every frame on its own, 18 W^2 weights."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, 9 * width), nn.GELU(), nn.Linear(9 * width, width))


class LSTMCore(nn.Module):
    """B1: a bidirectional LSTM layer and a linear layer, 18 W^2 weights.

    Forget biases are at first the logarithm of a uniform draw from 1 to 128 frames, input biases
    their negative: memories of that length (Tallec and Ollivier, "Can recurrent neural networks
    warp time?", 2018).
    """

    def __init__(self, width: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * width, width)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias"):  # of the input and of the hidden state; they are added
                nn.init.zeros_(bias)
            if name.startswith("bias_ih"):
                memory = torch.log(torch.empty(width).uniform_(1, 128))
                bias.data[: 2 * width] = torch.cat([-memory, memory])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, W)` to the same shape."""
        x, _ = self.lstm(x)  # (B, T, 2 * W): forward and backward
        return self.linear(x)


class AttentionCore(nn.Module):
    """B2: two pre-norm self-attention layers with sinusoidal positions, 18 W^2 weights.

    A layer has 4 W^2 weights for attention and 2 * 2.5 W^2 for its feed-forward network.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        sizes = (width, heads, 5 * width // 2)
        options: Any = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layers = [nn.TransformerEncoderLayer(*sizes, **options) for _ in range(2)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, T, W)` to the same shape."""
        positions = sinusoidal_positions(x.shape[1], x.shape[2], x.device)  # (T, W)
        return self.layers(x + positions.to(x))


def sinusoidal_positions(frames: int, width: int, device=None) -> torch.Tensor:
    """Return the positional embedding `(frames, width)` of Vaswani et al. (2017), section 3.5."""
    position = torch.arange(frames, device=device)[:, None]
    rate = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=device) / width)
    pairs = [torch.sin(position * rate), torch.cos(position * rate)]  # each (frames, width / 2)
    return torch.stack(pairs, dim=-1).flatten(1)[:, :width]  # sine and cosine in turn


def features(pairs: torch.Tensor) -> torch.Tensor:
    """Return log magnitudes and compressed outputs of filter pairs, `(B, T, 3 * C * P)`.

    Parameters
    ----------
    pairs : Tensor
        Outputs of the filters, `(B, T, C, 2, P)`, cosines first.
    """
    magnitude = (pairs.square().sum(dim=3, keepdim=True) + 1e-8).sqrt()  # (B, T, C, 1, P)
    log_magnitude = torch.log1p(3 * magnitude)
    compressed = pairs * (log_magnitude / magnitude)  # keeps the signs
    return torch.cat([log_magnitude, compressed], dim=3).flatten(2)


def fourier_basis(taps: int) -> torch.Tensor:
    """Return sine-windowed cosines, then sines: `(filters, taps)`, both `taps`.

    Frequencies lie between the bins of a DFT. All but the lowest have unit norm. Analysis and its
    transpose reconstruct frames that overlap by half, up to a factor of two.
    """
    time = torch.arange(taps) + 0.5
    phase = 2 * math.pi / taps * (torch.arange(taps // 2)[:, None] + 0.5) * time  # (P, taps)
    waves = torch.cat([torch.cos(phase), torch.sin(phase)])  # (taps, taps)
    return 2 / math.sqrt(taps) * waves * torch.sin(math.pi / taps * time)
