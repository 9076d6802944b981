"""Gradient descent as a function of its own: with its history, or unrolled."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from funclsq.inputs import Problem, canonical
from funclsq.lstsq import _solve as solve_problem
from funclsq.lstsq import solution, solve
from funclsq.matrix import matmul, rmatmul
from funclsq.methods._descend import Quadratic, Rule, descend, spectral_bound
from funclsq.methods.gradient_descent import MAXITER
from funclsq.settings import settings
from funclsq.solution import LEAVES, Method, Solution, Status

__all__ = ["Descent", "History", "gradient_descent"]

_POWER_STEPS = 100


class History(NamedTuple):
    """Every state of a descent, the start included: T passes give T + 1 of each.

    Parameters
    ----------
    x : Tensor, shape (T + 1, ..., n) or (T + 1, ..., n, k)
        Iterates.
    residual_norm : Tensor, shape (T + 1, ...) or (T + 1, ..., k)
        ``||W^(1/2)(b - A x)||``.
    normal_residual_norm : Tensor, shape as ``residual_norm``
        ``||A^H W (b - A x) - damp^2 (x - x0)||``: half the gradient of the sum of squares.
    """

    x: Tensor
    residual_norm: Tensor
    normal_residual_norm: Tensor


@dataclasses.dataclass(frozen=True)
class Descent(Solution):
    """A :class:`Solution` with the way to it in ``history`` (None unless asked for)."""

    history: History | None = None


def gradient_descent(
    A: Any,
    b: Tensor,
    *,
    step: Any = "1/L",
    momentum: float | str = 0.0,
    nesterov: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    maxiter: int | None = None,
    history: bool = False,
    unrolled: bool = False,
    **others: Any,
) -> Descent:
    r"""Minimise ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2 by gradient descent from x0.

    The limit is the minimiser nearest to x0, as that of every other solver. The error falls by
    1 - 1/kappa^2 per step (kappa = cond A), with momentum by about 1 - 1/kappa: use it to
    understand and to compare; :func:`funclsq.lstsq` is faster.

    Parameters
    ----------
    A, b
        As in :func:`funclsq.lstsq`: dense, sparse or matrix-free; any number of columns in b.
    step : float, "1/L", "exact" or callable
        Step size t of x <- x - t grad, the ``lr`` of ``torch.optim.SGD`` on the sum of squares;
        ``"1/L"`` with L = 2 ||A||^2 by power iteration; ``"exact"`` the best along the gradient;
        or a function of the number of passes made, for a decreasing step.
    momentum : float or "adaptive"
        beta of torch's v <- beta v + grad (Polyak's heavy ball); ``"adaptive"`` is Nesterov's
        k / (k + 3), restarted whenever it overshoots: fast without knowing cond(A).
    nesterov : bool
        Nesterov's momentum for a fixed beta, as in torch.
    batch_size : int, optional
        Rows per step. Each pass draws every row once, in an order seeded by ``seed``; the step is
        along the gradient of the batch's own sum of squares, with its share of the damping.
    seed : int
        Of the order of rows.
    maxiter : int, optional
        Most passes over the rows (steps, without batches); 10,000 by default.
    history : bool
        Keep every iterate and residual norm: maxiter n k numbers.
    unrolled : bool
        Differentiate through the iterations, not implicitly: exactly ``maxiter`` passes are made,
        and the derivatives are those of that many passes with the step size held constant. Their
        memory grows with maxiter.
    **others
        ``x0``, ``damp``, ``weights``, ``atol``, ``btol``, ``on_failure``, ``callback``, ... as in
        :func:`funclsq.solve`. A callback is also given ``x``, less x0.

    Returns
    -------
    Descent
        A Solution with ``history``.

    Raises
    ------
    TypeError, ValueError
        As :func:`funclsq.lstsq`, and for settings that do not go together.

    Warns
    -----
    ConvergenceWarning
        If the tolerance was not met; not with ``unrolled``.

    Notes
    -----
    Differentiable as :func:`funclsq.lstsq`: the derivative of the minimiser, whatever the path to
    it, by a descent of the same kind. A step costs two products with A, ``"exact"`` four; a pass
    in mini-batches two of each kind.

    References
    ----------
    B. T. Polyak, USSR Comput. Math. Math. Phys. 4 (1964) 1-17, doi:10.1016/0041-5553(64)90137-5.
    B. O'Donoghue and E. Candes, Found. Comput. Math. 15 (2015) 715-732,
    doi:10.1007/s10208-013-9150-3.

    Examples
    --------
    >>> import torch
    >>> from funclsq.descent import gradient_descent
    >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> b = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    >>> sol = gradient_descent(A, b, momentum="adaptive", history=True)
    >>> sol.x.round(decimals=9), sol.history.x.shape[0] == int(sol.iterations) + 1
    (tensor([1., 2.], dtype=torch.float64), True)
    """
    how = {"step": step, "momentum": momentum, "nesterov": nesterov}
    how |= {"batch_size": batch_size, "seed": seed}
    rule = Rule(**how)
    if not (history or unrolled):
        sol = solve(A, b, solver="gradient_descent", maxiter=maxiter, **how, **others)
        return _descent(sol, None)
    operands = {name: others.pop(name, default) for name, default in _OPERANDS.items()}
    if unrolled:
        opts = settings("gradient_descent", "gradient_descent", **others)
        p = canonical("gradient_descent", A, b, options=opts, **operands)
        return _unrolled(p, rule, MAXITER if maxiter is None else maxiter, opts, history)
    record = _Record(others.pop("callback", None))
    how |= {"maxiter": maxiter, "callback": record}
    opts = settings("gradient_descent", "gradient_descent", **how, **others)
    p = canonical("gradient_descent", A, b, options=opts, **operands)
    x, info = solve_problem(p)
    return _descent(solution(p.restore(x), p.restore_info(info), opts), record.close(p, x))


gradient_descent.funclsq_name = "gradient_descent"  # type: ignore[attr-defined]

_OPERANDS: dict[str, Any] = {
    "damp": 0.0,
    "weights": None,
    "x0": None,
    "on_failure": "warn",
    "check_finite": True,
    "compute_dtype": None,
}


def _descent(sol: Solution, history: History | None) -> Descent:
    leaves = {name: getattr(sol, name) for name in LEAVES}
    return Descent(**leaves, reason=sol.reason, history=history)


class _Record:
    """A callback that keeps what it is told until it is closed."""

    def __init__(self, also: Any) -> None:
        self.also, self.open = also, True
        self.states: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, told: dict[str, Any]) -> None:
        if self.open:
            norms = (told["residual_norm"], told["normal_residual_norm"])
            self.states.append((told["x"].clone(), *(torch.from_numpy(t) for t in norms)))
            if self.also is not None:
                self.also(told)

    def close(self, p: Problem, answer: Tensor) -> History:
        """Shape the record as the solution is shaped; derivatives leave no trace in it."""
        states, self.states, self.open = self.states, [], False
        if torch._C._functorch.is_functorch_wrapped_tensor(answer):
            raise ValueError(
                "gradient_descent: history is not available inside a torch.func transform. Pass "
                "unrolled=True, or take the history outside."
            )
        start = 0 if p.x0 is None else p.x0.detach()
        path = []
        for x, rnorm, snorm in states:
            if answer.ndim > x.ndim:  # a batch of b alone is solved side by side
                size = answer.shape[0]
                x = x.unflatten(-1, (size, -1)).movedim(-2, 0)
                rnorm, snorm = (t.unflatten(-1, (size, -1)) for t in (rnorm, snorm))
            real = x.abs().dtype
            path.append((start + x, rnorm.to(real), snorm.to(real)))
        return _history(p, path)


def _history(p: Problem, path: list[tuple[Tensor, Tensor, Tensor]]) -> History:
    norms = (
        torch.stack([p.restore_info(step[i].unsqueeze(-1)).squeeze(-1) for step in path])
        for i in (1, 2)
    )
    return History(torch.stack([p.restore(step[0]) for step in path]), *norms)


def _unrolled(p: Problem, rule: Rule, maxiter: int, opts: Any, keep: bool) -> Descent:
    """Make exactly maxiter passes in differentiable operations."""
    q, zero = _quadratic(p)
    with torch.no_grad(), fwAD._set_fwd_grad_enabled(False):
        bound = spectral_bound(q, zero[..., :1], _POWER_STEPS, adaptive=False)
    start = 0 if p.x0 is None else p.x0
    path: list[tuple[Tensor, Tensor, Tensor]] = []
    for x, r, s in itertools.islice(descend(q, zero, rule, 2 * bound), maxiter + 1):
        if p.w is not None:
            r = r * p.w.sqrt().unsqueeze(-1)
        norms = (torch.linalg.vector_norm(t.detach(), dim=-2) for t in (r, s))
        path = [*(path if keep else ()), (start + x, *norms)]
    x, rnorm, snorm = path[-1]
    atol = dict(opts.given).get("atol") or 1e3 * torch.finfo(x.dtype).eps
    good = snorm <= atol * bound.sqrt().squeeze(-2) * rnorm
    status = torch.where(good, int(Status.NORMAL_RESIDUAL_SMALL), int(Status.MAXITER))
    like = torch.zeros_like(rnorm)
    columns = (status, like + maxiter, rnorm, snorm, like - 1, like + torch.nan, like)
    info = torch.stack([*(t.to(like.dtype) for t in columns), like + int(Method.gradient_descent)])
    sol = solution(p.restore(x), p.restore_info(info.movedim(0, -1)), opts)
    return _descent(sol, _history(p, path) if keep else None)


def _quadratic(p: Problem) -> tuple[Quadratic, Tensor]:
    """The function of x - x0 in differentiable products, and its start 0."""
    structure, params, w = p.plan.structure, p.params, p.w

    def mv(x: Tensor) -> Tensor:
        return matmul(structure, params, x)

    def rmv(r: Tensor) -> Tensor:
        return rmatmul(structure, params, r if w is None else w.unsqueeze(-1) * r)

    c = p.b if p.x0 is None else p.b - mv(p.x0)

    def part(x: Tensor, rows: Tensor) -> Tensor:
        chosen = torch.zeros(c.shape[-2], dtype=c.dtype, device=c.device)
        return rmv(chosen.index_fill(0, rows, 1).unsqueeze(-1) * (c - mv(x)))

    batches = (t.shape[0] for t, d in zip(params, structure.param_ndims) if t.ndim > d)
    others = (t.shape[0] for t, d in ((p.w, 1), (p.d2, 1), (c, 2)) if t is not None and t.ndim > d)
    lead = tuple(itertools.islice(itertools.chain(batches, others), 1))
    c = c.expand(*lead, *c.shape[-2:])
    return Quadratic(mv, rmv, c, None, p.d2, part), c.new_zeros(
        (*lead, structure.shape[1], c.shape[-1])
    )


def _flatten(s: Descent) -> tuple[list[Any], Any]:
    leaves = [getattr(s, name) for name in LEAVES]
    return (leaves if s.history is None else [*leaves, s.history]), s.reason


def _unflatten(leaves: Any, reason: Any) -> Descent:
    leaves = list(leaves)
    history = leaves.pop() if len(leaves) > len(LEAVES) else None
    return Descent(**dict(zip(LEAVES, leaves)), reason=reason, history=history)


torch.utils._pytree.register_pytree_node(
    Descent, _flatten, _unflatten, serialized_type_name="funclsq.Descent"
)
