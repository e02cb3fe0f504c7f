"""Model A: a 2-D U-Net that estimates a soft mask and keeps the phase of the mixture.

After Jansson et al., "Singing voice separation with deep U-Net convolutional networks" (ISMIR
2017), with a full-band branch beside the U-Net. Taught in notebook 02. Shapes: B batch, C audio
channels, F frequency bins, T frames, W width (convolution channels).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn


class STFT(nn.Module):
    """Short-time Fourier transform with a Hann window, and its inverse by overlap-add."""

    def __init__(self, n_fft: int, hop: int):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Transform `(B, C, samples)` to complex `(B, C, F, T)`; frames are centred."""
        options: Any = dict(window=self.window, pad_mode="constant", return_complex=True)
        spec = torch.stft(audio.flatten(0, 1), self.n_fft, self.hop, **options)  # (B * C, F, T)
        return spec.unflatten(0, audio.shape[:2])  # (B, C, F, T)

    def inverse(self, spec: torch.Tensor, samples: int) -> torch.Tensor:
        """Transform complex `(B, C, F, T)` to `(B, C, samples)`."""
        options: Any = dict(window=self.window, length=samples)
        audio = torch.istft(spec.flatten(0, 1), self.n_fft, self.hop, **options)  # (B * C, samples)
        return audio.unflatten(0, spec.shape[:2])  # (B, C, samples)


class Down(nn.Sequential):
    """Encoder level: a strided 4x4 convolution halves bins and frames."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.LeakyReLU(0.2, inplace=True),
        )


class Up(nn.Sequential):
    """Decoder level: a transposed 4x4 convolution doubles bins and frames."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(
            nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )


class FullBandBranch(nn.Module):
    """Convolutions over time that see all bins of a frame at once.

    The kernels of the U-Net are small, but the overtones of a note lie hundreds of bins apart. Here
    the bins are channels. Dilations after van den Oord et al., "WaveNet" (2016), section 2.1.
    """

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(rows)  # every bin on its own
        self.down = nn.Sequential(nn.Conv2d(rows, width, 1), nn.BatchNorm2d(width), nn.GELU())
        self.over_time = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, (1, 3), padding=(0, n), dilation=(1, n)),
                nn.BatchNorm2d(width),
                nn.GELU(),
            )
            for n in (1, 2, 4, 8)
        )
        self.up = nn.Conv2d(width, rows, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(B, C, F, T)` to the same shape."""
        y = self.norm(x.flatten(1, 2).unsqueeze(2))  # (B, C * F, 1, T)
        y = self.down(y)  # (B, W, 1, T)
        for layer in self.over_time:
            y = y + layer(y)  # (B, W, 1, T)
        return self.up(y).reshape(x.shape)  # (B, C * F, 1, T) -> (B, C, F, T)


class UNet(nn.Module):
    """Mixture -> STFT -> log magnitude -> U-Net -> mask in [0, 1] -> masked STFT -> target.

    The output of the full-band branch is an input of the U-Net and is also added to its output.
    The highest bin (Nyquist) has the mask of the bin below it.
    """

    def __init__(self, channels: int, width: int, depth: int, n_fft: int, hop: int, full_band: int):
        super().__init__()
        self.stft, self.depth = STFT(n_fft, hop), depth
        self.full_band = FullBandBranch(channels * n_fft // 2, full_band)
        widths = [2 * channels + 1, *(width * 2**level for level in range(depth))]
        self.input_norm = nn.BatchNorm2d(channels)
        self.encoder = nn.ModuleList(Down(a, b) for a, b in pairwise(widths))
        outs = widths[-2:0:-1]
        ins = [widths[-1], *(2 * out for out in outs)]  # twice as many after a concatenation
        self.decoder = nn.ModuleList(Up(a, b) for a, b in zip(ins[:-1], outs, strict=True))
        self.head = nn.ConvTranspose2d(2 * width, channels, 4, stride=2, padding=1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        """Estimate the target, `(B, C, samples)`, in a mixture of any length and that shape."""
        spec = self.stft(mixture)  # complex (B, C, F, T)
        estimate = spec * self.mask(spec.abs())  # the mask is real: the mixture's phase stays
        return self.stft.inverse(estimate, mixture.shape[-1])

    def mask(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Estimate a soft mask in [0, 1] for a magnitude spectrogram `(B, C, F, T)`."""
        frames = magnitude.shape[-1]
        level = magnitude.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 1e-5  # (B, 1, 1, 1)
        x = magnitude[:, :, :-1]  # (B, C, F - 1, T), without the Nyquist bin
        x = nn.functional.pad(x, (0, -frames % 2**self.depth))  # T: a multiple of 2 ** depth
        x = torch.log1p(10 * x / level)
        mask = torch.sigmoid(self.logits(x))[..., :frames]  # (B, C, F - 1, T)
        mask = torch.cat([mask, mask[:, :, -1:]], dim=2)  # (B, C, F, T)
        return mask.float()  # bfloat16 would be too coarse for the product with the spectrogram

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mask before the sigmoid for log magnitudes `(B, C, F - 1, T)`."""
        full_band = self.full_band(x)  # (B, C, F - 1, T)
        ramp = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)
        frequency = ramp[:, None].expand(x.shape[0], 1, -1, x.shape[3])  # (B, 1, F - 1, T)
        inputs = torch.cat([self.input_norm(x), full_band, frequency], dim=1)
        x = inputs.contiguous(memory_format=torch.channels_last)  # (B, 2 * C + 1, F - 1, T)
        skips = []
        for layer in self.encoder:
            x = layer(x)  # (B, W, F / 2, T / 2), then (B, 2 * W, F / 4, T / 4) and so on
            skips.append(x)
        x = skips.pop()
        for layer in self.decoder:
            x = torch.cat([layer(x), skips.pop()], dim=1)  # up one level, with its skip connection
        return self.head(x) + full_band  # (B, C, F - 1, T)
