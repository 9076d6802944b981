"""Linear regression: coefficients, intercept, and how well they are known."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq import derivatives
from funclsq.extended import refinement
from funclsq.full_precision import full_precision
from funclsq.inputs import Problem, canonical
from funclsq.lstsq import _solve as solve_problem
from funclsq.lstsq import solution
from funclsq.matrix import matmul
from funclsq.pattern import SparsityPattern
from funclsq.settings import settings
from funclsq.sparse import Sparse

__all__ = ["LinearRegression", "linear_regression"]

_REFINED = 1 << 22  # multiplications up to which a dense problem is refined


@dataclasses.dataclass(frozen=True)
class LinearRegression:
    """What :func:`linear_regression` found; a pytree, differentiable in every real field.

    The n parameters are the p coefficients and, if there is one, the intercept after them.

    Parameters
    ----------
    coefficients : Tensor, shape (p,) or (p, k)
        One per column of X.
    intercept : Tensor, shape () or (k,)
        Constant term; 0 without one.
    residuals : Tensor, shape (m,) or (m, k)
        y - X coefficients - intercept.
    rank : int Tensor, shape () or (k,)
        Rank of the design (with damp: of the damped one); -1 where the solver does not tell.
    degrees_of_freedom : Tensor, shape () or (k,)
        Rows of positive weight less rank, or with damp less the trace of the hat matrix; NaN where
        the rank is not known, and with damp where the covariance was not asked for.
    variance : Tensor, shape () or (k,)
        Weighted sum of squared residuals per degree of freedom; its root is the residual standard
        deviation. NaN without degrees of freedom.
    covariance : Tensor, shape (n, n) or (k, n, n), or None
        Of the parameters; NaN where the design lacks rank. None if it was not asked for.
    standard_errors : Tensor, shape as ``coefficients``, or None
        Roots of the diagonal of ``covariance``.
    intercept_error : Tensor, shape as ``intercept``, or None
        Standard error of the intercept; 0 without one.
    """

    coefficients: Tensor
    intercept: Tensor
    residuals: Tensor
    rank: Tensor
    degrees_of_freedom: Tensor
    variance: Tensor
    covariance: Tensor | None = None
    standard_errors: Tensor | None = None
    intercept_error: Tensor | None = None


def linear_regression(
    X: Any,
    y: Tensor,
    *,
    intercept: bool = True,
    damp: float | Tensor = 0.0,
    weights: Tensor | None = None,
    covariance: bool = True,
    **options: Any,
) -> LinearRegression:
    r"""min ||W^(1/2)(X beta + beta_0 - y)||^2 + ||damp beta||^2, with the errors of beta.

    The intercept beta_0 is not damped. Where several minimisers exist, (beta, beta_0) is the
    smallest. A dense real design is refined with residuals in twice the working precision: the
    coefficients are then right to all digits that the data, as stored, determine.

    Parameters
    ----------
    X : Tensor, Sparse or scipy.sparse matrix, shape (m, p)
        Regressors, dense or sparse.
    y : Tensor, shape (m,) or (m, k)
        Responses; k of them share X.
    intercept : bool
        Whether to fit a constant term.
    damp : float or real Tensor, scalar or (p,), units of X
        Ridge damping of the coefficients.
    weights : real Tensor, shape (m,) or (m, k), optional
        Row weights, in proportion to 1 / variance of y; rows of weight 0 are not counted.
    covariance : bool
        Whether to find the covariance; it takes n solves and (n, n) memory. With damp the degrees
        of freedom, and so the variance, need them too.
    **options
        ``solver``, ``rank``, ``rcond``, ``on_failure``, ``check_finite`` and settings of the
        solver, as in :func:`funclsq.lstsq`.

    Returns
    -------
    LinearRegression
        Coefficients, intercept, residuals, rank, variance, covariance, standard errors.

    Raises
    ------
    TypeError
        If X has no entries at hand (a LinearOperator), or as :func:`funclsq.lstsq`.
    ValueError
        If X is not a matrix, or as :func:`funclsq.lstsq`.

    Notes
    -----
    With G = A^H W A + D^2 for the design A = [X, 1], and sigma^2 the variance, the covariance is
    sigma^2 G^-1 A^H W A G^-1: sigma^2 G^-1 without damp; with it, that of a biased estimator,
    with m - trace(G^-1 A^H W A) degrees of freedom. Differentiable in X, y, damp and weights.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> X = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    >>> y = torch.tensor([1.0, 2.9, 5.1, 7.0], dtype=torch.float64)
    >>> fit = fl.linear_regression(X, y)
    >>> fit.coefficients.round(decimals=6), fit.intercept.round(decimals=6)
    (tensor([2.0200], dtype=torch.float64), tensor(0.9700, dtype=torch.float64))
    >>> fit.standard_errors.round(decimals=4)
    tensor([0.0424], dtype=torch.float64)
    """
    name = "linear_regression"
    checks = {key: options.pop(key, value) for key, value in _CHECKS.items()}
    A = _design(X, intercept)
    solver = options.pop("solver", "auto")
    if solver == "auto" and isinstance(A, Sparse) and A.values.device.type == "cpu":
        solver = "cholesky"  # it tells the rank, and its factor gives the covariance
    opts = settings(name, solver, rank=options.pop("rank", "auto"), **options)
    p = canonical(
        name,
        A,
        y,
        damp=_undamped_last(damp, A, name) if intercept else damp,
        weights=weights,
        x0=None,
        options=opts,
        **checks,
    )
    n = p.plan.structure.shape[1]
    x, info = solve_problem(p)
    if _refinable(p, x.shape[-1]):
        x = x + refinement(p, x, p.b, None)
    r = p.b - matmul(p.plan.structure, p.params, x)
    sol = solution(p.restore(x), p.restore_info(info), opts)
    count, square = _weighted(p, r)
    found = inverse = None
    if covariance:
        found, inverse = _covariance(p, sol.rank, n)
    used = _parameters_told(p, sol.rank, square) if found is None else found
    dof = p.restore_info(count.expand(square.shape).unsqueeze(-1)).squeeze(-1) - used
    sigma2 = p.restore_info(square.unsqueeze(-1)).squeeze(-1)
    sigma2 = sigma2 / torch.where(dof > 1e-9, dof, torch.nan)
    parameters = sol.x
    split = n - int(intercept)
    rows = parameters.ndim - (1 if p.vector else 2)
    fields = {
        "coefficients": parameters.narrow(rows, 0, split),
        "intercept": parameters.select(rows, n - 1)
        if intercept
        else torch.zeros_like(parameters.sum(rows)),
        "residuals": p.restore(r),
        "rank": sol.rank,
        "degrees_of_freedom": dof,
        "variance": sigma2,
    }
    if inverse is not None:
        full = sigma2[..., None, None] * inverse
        errors = full.diagonal(dim1=-2, dim2=-1).real.clamp_min(0).sqrt()
        errors = errors.movedim(-1, rows)
        fields["covariance"] = full
        fields["standard_errors"] = errors.narrow(rows, 0, split)
        constant = errors.select(rows, n - 1) if intercept else None
        fields["intercept_error"] = torch.zeros_like(sigma2) if constant is None else constant
    return LinearRegression(**fields)


_CHECKS: dict[str, Any] = {"on_failure": "warn", "check_finite": True}


def _design(X: Any, intercept: bool) -> Any:
    """[X, 1], or X; entries in the library's own types."""
    if hasattr(X, "tocoo"):
        X = Sparse.from_scipy(X)
    elif isinstance(X, np.ndarray):
        X = torch.from_numpy(X)
    if isinstance(X, Tensor) and X.layout != torch.strided:
        X = Sparse.from_torch(X)
    if not isinstance(X, (Tensor, Sparse)):
        raise TypeError(
            "linear_regression: X must be a dense or sparse matrix, whose entries are at hand; got "
            f"{type(X).__name__}. Pass a LinearOperator to funclsq.lstsq."
        )
    if len(X.shape) < 2:
        raise ValueError(
            f"linear_regression: X must have shape (m, p); got {tuple(X.shape)}. For one regressor "
            "pass X[:, None]."
        )
    if not intercept:
        return X
    if isinstance(X, Tensor):
        return torch.cat((X, torch.ones_like(X[..., :1]) if X.shape[-1] else _ones(X)), -1)
    values = torch.cat((X.values, X.values.new_ones((*X.values.shape[:-1], X.shape[-2]))), -1)
    return Sparse(_with_ones(X.pattern), values)


