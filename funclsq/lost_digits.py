"""Whether a derivative of a damped solve has lost digits to a null space, and the warning of it.

The derivatives of a damped problem come from z = (A^H W A + D^2)^-1 g and y = A z. The part of g
in the null space of A (where A is wide, or of deficient rank) makes z as large as |g| / damp^2,
while y has no part of it: the rounding of that part, eps |A| |z|, is what y, r z^H and the sum
over z^H x are left with. Beside |y|, or |g| / |A| where y is smaller than that, it says how many
digits are lost. (Without damping the rule projects instead of dividing, and loses none.)
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from funclsq.errors import AccuracyWarning
from funclsq.norms import column_norms

__all__ = ["column_size", "warn_of_lost_digits"]


_PART = 0.01  # of g, which D^2 z is at least where a null space shows


def column_size(op: Any, w: Tensor | None) -> Tensor:
    """Norm of the longest column of W^(1/2) A, (1,) or (B, 1); 0 where it is not known."""
    norms = (op if w is None else op.scaled(row=w.sqrt())).column_norms()
    if norms is None or norms.shape[-1] == 0:
        return torch.zeros(1, dtype=torch.float64, device=op.device)
    return norms.amax(-1, keepdim=True).double()


def warn_of_lost_digits(
    size: Tensor, w: Tensor | None, d2: Tensor, g: Tensor, z: Tensor, az: Tensor
) -> None:
    """Warn where more than half of the digits of A z are lost; ``size`` as of `column_size`.

    Where D^2 z is but a small part of g = A^H W A z + D^2 z it is not damping that makes z large.
    """
    y = az if w is None else w.sqrt().unsqueeze(-1) * az
    given = column_norms(g).double()
    least = column_norms(y).double() + given / size
    eps = torch.finfo(g.dtype).eps
    share = (eps * size * (column_norms(z).double() / least)).nan_to_num(0.0, posinf=0.0)
    share = torch.where(column_norms(d2.unsqueeze(-1) * z) > _PART * given, share, 0.0)
    worst = float(share.amax()) if share.numel() else 0.0
    if worst > eps**0.5:
        warnings.warn(
            f"lstsq: derivatives are right to about {worst:.0e} only: damp is small, and A has a "
            "null space (it is wide, or of deficient rank) in which they are divided by damp^2. "
            "Pass damp=0, whose derivatives are not, or a larger damp"
            f"{', or compute_dtype=torch.float64' if g.dtype == torch.float32 else ''}.",
            AccuracyWarning,
            stacklevel=2,
        )
