"""Oracle masks computed from the true target: reference points for the models, not upper bounds."""

from __future__ import annotations

import numpy as np
import torch

from mss_utils.config import Settings
from mss_utils.models.unet import STFT

ORACLES = ("irm", "mwf")


def oracle(name: str, mixture: np.ndarray, target: np.ndarray, settings: Settings) -> np.ndarray:
    """Filter the mixture with a mask made from the true target, using the STFT of model A.

    Parameters
    ----------
    name : str
        `irm`, the ideal ratio mask |T| / (|T| + |R|) with R the residual, or `mwf`, the
        multichannel Wiener filter (Stoeter et al., "The 2018 SiSEC", LVA/ICA 2018, section 3.2).
    mixture, target : ndarray, shape (channels, samples)
    settings : Settings

    Returns
    -------
    ndarray, shape (channels, samples)
    """
    stft = STFT(settings.n_fft, settings.hop)
    signals = (mixture, target, mixture - target)
    x, t, r = (stft(torch.from_numpy(np.ascontiguousarray(signal))[None]) for signal in signals)
    ratio_mask = t.abs() / (t.abs() + r.abs() + 1e-10)  # (1, channels, bins, frames)
    estimate = x * ratio_mask if name == "irm" else wiener(x, t, r)
    return stft.inverse(estimate, mixture.shape[-1])[0].numpy()


def wiener(
    mixture: torch.Tensor, target: torch.Tensor, residual: torch.Tensor, bins_at_once: int = 64
) -> torch.Tensor:
    """Apply the Wiener filter of the true target, all complex `(1, channels, bins, frames)`.

    Target and residual are Gaussian with a power v in every bin and frame and a spatial covariance
    R in every bin; the filter is v_T R_T (v_T R_T + v_R R_R)^-1. Source: N. Duong, E. Vincent,
    R. Gribonval, "Under-determined reverberant audio source separation using a full-rank spatial
    covariance model", IEEE TASLP 18(7), 2010.
    """
    floor = 1e-10 * torch.eye(mixture.shape[1], dtype=mixture.dtype)
    splits = (spec[0].split(bins_at_once, dim=1) for spec in (mixture, target, residual))
    blocks = []
    for block in zip(*splits, strict=True):  # blocks of bins, to limit the memory
        x, t, r = (
            part.permute(1, 2, 0)[..., None] for part in block
        )  # (bins, frames, channels, 1)
        t, r = _covariance(t), _covariance(r)  # (bins, frames, channels, channels)
        estimate = t @ torch.linalg.solve(t + r + floor, x)  # (bins, frames, channels, 1)
        blocks.append(estimate[..., 0].permute(2, 0, 1))  # (channels, bins, frames)
    return torch.cat(blocks, dim=1)[None]


def _covariance(spec: torch.Tensor, n_iterations: int = 2) -> torch.Tensor:
    """Fit v R, `(bins, frames, channels, channels)`, to complex `(bins, frames, channels, 1)`."""
    outer, n_channels = spec @ spec.mH, spec.shape[2]
    identity = torch.eye(n_channels, dtype=spec.dtype)
    spatial = identity.expand(len(spec), 1, n_channels, n_channels)  # R, one per bin
    for _ in range(n_iterations):
        whitened = torch.linalg.solve(spatial, outer)
        power = whitened.diagonal(dim1=-2, dim2=-1).sum(-1).real / n_channels  # (bins, frames)
        power = power.clamp(min=1e-12)[..., None, None]
        n_active = (power > 1e-12).sum(dim=1, keepdim=True).clamp(min=1)  # without digital silence
        spatial = (outer / power).sum(dim=1, keepdim=True) / n_active + 1e-5 * identity
    return power * spatial
