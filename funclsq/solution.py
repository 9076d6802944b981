"""What a solve returns: the solution, why it stopped, and what was learnt about A on the way."""

from __future__ import annotations

import dataclasses
import enum

import torch
from torch import Tensor

__all__ = ["METHODS", "Method", "Solution", "Status"]


class Status(enum.IntEnum):
    """Why a solve stopped. ``Status.advice`` says it in words, with what to do."""

    START_SOLVES = 0
    RESIDUAL_SMALL = 1
    NORMAL_RESIDUAL_SMALL = 2
    CONDITION_LIMIT = 3
    RESIDUAL_AT_EPS = 4
    NORMAL_RESIDUAL_AT_EPS = 5
    MAXITER = 6
    DIRECT = 7
    STAGNATED = 8
    INACCURATE = 9
    NONFINITE = 10
    DIVERGED = 11
    INTERRUPTED = 12
    SKIPPED = 13

    @property
    def converged(self) -> bool:
        """Whether x meets the tolerance that was asked for."""
        return self in _CONVERGED

    @property
    def advice(self) -> str:
        """What happened, in words, and what to do about it."""
        return _ADVICE[self]


_CONVERGED = frozenset(
    {
        Status.START_SOLVES,
        Status.RESIDUAL_SMALL,
        Status.NORMAL_RESIDUAL_SMALL,
        Status.RESIDUAL_AT_EPS,
        Status.NORMAL_RESIDUAL_AT_EPS,
        Status.DIRECT,
        Status.SKIPPED,
    }
)

_ADVICE = {
    Status.START_SOLVES: "the starting point already solves the problem; no iteration was made",
    Status.RESIDUAL_SMALL: "A x = b holds to the tolerances atol and btol",
    Status.NORMAL_RESIDUAL_SMALL: "x solves the least-squares problem to the tolerance atol",
    Status.CONDITION_LIMIT: (
        "the estimate of cond(A) passed conlim: raise conlim, add damp, or use a direct solver"
    ),
    Status.RESIDUAL_AT_EPS: "A x = b holds to the rounding of this dtype",
    Status.NORMAL_RESIDUAL_AT_EPS: "x solves the least-squares problem to rounding",
    Status.MAXITER: (
        "the iteration limit was reached: raise maxiter, loosen atol and btol, add damp, or use "
        "solver='cholesky'"
    ),
    Status.DIRECT: "solved by a factorisation",
    Status.STAGNATED: (
        "the residual of the normal equations stopped falling above the tolerance: loosen atol, "
        "use float64, or use solver='cholesky' or 'svd'"
    ),
    Status.INACCURATE: (
        "the factorisation could not be refined to the accuracy of this dtype; A is close to "
        "rank deficient: add damp, use float64, or use solver='svd'"
    ),
    Status.NONFINITE: "overflow or an invalid operation made the result non-finite: rescale A or b",
    Status.DIVERGED: "the iteration grew without bound: use a smaller step",
    Status.INTERRUPTED: (
        "the callback ended the solve by StopIteration; x is what had been reached: let it run on "
        "if that is not enough"
    ),
    Status.SKIPPED: "no solve was needed",
}


class Method(enum.IntEnum):
    """The solver that produced a solution."""

    lsmr = 0
    lsqr = 1
    cgls = 2
    cholesky = 3
    qr = 4
    svd = 5
    gradient_descent = 6
    foreign = 7


class Choice(enum.IntEnum):
    """Why ``solver="auto"`` took its method."""

    asked = 0
    matrix_free = 1
    small = 2
    device = 3
    trial = 4
    factor = 5
    full = 6
    null_space = 7
    rank = 8
    full_factor = 9

    @property
    def words(self) -> str:
        """The reason in words."""
        return _WHY[self]

    def on(self, method: int) -> int:
        """Write a method and why it was taken as one number."""
        return int(method) + METHODS * int(self)


