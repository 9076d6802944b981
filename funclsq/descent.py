"""Gradient descent as a function of its own: with its history, or unrolled."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from funclsq.inputs import Problem, canonical, settings
from funclsq.lstsq import solve
from funclsq.matrix import matmul, rmatmul
from funclsq.solution import LEAVES, Method, Solution, Status
from funclsq.solvers._descend import Quadratic, Rule, State, descend, spectral_bound
from funclsq.solvers.gradient_descent import MAXITER

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
    if unrolled:
        return _unrolled(A, b, rule, MAXITER if maxiter is None else maxiter, history, others)
    if not history:
        sol = solve(A, b, solver="gradient_descent", maxiter=maxiter, **how, **others)
        return Descent(*(getattr(sol, name) for name in LEAVES), reason=sol.reason)
    record = _Record(others.pop("callback", None))
    sol = solve(
        A, b, solver="gradient_descent", maxiter=maxiter, callback=record, **how, **others
    )
    path = record.close(sol, others.get("x0"))
    return Descent(*(getattr(sol, name) for name in LEAVES), reason=sol.reason, history=path)


gradient_descent.funclsq_name = "gradient_descent"  # type: ignore[attr-defined]


class _Record:
    """A callback that keeps what it is told until it is closed."""

    def __init__(self, also: Any) -> None:
        self.also, self.open = also, True
        self.states: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, told: dict[str, Any]) -> None:
        if self.open:
            norms = (told["residual_norm"], told["normal_residual_norm"])
            self.states.append((told["x"].clone(), *(torch.from_numpy(t) for t in norms)))
        if self.also is not None and self.open:
            self.also(told)

    def close(self, sol: Solution, x0: Tensor | None) -> History:
        """Shape the record as the solution is shaped."""
        states, self.states, self.open = self.states, [], False
        x, rnorm, snorm = (torch.stack(t) for t in zip(*states))
        shape, vector = sol.x.shape, sol.x.ndim == sol.status.ndim + 1 and sol.x.ndim == 1
        if torch._C._functorch.is_functorch_wrapped_tensor(sol.x) or x[0].numel() != sol.x.numel():
            raise ValueError(
                "gradient_descent: history is not available inside a torch.func transform; pass "
                "unrolled=True, or take the history outside."
            )
        if vector:
            x, rnorm, snorm = x[..., 0], rnorm[..., 0], snorm[..., 0]
        else:
            count = len(shape) - 2
            if count and x.ndim == 3:  # a batch of b alone was solved side by side
                x = x.unflatten(-1, (-1, shape[-1])).movedim(-2, 1)
            x = x.reshape(-1, *shape)
            rnorm, snorm = (t.reshape(-1, *sol.status.shape).to(x.real.dtype) for t in (rnorm, snorm))
        return History(x if x0 is None else x + x0.detach(), rnorm, snorm)


def _unrolled(
    A: Any, b: Tensor, rule: Rule, maxiter: int, keep: bool, others: dict[str, Any]
) -> Descent:
    """Run exactly maxiter passes in differentiable operations."""
    given = {name: others.pop(name, default) for name, default in _OPERANDS.items()}
    opts = settings("gradient_descent", "gradient_descent", **others)
    p = canonical(
        "gradient_descent", A, b, given["damp"], given["weights"], given["x0"], opts, "ignore", True
    )
    q, x = _quadratic(p)
    with torch.no_grad(), fwAD._set_fwd_grad_enabled(False):
        bound = spectral_bound(q, x[..., :1], _POWER_STEPS, adaptive=False)
    kept: list[State] = []
    for state in itertools.islice(descend(q, x, rule, 2 * bound), maxiter + 1):
        kept = [*kept, state] if keep else [state]
    path = [_measure(p, s) for s in kept]
    x, r, s = path[-1]
    start = 0 if p.x0 is None else p.x0
    info = _info(r, s, bound, q, maxiter, opts)
    sol = Solution(p.restore(start + x), *(p.restore_info(t.unsqueeze(-1))[..., 0] for t in info))
    full = None
    if keep:
        full = History(
            torch.stack([p.restore(start + x) for x, _, _ in path]),
            *(torch.stack([p.restore_info(t[i].unsqueeze(-1))[..., 0] for t in path]) for i in (1, 2)),
        )
    return Descent(*(getattr(sol, name) for name in LEAVES), reason="unrolled", history=full)


_OPERANDS = {"damp": 0.0, "weights": None, "x0": None}
