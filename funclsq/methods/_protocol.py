"""What every solver offers to the derivative rules: preparation from A, then solves.

A method prepares itself once from an operator B (weights folded in) and a diagonal damping D,
and then applies, for G = B^H B + D^2,

    solve(c, g) = G^+ (B^H c + g),

to as many columns as it is given. Both the solution (g absent) and its derivatives (c absent)
are such solves, so a factorisation made for one serves the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

__all__ = ["Options", "Prepared", "Raw"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a solve; ``None`` means the method's documented default."""

    solver: str | Callable[..., Any] = "auto"
    rank: str | int = "auto"
    rcond: float | None = None
    atol: float | None = None
    btol: float | None = None
    conlim: float | None = None
    maxiter: int | None = None
    scale: bool | str = "auto"
    backend: str | None = None
    preconditioner: Any = None
    adjoint_solver: Callable[..., Any] | None = None
    step: float | str | Callable[[int], float] | None = None
    momentum: float | str | None = None
    nesterov: bool | None = None
    batch_size: int | None = None
    seed: int | None = None
    callback: Callable[..., Any] | None = None
    progress: bool = False
    extra: tuple[tuple[str, Any], ...] = ()


class Raw(NamedTuple):
    """A solve's result: x (..., n, k); status and iterations (..., k).

    ``image`` is B x - c, (..., m, k), where the method has it; ``sharp`` says that it has digits
    which a difference would have lost.
    """

    x: Tensor
    status: Tensor
    iterations: Tensor
    image: Tensor | None = None
    sharp: bool = False


class Prepared(Protocol):
    """A method made ready for one operator."""

    method: int
    rank: Tensor | None
    cond: Tensor | None
    deficient: bool | Tensor
    nbytes: int

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (B^H c + g)."""
        ...