METHODS = 16  # above every Method: a choice is written as method + METHODS * why
_WHY = {
    Choice.asked: "it was asked for",
    Choice.matrix_free: "A has no entries at hand, and this method needs products only",
    Choice.small: "A is dense, or small enough to be written out",
    Choice.device: "A is sparse on a device; solver='cholesky' factors it there if asked to",
    Choice.trial: "it converged before it had cost as much as a factorisation",
    Choice.factor: "an iterative method would cost more than a factorisation",
    Choice.full: "a factor would be dense and too large",
    Choice.null_space: "A has too many dependent columns for a sparse factorisation",
    Choice.full_factor: (
        "an iterative method would cost more than a factorisation, a dense one here: the sparse "
        "factor would be nearly full"
    ),
    Choice.rank: "a rank was given, which needs an orthogonal factorisation",
}


@dataclasses.dataclass(frozen=True)
class Solution:
    """A solution of min ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2 and how it was reached.

    A pytree in torch and (once ``funclsq.jax`` is imported) in JAX: the arrays are leaves, so a
    Solution passes through ``vmap`` and ``jit``. Differentiable in ``x`` only.

    Parameters
    ----------
    x : array, shape (..., n) or (..., n, k)
        The minimiser nearest to x0.
    status : int array, shape (...) or (..., k)
        A :class:`Status` per member and column.
    iterations : int array, shape as ``status``
        Iterations made (refinement steps for a direct solver).
    residual_norm : real array, shape as ``status``
        ``||W^(1/2)(b - A x)||``.
    normal_residual_norm : real array, shape as ``status``
        ``||A^H W (b - A x) - damp^2 (x - x0)||``, which is zero at the solution.
    rank : int array, shape as ``status``
        Rank of ``[W^(1/2) A; damp I]`` as the solver found it; -1 where it is not known.
    cond : real array, shape as ``status``
        2-norm condition number (on the rank) or its estimate; NaN where it is not known.
    method : int array, shape as ``status``
        What produced x and why it was chosen, as a number; ``solver`` and ``why`` read it.
    reason : str
        The solver that was asked for.
    """

    x: Tensor
    status: Tensor
    iterations: Tensor
    residual_norm: Tensor
    normal_residual_norm: Tensor
    rank: Tensor
    cond: Tensor
    method: Tensor
    reason: str = ""

    @property
    def converged(self) -> Tensor:
        """True per member and column where x meets the tolerance."""
        good = self.status == -1
        for code in _CONVERGED:
            good = good | (self.status == int(code))
        return good

    @property
    def solver(self) -> str:
        """Name of the solver that was used (the first member's, in a batch)."""
        codes = self.method.reshape(-1)
        return Method(int(codes[0]) % METHODS).name if len(codes) else ""

    @property
    def why(self) -> str:
        """Why that solver was used (for the first member, in a batch)."""
        codes = self.method.reshape(-1)
        return Choice(int(codes[0]) // METHODS).words if len(codes) else ""

    @property
    def message(self) -> str:
        """The status of the worst member, in words. Not available inside a transform."""
        return describe(self.status, self.iterations, self.residual_norm, self.normal_residual_norm)


def describe(status, iterations, residual_norm, normal_residual_norm) -> str:
    """Say in words how a batch of solves ended: the worst status, and how many share it."""
    codes = [int(s) for s in status.reshape(-1)]
    if not codes:
        return "nothing to solve"
    failed = [i for i, s in enumerate(codes) if not Status(s).converged]
    worst = failed[0] if failed else 0
    code = Status(codes[worst])
    text = f"{code.name}: {code.advice}"
    if len(codes) > 1 and not failed:
        text = f"all {len(codes)} solves converged; member 0: {text}"
    elif len(codes) > 1:
        text = f"{len(failed)} of {len(codes)} solves failed; member {worst}: {text}"
    text = f"{text} (iterations {int(iterations.reshape(-1)[worst])}"
    for name, norms in (("||r||", residual_norm), ("||A^H r||", normal_residual_norm)):
        norm = float(norms.reshape(-1)[worst])
        if norm == norm:  # a derivative's solve takes no norms
            text += f", {name} = {norm:.3e}"
    return text + ")"


LEAVES = tuple(f.name for f in dataclasses.fields(Solution) if f.name != "reason")


def _flatten(s: Solution):
    return [getattr(s, name) for name in LEAVES], s.reason


def _unflatten(leaves, reason):
    return Solution(**dict(zip(LEAVES, leaves)), reason=reason)


torch.utils._pytree.register_pytree_node(
    Solution, _flatten, _unflatten, serialized_type_name="funclsq.Solution"
)
