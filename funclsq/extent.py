"""How large the entries of a tensor are, found in one pass that also finds NaN and Inf."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["extent", "finite", "largest"]


def extent(t: Tensor) -> tuple[float, float]:
    """Smallest and largest entry (real or imaginary part); NaN if any is NaN, 0 if there is none.

    Cost: one pass without temporaries; waits for the device.
    """
    if t.numel() == 0:
        return 0.0, 0.0
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    low, high = torch.aminmax(t)
    return low.item(), high.item()


def largest(t: Tensor) -> float:
    """Largest |entry| (real or imaginary part); NaN if any is NaN."""
    low, high = extent(t)
    return high if high >= -low else -low


def finite(t: Tensor | None) -> bool:
    """Whether no entry is NaN or Inf."""
    return t is None or math.isfinite(largest(t))
