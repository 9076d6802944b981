"""Factor once, solve often: a matrix kept ready, still differentiable in its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq import derivatives, raw
from funclsq.beneath import differentiated
from funclsq.checks import dense_tensor
from funclsq.inputs import Problem, canonical
from funclsq.settings import settings

__all__ = ["Factorization", "covariance", "factorize"]

_COLUMNS = 256  # columns of the identity that covariance solves for at a time


@dataclasses.dataclass(frozen=True)
class Factorization:
    """A matrix made ready for many right-hand sides; made by :func:`factorize`.

    Differentiable in the right-hand sides and in the values, damp and weights that it was made
    from. The factor is shared by every solve and derivative, and kept as long as this object.
    """

    _problem: Problem
    _pin: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_ready, (self._problem,)

    def __repr__(self) -> str:
        p = self._problem
        lead = f", batch={p.lead}" if p.lead else ""
        return (
            f"Factorization(shape={self.shape}, dtype={p.dtype}, solver={p.plan.options.solver!r}"
            f"{lead})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of A."""
        return self._problem.plan.structure.shape

    def _apply(
        self, v: Tensor, rows: int, name: str, adjoint: bool, weighted: bool = False
    ) -> tuple[Tensor, ...]:
        p = self._problem
        v = dense_tensor(v, "the argument", name)
        vector = v.ndim == 1
        block = v.unsqueeze(-1) if vector else v
        if v.ndim == 0 or block.shape[-2] != rows:
            raise ValueError(
                f"{name}: needs {rows} rows for A {self.shape}; got shape {tuple(v.shape)}."
            )
        if v.dtype != p.dtype:
            raise TypeError(f"{name}: needs dtype {p.dtype}; got {v.dtype}.")
        flat = block = block.to(p.b.dtype)
        if p.lead:
            given = block.shape[:-2]
            if len(given) > len(p.lead) or any(
                a not in (1, b) for a, b in zip(given[::-1], p.lead[::-1])
            ):
                raise ValueError(
                    f"{name}: needs leading dimensions {tuple(p.lead)} as A has, or none; got "
                    f"shape {tuple(v.shape)}."
                )
            flat = block.expand(*p.lead, *block.shape[-2:])
        if flat.ndim > 2:
            flat = flat.flatten(0, -3)
        c, g = (None, flat) if adjoint else (flat, None)
        followed = differentiated(block, p.w, p.d2, *p.params)
        plan = p.plan.with_derivatives() if followed else p.plan
        x, s, _ = derivatives.solve(plan, p.w, p.d2, c, g, None, p.params, primary=not adjoint)
        if weighted and p.w is not None:
            s = p.w.unsqueeze(-1) * s
        lead = p.lead or block.shape[:-2]

        def back(t: Tensor) -> Tensor:
            t = t.reshape(*lead, *t.shape[-2:]).to(p.dtype)
            return t.squeeze(-1) if vector else t

        return back(x), back(s)

    def solve(self, b: Tensor) -> Tensor:
        """argmin ||W^(1/2)(A x - b)||^2 + damp^2 ||x||^2 for b (m,) or (..., m, k)."""
        return self._apply(b, self.shape[0], "Factorization.solve", adjoint=False)[0]

    def adjoint(self, g: Tensor) -> Tensor:
        """Apply the adjoint of :meth:`solve` to g (n,) or (..., n, k): W A G^+ g, (..., m, k).

        For damp = 0 and no weights this is the minimum-norm solution of A^H y = g.
        """
        name = "Factorization.adjoint"
        return self._apply(g, self.shape[1], name, adjoint=True, weighted=True)[1]

    def solve_normal(self, g: Tensor) -> Tensor:
        """G^+ g for g (n,) or (..., n, k), with G = A^H W A + damp^2."""
        return self._apply(g, self.shape[1], "Factorization.solve_normal", adjoint=True)[0]


