"""The public functions: check -> operator -> solve -> derivative rule -> Solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq import derivatives, matrix
from funclsq.inputs import Problem, canonical
from funclsq.precision import narrowed
from funclsq.settings import settings
from funclsq.solution import Solution

__all__ = ["lstsq", "solve"]


def lstsq(
    A: Any,
    b: Tensor,
    *,
    damp: float | Tensor = 0.0,
    weights: Tensor | None = None,
    x0: Tensor | None = None,
    solver: str | Callable[..., Any] = "auto",
    rank: str | int = "auto",
    rcond: float | None = None,
    on_failure: str = "warn",
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    r"""argmin_x ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2, of all minimisers the nearest x0.

    Returns the minimiser x as a tensor; :func:`solve` returns how it was reached as well.

    Parameters
    ----------
    A : Tensor, NumPy array, scipy.sparse matrix, Sparse or LinearOperator, shape (..., m, n)
        Any shape and rank; dense, or sparse in any torch layout; real or complex.
    b : Tensor, shape (m,) or (..., m, k)
        Right-hand side, a vector if and only if it is 1-D. Same dtype and device as A.
    damp : float or real Tensor, scalar or (n,), units of A
        Tikhonov damping; a tensor is differentiated.
    weights : real Tensor, shape (m,) or (m, k), optional
        Row weights W >= 0; 0 drops a row (for one column, if given per column).
    x0 : Tensor, shape as x, optional
        Where x is pulled by damp, and which minimiser is chosen where several are; 0 by default.
    solver : str or callable
        ``"auto"``, ``"lsmr"``, ``"lsqr"``, ``"cgls"``, ``"cholesky"``, ``"qr"``, ``"svd"``,
        ``"gradient_descent"``, a function of :mod:`funclsq.solvers` (with settings:
        ``partial(lsmr, atol=1e-8)``), or any ``solver(A, b) -> x``, with ``adjoint_solver=`` for
        problems with A^H.
    rank : {"auto", "full"} or int
        What is known of the rank of A. ``"full"`` saves the derivative terms that only a
        rank-deficient A needs. An int is the number of singular values that ``"qr"`` and
        ``"svd"`` keep (``"auto"`` takes ``"qr"``); the other methods find the rank themselves,
        and ``"cholesky"`` warns if it is another one.
    rcond : float, optional
        Tolerance of rank decisions; by default max(m, n) eps.
    on_failure : {"warn", "raise", "ignore"}
        What happens when a solve does not meet its tolerance.
    check_finite : bool
        Whether NaN or Inf in the input raises.
    compute_dtype : {None, torch.float64}
        ``torch.float64`` solves float32 (complex64) problems, and their derivatives, in double
        precision and rounds the results; x and gradients keep the dtype of the data. A
        ``LinearOperator`` is given params and vectors of double precision.
    **options
        ``atol``, ``btol``, ``conlim``, ``maxiter``, ``scale``, ``backend``, ``preconditioner``,
        ``adjoint_solver``, ``callback``, ``progress``: settings of the solver.

    Returns
    -------
    x : Tensor, shape (..., n) or (..., n, k), units of b / units of A

    Raises
    ------
    TypeError
        If a dtype is not floating point or dtypes are mixed.
    ValueError
        If shapes or devices disagree, or a value is negative or not finite where it may not be.
    ConvergenceError
        With ``on_failure="raise"``, if the solve did not converge.

    Warns
    -----
    ConvergenceWarning
        If the solve did not converge.

    Notes
    -----
    Differentiable in A (its stored entries, or the params of a LinearOperator), b, damp,
    weights and x0, in forward and reverse mode, to any order, and under ``torch.func.vmap``;
    the rank of A is taken to be locally constant. A gradient costs one more solve with G (two
    triangular solves where a factor is kept), two where A may be rank deficient.

    References
    ----------
    G. H. Golub and V. Pereyra, SIAM J. Numer. Anal. 10 (1973) 413-432, doi:10.1137/0710036.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    >>> fl.lstsq(A, b).round(decimals=9)
    tensor([1., 2.], dtype=torch.float64)
    """
    opts = settings("lstsq", solver, rank=rank, rcond=rcond, **options)
    p = canonical("lstsq", A, b, damp, weights, x0, opts, on_failure, check_finite, compute_dtype)
    x, _ = _solve(p)
    return p.restore(x)


def solve(
    A: Any,
    b: Tensor,
    *,
    damp: float | Tensor = 0.0,
    weights: Tensor | None = None,
    x0: Tensor | None = None,
    solver: str | Callable[..., Any] = "auto",
    rank: str | int = "auto",
    rcond: float | None = None,
    on_failure: str = "warn",
    check_finite: bool = True,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Solution:
    """Solve as :func:`lstsq`, and return how: status, iterations, residuals, rank, condition.

    Parameters, errors and derivatives are those of :func:`lstsq`; ``Solution.x`` is what
    ``lstsq`` returns, and the only differentiable field.

    Returns
    -------
    Solution
        One entry of status, iterations, residual_norm, normal_residual_norm, rank and cond per
        batch member and column.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    >>> sol = fl.solve(A, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> int(sol.rank), bool(sol.converged)
    (1, True)
    """
    opts = settings("solve", solver, rank=rank, rcond=rcond, **options)
    p = canonical("solve", A, b, damp, weights, x0, opts, on_failure, check_finite, compute_dtype)
    x, info = _solve(p)
    return solution(p.restore(x), p.restore_info(info), opts)


def _solve(p: Problem) -> tuple[Tensor, Tensor]:
    c = p.b
    if p.x0 is not None:
        c = c - matrix.matmul(p.plan.structure, p.params, p.x0)
    x, _, info = derivatives.solve(p.plan, p.w, p.d2, c, None, None, p.params, primary=True)
    return narrowed(x if p.x0 is None else p.x0 + x, info, p.dtype, p.plan)


def solution(x: Tensor, info: Tensor, options: Any) -> Solution:
    """Unpack an info table (..., 8) beside its solution."""
    table = info.detach()
    status, iterations, residual, normal, rank, cond, _, method = table.unbind(-1)
    integer = torch.int64
    return Solution(
        x,
        status.to(integer),
        iterations.to(integer),
        residual,
        normal,
        rank.to(integer),
        cond,
        method.to(integer),
        reason=f"solver={options.solver!r}",
    )
