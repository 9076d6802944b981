"""The matrix that a preconditioner is made from: checked, in double precision, columns scaled.

With S the diagonal of reciprocal column norms of [W^(1/2) A; D], and B = W^(1/2) A S, d = D S,

    A^H W A + D^2 = S^-1 (B^H B + d^2) S^-1,

where B^H B + d^2 has a diagonal of ones. So a threshold on its entries does not depend on units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funclsq.beneath import beneath, outside_transforms
from funclsq.extent import finite
from funclsq.inputs import canonical, matrix
from funclsq.matrix_free import LinearOperator
from funclsq.operators import DenseOp, SparseOp
from funclsq.range import exponent, extreme
from funclsq.settings import settings
from funclsq.sparse import Sparse

__all__ = ["Intake", "take_in", "untracked"]


@contextlib.contextmanager
def untracked() -> Iterator[None]:
    """Record nothing, in any mode of torch: what is kept must not belong to a transform."""
    no_forward_mode = torch.autograd.forward_ad._set_fwd_grad_enabled(False)
    with outside_transforms(), torch.no_grad(), no_forward_mode:
        yield


class Intake(NamedTuple):
    """A ready to be preconditioned.

    ``B`` is the scaled operator, ``d2`` the squares of the scaled damping, 1 for a zero column;
    ``scale`` is the diagonal of S, all in double precision. ``dtype`` and ``shape`` are A's.
    """

    B: DenseOp | SparseOp
    d2: Tensor
    scale: Tensor
    dtype: torch.dtype
    shape: tuple[int, int]


def take_in(name: str, A: Any, damp: Any, weights: Any) -> Intake:
    """Check A, damp and weights as a solver does, drop their gradients, and scale.

    Raises
    ------
    TypeError, ValueError
        As :func:`funclsq.lstsq`; for a LinearOperator, a batch, and anything not on the CPU.
    """
    if isinstance(A, LinearOperator):
        raise TypeError(
            f"{name}: needs the entries of A, and a LinearOperator has none. Make the "
            "preconditioner from a matrix near A, or pass preconditioner=None."
        )
    A, damp, weights = (_plain(name, t) for t in (A, damp, weights))
    structure, (entries,), lead, _ = matrix(A, name)
    if entries.device.type != "cpu":
        raise ValueError(
            f"{name}: A must be on the CPU; got {entries.device}. Preconditioners run there; "
            "move A and b with .cpu(), or pass preconditioner=None."
        )
    b = entries.new_empty((structure.shape[0], 0))
    p = canonical(name, A, b, damp, weights, None, settings(name, "lsmr"), "warn", True)
    if lead or p.lead or p.per_column:
        raise ValueError(
            f"{name}: A, damp and weights must be without batch dimensions; got A of shape "
            f"{(*lead, *structure.shape)} in a batch {(*p.lead,)}. Make one preconditioner from a "
            "typical member: it serves them all."
        )
    for what, t in (("A", entries), ("damp", p.d2), ("weights", p.w)):
        if t is not None and not finite(t):
            raise ValueError(f"{name}: {what} must be finite; got NaN or Inf. Repair {what}.")
    return _scaled(structure, entries, p.w, p.d2)


def _scaled(structure: Any, entries: Tensor, w: Tensor | None, d2: Tensor | None) -> Intake:
    double = torch.complex128 if entries.is_complex() else torch.float64
    op = structure.bind((entries.detach().resolve_conj().to(double),))
    if w is not None:
        op = op.scaled(row=w.to(torch.float64).sqrt())
    norms = op.column_norms()
    if d2 is None:
        d = torch.zeros_like(norms)
    else:
        d = d2.to(torch.float64).sqrt()
        norms = torch.hypot(norms, d)
    scale = torch.where(norms > 0, 1 / norms, 1.0).clamp_(max=torch.finfo(norms.dtype).max)
    B = op.scaled(col=scale)
    d2 = torch.where(norms > 0, (d * scale) ** 2, 1.0)
    e = exponent(norms, (-1,))
    if extreme(e, entries.real.dtype):
        scale = torch.ldexp(scale, e)
    return Intake(B, d2, scale, entries.dtype, structure.shape)


def _plain(name: str, t: Any) -> Any:
    """Strip what torch.func puts around a tensor; a tensor batched by vmap cannot be stripped."""
    if isinstance(t, Sparse):
        return Sparse(t.pattern, _plain(name, t.values))
    if not isinstance(t, Tensor):
        return t
    refusal = ValueError(
        f"{name}: cannot be made inside torch.vmap from values that it maps over. Make it "
        "outside, from a typical member: it serves them all."
    )
    return beneath(t, refusal).detach()
