"""What a Krylov method is given: A^H as an operator, blocks padded and of moderate size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funclsq.methods._verify import Answer

__all__ = ["Adjoint", "even_damping", "padded", "units", "worse"]


class Adjoint:
    """A^H as an operator."""

    def __init__(self, op: Any) -> None:
        self.op, self.batch = op, op.batch
        self.shape = (op.shape[1], op.shape[0])
        self.dtype, self.device = op.dtype, op.device
        self.mv, self.rmv = op.rmv, op.mv
        self.passes = getattr(op, "adjoint_passes", lambda: None)


def even_damping(damp: Tensor | None, norms: Tensor | None) -> Tensor | None:
    """The damping if columns can be scaled by it, or need not be, being one number."""
    if damp is None or norms is None:
        return damp if damp is not None and bool((damp == damp[..., :1]).all()) else None
    return damp if bool(torch.isfinite(norms / damp).all()) else None


def padded(c: Tensor, rows: int) -> Tensor:
    """Append the zero rows of [c; 0]."""
    missing = rows - c.shape[-2]
    if missing == 0:
        return c
    return torch.cat((c, c.new_zeros((*c.shape[:-2], missing, c.shape[-1]))), -2)


def units(*blocks: Tensor) -> Tensor:
    """Give each column a power of 2 about its largest entry, so that no norm overflows."""
    like = blocks[0]
    top = torch.zeros(
        (*like.shape[:-2], 1, like.shape[-1]), dtype=like.real.dtype, device=like.device
    )
    for block in blocks:
        if block.shape[-2]:
            top = torch.maximum(top, block.abs().amax(-2, keepdim=True))
    exponent = torch.frexp(top)[1].clamp(-1000, 1000)
    unit = torch.ldexp(torch.ones_like(top), exponent)
    return torch.where((top > 0) & top.isfinite() & (unit > 0), unit, torch.ones_like(top))


def worse(first: Answer, second: Answer) -> Answer:
    """Status of two solves in a row: the first failure counts, and the steps add up."""
    failed = first.status > 5
    second.status[failed] = first.status[failed]
    second.iterations = second.iterations + first.iterations
    return second
