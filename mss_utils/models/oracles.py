"""Oracle masks: filters that are given the true target, as reference points for the models."""

from __future__ import annotations

import numpy as np
import torch

from mss_utils.config import Settings
from mss_utils.models.unet import STFT

ORACLES = ("irm", "mwf")


def oracle(name: str, mixture: np.ndarray, target: np.ndarray, settings: Settings) -> np.ndarray:
    """What a filter that knows the true target makes of the mixture, with the STFT of model A; all arrays `(channels, samples)`.

    `irm` is the ideal ratio mask |T| / (|T| + |R|) with R the residual; it keeps the mixture's phase, as A does. `mwf` is the
    multichannel Wiener filter, for one channel the mask |T|^2 / (|T|^2 + |R|^2). Both are reference points for A, no bounds
    for B. Source: F.-R. Stoeter et al., "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018, section 3.2.
    """
    stft = STFT(settings.n_fft, settings.hop)
    signals = [
        torch.from_numpy(np.ascontiguousarray(signal))[None]
        for signal in (mixture, target, mixture - target)
    ]
    mixed, wanted, rest = map(stft, signals)  # (1, channels, bins, frames)
    found = (
        mixed * (wanted.abs() / (wanted.abs() + rest.abs() + 1e-10))
        if name == "irm"
        else wiener(mixed, wanted, rest)
    )
    return stft.inverse(found, mixture.shape[-1])[0].numpy()


def wiener(
    mixed: torch.Tensor, wanted: torch.Tensor, rest: torch.Tensor, bins_at_once: int = 64
) -> torch.Tensor:
    """The mixture under the Wiener filter of the true target and residual, all complex `(1, channels, bins, frames)`.

    Target and residual are Gaussian with a power v of their own in every bin and frame and one spatial covariance R a bin; the
    filter is v_T R_T (v_T R_T + v_R R_R)^-1. Source: N. Duong, E. Vincent, R. Gribonval, "Under-determined reverberant audio
    source separation using a full-rank spatial covariance model", IEEE TASLP 18(7), 2010.
    """
    blocks = []
    for parts in zip(*(signal[0].split(bins_at_once, dim=1) for signal in (mixed, wanted, rest))):
        x, t, r = (
            part.permute(1, 2, 0)[..., None] for part in parts
        )  # (bins, frames, channels, 1)
        target, residual = _gaussian(t), _gaussian(r)
        floor = 1e-10 * torch.eye(len(mixed[0]), dtype=mixed.dtype)
        blocks.append(
            (target @ torch.linalg.solve(target + residual + floor, x))[..., 0].permute(2, 0, 1)
        )
    return torch.cat(blocks, dim=1)[None]


def _gaussian(vectors: torch.Tensor, n_iterations: int = 2) -> torch.Tensor:
    """v R of every bin and frame, `(bins, frames, channels, channels)`, fitted to complex `(bins, frames, channels, 1)`."""
    outer, n_channels = vectors @ vectors.mH, vectors.shape[2]
    unit = torch.eye(n_channels, dtype=vectors.dtype)
    spatial = unit.expand(len(vectors), 1, n_channels, n_channels)
    for _ in range(n_iterations):
        power = (
            torch.linalg.solve(spatial, outer).diagonal(dim1=-2, dim2=-1).sum(-1).real / n_channels
        )  # (bins, frames)
        power = power.clamp(min=1e-12)[..., None, None]
        sounding = (
            (power > 1e-12).sum(dim=1, keepdim=True).clamp(min=1)
        )  # frames of digital silence say nothing of the place
        spatial = (outer / power).sum(dim=1, keepdim=True) / sounding + 1e-5 * unit
    return power * spatial