def _ones(X: Tensor) -> Tensor:
    return torch.ones((*X.shape[:-1], 1), dtype=X.dtype, device=X.device)


def _with_ones(pattern: SparsityPattern) -> SparsityPattern:
    """The pattern of [X, 1]; kept with that of X."""
    m, p = pattern.shape
    with pattern.lock:
        found = pattern.cache.get("with_ones")
        if found is None:
            row = np.concatenate((pattern.row, np.arange(m)))
            col = np.concatenate((pattern.col, np.full(m, p)))
            found = pattern.cache["with_ones"] = SparsityPattern(row, col, (m, p + 1))
    return found


def _undamped_last(damp: Any, A: Any, name: str) -> Any:
    """Damping of the coefficients, and none of the intercept."""
    if isinstance(damp, (int, float)) and damp == 0:
        return damp
    p = A.shape[-1] - 1
    values = A.values if isinstance(A, Sparse) else A
    real = values.real.dtype if values.is_complex() else values.dtype
    if not isinstance(damp, Tensor):
        damp = torch.as_tensor(damp, dtype=real, device=values.device)
    if damp.ndim and damp.shape[-1] not in (1, p):
        raise ValueError(
            f"{name}: damp must be a scalar or have shape ({p},), one per column of X; got "
            f"{tuple(damp.shape)}."
        )
    damp = damp.expand(*damp.shape[:-1], p)
    return torch.cat((damp, torch.zeros_like(damp.sum(-1, keepdim=True))), -1)


