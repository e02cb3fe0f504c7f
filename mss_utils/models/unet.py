"""Model A: a 2-D U-Net that estimates a soft mask over the magnitude spectrogram and keeps the mixture's phase.

After Jansson et al., "Singing voice separation with deep U-Net convolutional networks" (ISMIR 2017), with a second path
whose first convolution is as tall as the spectrum. Taught in notebook 02.
"""

from __future__ import annotations

import torch
from torch import nn

from mss_utils.models.level import Level


class STFT(nn.Module):
    """Short-time Fourier transform with a Hann window, and its inverse by overlap-add."""

    def __init__(self, n_fft: int, hop: int):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, samples)` -> complex `(batch, channels, bins, frames)`; frames are centred, edges zero-padded."""
        flat = audio.flatten(0, 1)  # (batch * channels, samples)
        spec = torch.stft(
            flat, self.n_fft, self.hop, window=self.window, pad_mode="constant", return_complex=True
        )
        return spec.unflatten(0, audio.shape[:2])

    def inverse(self, spec: torch.Tensor, samples: int) -> torch.Tensor:
        """Complex `(batch, channels, bins, frames)` -> `(batch, channels, samples)`."""
        audio = torch.istft(
            spec.flatten(0, 1), self.n_fft, self.hop, window=self.window, length=samples
        )
        return audio.unflatten(0, spec.shape[:2])


class Down(nn.Sequential):
    """Halves bins and frames: strided 4x4 convolution, normalisation, leaky ReLU."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.LeakyReLU(0.2, inplace=True),
        )


class Up(nn.Sequential):
    """Doubles bins and frames: transposed 4x4 convolution, normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(
            nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )


class TallPath(nn.Module):
    """Sees all bins of a frame at once: a convolution as tall as the spectrum, four dilated ones over time, and back.

    A U-Net's kernels know neither where in the spectrum they are nor the overtones of a note, which lie hundreds of bins
    apart. Bins are taken as channels, which is what a kernel of full height comes to, and many times as fast. Every bin is
    normalised on its own. Dilations of 1, 2, 4, 8 frames after van den Oord et al., "WaveNet" (2016), section 2.1.
    """

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(rows)
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
        """`(batch, channels, bins, frames)` -> the same shape."""
        y = self.norm(x.flatten(1, 2)[:, :, None])  # (batch, channels * bins, 1, frames)
        y = self.down(y)  # (batch, width, 1, frames)
        for layer in self.over_time:
            y = y + layer(y)
        return self.up(y).reshape(x.shape)


class UNet(nn.Module):
    """Mixture waveform -> STFT -> log magnitude -> U-Net -> mask in [0, 1] -> masked STFT -> target waveform.

    2-D convolutions only. What the tall path finds is one more picture for the U-Net, and is added to what it says of the
    mask. The highest bin (Nyquist) shares the mask of the bin below it, so that the number of bins is a power of two; frames
    are padded to a multiple of `2 ** depth`.
    """

    def __init__(
        self, channels: int, width: int, depth: int, n_fft: int, hop: int, tall_width: int
    ):
        super().__init__()
        self.stft, self.depth, self.level = STFT(n_fft, hop), depth, Level()
        self.tall = TallPath(channels * n_fft // 2, tall_width)
        widths = [2 * channels + 1, *(width * 2**level for level in range(depth))]
        self.input_norm = nn.BatchNorm2d(channels)
        self.encoder = nn.ModuleList(Down(a, b) for a, b in zip(widths, widths[1:]))
        # Full resolution is where the time goes: the last layer up makes the mask itself, without further channels.
        outs = widths[-2:0:-1]
        self.decoder = nn.ModuleList(
            Up(a, b) for a, b in zip([widths[-1], *(2 * c for c in outs)], outs)
        )
        self.head = nn.ConvTranspose2d(2 * width, channels, 4, stride=2, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, mixture: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, samples)` -> target estimate of the same shape, for any number of samples."""
        spec = self.stft(mixture)  # (batch, channels, bins, frames)
        return self.stft.inverse(spec * self.mask(spec.abs()), mixture.shape[-1])

    def mask(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Soft mask in [0, 1] for a magnitude spectrogram `(batch, channels, bins, frames)`."""
        frames = magnitude.shape[-1]
        padding = -frames % 2**self.depth
        x = nn.functional.pad(magnitude[:, :, :-1], (0, padding))  # without the Nyquist bin
        mask = torch.sigmoid(self._logits(torch.log1p(10 * x / self.level(magnitude))))[
            ..., :frames
        ]
        return torch.cat(
            [mask, mask[:, :, -1:]], dim=2
        ).float()  # bfloat16 would be too coarse for what follows

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """What the sigmoid makes a mask of, from log magnitudes `(batch, channels, bins, frames)`; frames divide by 2 ** depth."""
        tall = self.tall(x)
        pictures = torch.cat([self.input_norm(x), tall, _frequency(x)], dim=1)
        return self._unet(pictures.contiguous(memory_format=torch.channels_last)) + tall

    def _unet(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.encoder:
            x = layer(x)
            skips.append(x)  # (batch, channels of the level, bins / 2, frames / 2) and so on
        x = skips.pop()
        for layer in self.decoder:
            x = torch.cat([layer(x), skips.pop()], dim=1)
        return self.head(x)


def _frequency(x: torch.Tensor) -> torch.Tensor:
    """A picture `(batch, 1, bins, frames)` that rises from -1 to 1 over the bins: a kernel cannot tell low from high without it."""
    ramp = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)
    return ramp[None, None, :, None].expand(x.shape[0], 1, -1, x.shape[3])