def factorize(
    A: Any,
    *,
    damp: float | Tensor = 0.0,
    weights: Tensor | None = None,
    solver: str | Callable[..., Any] = "auto",
    rank: str | int = "auto",
    rcond: float | None = None,
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Factorization:
    """Make A ready for many solves of min ||W^(1/2)(A x - b)||^2 + damp^2 ||x||^2.

    Parameters
    ----------
    A, damp, weights, solver, rank, rcond, check_finite, compute_dtype, **options
        As in :func:`funclsq.lstsq`. ``solver="auto"`` makes no trial of ``lsmr``, since what is
        kept should be a factor: of a sparse matrix on the CPU it is that of ``"cholesky"``, or
        of ``"qr"`` where A is small enough to be written out or a lower ``rank`` is given.

    Returns
    -------
    Factorization
        With ``solve(b)``, ``adjoint(g)`` and ``solve_normal(g)``.

    Raises
    ------
    TypeError, ValueError
        As :func:`funclsq.lstsq`.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    >>> f = fl.factorize(A)
    >>> f.solve(torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64)).round(decimals=9)
    tensor([1., 1.], dtype=torch.float64)
    """
    opts = settings("factorize", solver, rank=rank, rcond=rcond, **options)
    b = _blank(A)
    p = canonical("factorize", A, b, damp, weights, None, opts, "warn", check_finite, compute_dtype)
    sparse = p.plan.structure.kind == "sparse" and b.device.type == "cpu"
    least = min(p.plan.structure.shape)
    lower = isinstance(rank, int) and rank < least  # which no Cholesky factor can bring about
    if solver == "auto" and sparse and least > 128 and not lower:
        opts = opts._replace(solver="cholesky")
        p = canonical(
            "factorize", A, b, damp, weights, None, opts, "warn", check_finite, compute_dtype
        )
    return _made_ready(p)


def _made_ready(p: Problem) -> Factorization:
    """Prepare the matrix of a problem: at first, and where a copy arrives."""
    return Factorization(p, raw.pin(p.plan, p.params, p.w, p.d2))


def _blank(A: Any) -> Tensor:
    """A right-hand side without columns: it carries shape, dtype and device to the checks."""
    shape: tuple[int, ...] = getattr(A, "shape", ())
    if len(shape) < 2:
        return torch.empty((0, 0))  # the checks say what A should be
    if isinstance(A, Tensor):
        like = A.detach()
    elif hasattr(A, "values") and isinstance(A.values, Tensor):
        like = A.values.detach()
    elif getattr(A, "params", ()):
        floating = (p for p in A.params if p.is_floating_point() or p.is_complex())
        like = next(floating, A.params[0]).detach()
    elif isinstance(getattr(A, "dtype", None), np.dtype):  # NumPy, scipy.sparse
        like = torch.from_numpy(np.empty(0, dtype=A.dtype))
    else:
        like = torch.empty(0, dtype=torch.float64)
    dtype = like.dtype if like.dtype.is_floating_point or like.dtype.is_complex else torch.float64
    return torch.empty((shape[-2], 0), dtype=dtype, device=like.device)


def covariance(f: Factorization, *, diag: bool = False) -> Tensor:
    """(A^H W A + damp^2)^-1 of a factorised A of full column rank; its diagonal with ``diag``.

    For weights 1 / variance this is the covariance of the estimated x; for unweighted data
    multiply it by the residual variance ||b - A x||^2 / (m - n).

    Parameters
    ----------
    f : Factorization
        Of a matrix of full column rank (or damped).
    diag : bool
        Return the n variances only, without ever holding the (n, n) matrix.

    Returns
    -------
    Tensor, shape (..., n, n) or (..., n), 1 / units of A^2
        Differentiable in what f was made from. Cost: n solves with the factor, in blocks.

    Raises
    ------
    ValueError
        If A is rank deficient: then no covariance exists.
    """
    p = f._problem
    n = f.shape[1]
    deficient = raw.deficiency(f._pin)
    if deficient:
        raise ValueError(
            "covariance: needs full column rank, and A is (or may be) rank deficient: its "
            "null-space components have no variance. Remove columns, or add damp > 0; if you "
            "know that the rank is full, pass rank='full' to factorize."
        )
    parts = []
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        block = torch.zeros((n, stop - start), dtype=p.dtype, device=p.b.device)
        block[torch.arange(start, stop), torch.arange(stop - start)] = 1
        columns = f.solve_normal(block)
        if diag:
            columns = columns[..., start:stop, :].diagonal(dim1=-2, dim2=-1).real
        parts.append(columns)
    if not parts:
        none = p.b.new_zeros((*p.lead, 0, 0), dtype=p.dtype)
        return none.abs().sum(-1) if diag else none
    return torch.cat(parts, -1)