def _refinable(p: Problem, columns: int) -> bool:
    """Whether the products of a refinement fit: a dense real matrix of moderate size."""
    A = p.params[0]
    dense = p.plan.structure.kind == "dense" and A.is_floating_point()
    return dense and 0 < A.numel() * columns <= _REFINED and not torch.compiler.is_compiling()


def _weighted(p: Problem, r: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that count, and weighted sum of squared residuals, (..., k)."""
    square = r.abs() ** 2
    if p.w is None:
        return square.new_tensor(float(r.shape[-2])), square.sum(-2)
    w = p.w.unsqueeze(-1)
    return (w > 0).to(square.dtype).sum(-2), (w * square).sum(-2)


def _parameters_told(p: Problem, rank: Tensor, square: Tensor) -> Tensor:
    """Parameters used up, as far as the rank tells: not where it is unknown, nor with damping."""
    unknown = rank < 0
    if p.d2 is not None:
        damped = (p.d2 > 0).any(-1, keepdim=True).to(square.dtype).expand(square.shape)
        unknown = unknown | (p.restore_info(damped.unsqueeze(-1)).squeeze(-1) > 0)
    return torch.where(unknown, torch.nan, rank.to(square.dtype))


def _covariance(p: Problem, rank: Tensor, n: int) -> tuple[Tensor | None, Tensor]:
    """Parameters used up (None: the rank), and G^-1 A^H W A G^-1 with NaN where rank lacks."""
    eye = torch.eye(n, dtype=p.b.dtype, device=p.b.device)
    N, _, _ = derivatives.solve(p.plan, p.w, p.d2, None, eye, None, p.params)
    if _refinable(p, n):
        N = N + refinement(p, N, None, eye)
    lost = None
    if p.d2 is not None:
        D2 = p.d2.unsqueeze(-1)
        lost = (p.d2 * N.diagonal(dim1=-2, dim2=-1).real).sum(-1)
        with full_precision(N.device.type):
            N = N - N @ (D2 * N)
    if p.per_column:
        N = N.unflatten(0, (*p.lead, -1))
        lost = None if lost is None else lost.unflatten(0, (*p.lead, -1))
    elif N.ndim == 3:
        N = N.unflatten(0, p.lead)
        lost = None if lost is None else lost.unflatten(0, p.lead)
    if not p.per_column and not p.vector:
        N = N.unsqueeze(-3)
        lost = None if lost is None else lost.unsqueeze(-1)
    trace = None if lost is None else torch.where(rank < 0, torch.nan, rank) - lost
    full = (rank == n)[..., None, None]
    return trace, torch.where(full, N, torch.nan)


def _flatten(fit: LinearRegression) -> tuple[list[Any], Any]:
    names = [f.name for f in dataclasses.fields(fit) if getattr(fit, f.name) is not None]
    return [getattr(fit, name) for name in names], names


def _unflatten(leaves: Any, names: Any) -> LinearRegression:
    return LinearRegression(**dict(zip(names, leaves)))


torch.utils._pytree.register_pytree_node(
    LinearRegression, _flatten, _unflatten, serialized_type_name="funclsq.LinearRegression"
)
