"""The level of an input, which A and the Demucs divide by: a module, so that it can be watched, and held constant."""

from __future__ import annotations

import torch
from torch import nn


class Level(nn.Module):
    """Root mean square of every example of `(batch, ...)`, with a little added for silence: `(batch, 1, ...)`. No weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, ...)` -> `(batch, 1, ...)`."""
        return x.square().mean(dim=tuple(range(1, x.ndim)), keepdim=True).sqrt() + 1e-5
