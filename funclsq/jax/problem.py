"""What a least-squares primitive is given, and how it is called; its rules are in ``primitive``."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jax.extend.core import Primitive

from funclsq.jax.rules import vary
from funclsq.methods._protocol import Options

__all__ = ["RESULTS", "Operands", "Problem", "S", "core_ndims", "solve_p"]

RESULTS = ("x", "s", "info", "deficient")

solve_p = Primitive("funclsq_lstsq")
solve_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a solve."""

    structure: Any
    options: Options
    full_rank: bool = False  # A is known to have full column rank
    damped: bool = False  # damp > 0 is known
    on_failure: str = "ignore"
    check_finite: bool = True
    compute_dtype: str | None = None
    how: str = "buffer_callback"
    residuals: bool = True  # somebody may read the residual norms
    primary: bool = False  # the solve that was asked for, not one that a derivative needs
    results: tuple[str, ...] = RESULTS

    @property
    def nonsingular(self) -> bool:
        """Whether G is known to be invertible before anything is computed."""
        return self.full_rank or self.damped


class Operands(NamedTuple):
    """What a solve depends on; absent ones are None."""

    params: tuple[Any, ...]
    aux: tuple[Any, ...]
    w: Any = None
    d2: Any = None
    c: Any = None
    g: Any = None
    gate: Any = None

    def flatten(self) -> tuple[list[Any], tuple[bool, ...]]:
        """Present operands in order, and which of the optional five are present."""
        optional = self[2:]
        has = tuple(t is not None for t in optional)
        return [*self.params, *self.aux, *(t for t in optional if t is not None)], has

    @classmethod
    def unflatten(cls, structure: Any, has: tuple[bool, ...], flat: Any) -> Operands:
        """Inverse of :meth:`flatten`."""
        a = len(structure.param_ndims)
        b = a + len(structure.aux_ndims)
        rest = iter(flat[b:])
        optional = (next(rest) if present else None for present in has)
        return cls(tuple(flat[:a]), tuple(flat[a:b]), *optional)


def S(problem: Problem, operands: Operands, *results: str) -> Any:
    """Apply the primitive; the results named (by default those of the problem), one bare."""
    if results:
        problem = dataclasses.replace(problem, results=results)
    flat, has = operands.flatten()
    out = solve_p.bind(*vary(flat), problem=problem, has=has)
    return out[0] if len(results) == 1 else tuple(out)


def core_ndims(structure: Any, has: tuple[bool, ...]) -> list[int]:
    """Dimensions of the operands present, without a batch."""
    optional = (d for d, present in zip((1, 1, 2, 2, 0), has) if present)
    return [*structure.param_ndims, *structure.aux_ndims, *optional]
