"""CGLS: conjugate gradients on the normal equations, in the stable form, for all columns at once.

The iteration is :class:`funclsq.methods._extended_cg.ExtendedCg`, which also takes the part g of
the right-hand side that derivatives bring.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funclsq.methods._extended_cg import ExtendedCg
from funclsq.methods._krylov import PreparedKrylov
from funclsq.methods._protocol import Options
from funclsq.solution import Method

__all__ = ["prepare"]


def prepare(op: Any, damp: Tensor | None, options: Options, full_rank: bool) -> PreparedKrylov:
    """Make CGLS ready for min ||A x - b||^2 + ||D x||^2; arguments as of :func:`lsmr.prepare`."""
    return PreparedKrylov(ExtendedCg, Method.cgls, op, damp, options, full_rank)
