"""Gradient descent in its textbook forms, for all columns at once.

For G = A^H A + D^2 the function

    f(x) = ||A x - c||^2 + ||D x||^2 - 2 Re(g^H x),     grad f = -2 s,
    s = g + A^H (c - A x) - D^2 x,

has its minimum at x = G^+ (A^H c + g). A step of size t is x + 2 t s, as that of
``torch.optim.SGD(lr=t)`` on the sum of squares, momentum included. Iterates are those of the
textbook: columns are not scaled. The iteration only needs products, so it runs on raw operators
and on differentiable ones alike.

References
----------
B. T. Polyak, USSR Comput. Math. Math. Phys. 4 (1964) 1-17, doi:10.1016/0041-5553(64)90137-5.
B. O'Donoghue and E. Candes, Found. Comput. Math. 15 (2015) 715-732,
doi:10.1007/s10208-013-9150-3 (Nesterov's momentum, restarted).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from funclsq.methods._protocol import Options

__all__ = ["Quadratic", "Rule", "State", "descend", "spectral_bound"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a step is made; checked when made.

    Parameters
    ----------
    step : float, "1/L", "exact" or callable
        Step size t; 1/L with L = 2 ||[A; D]||^2; the minimum along -grad f; or t(k) for pass k.
    momentum : float or "adaptive"
        beta of v <- beta v + grad; "adaptive" is Nesterov's k / (k + 3), restarted.
    nesterov : bool
        Step along grad + beta v instead of v.
    batch_size : int, optional
        Rows per step; every pass draws all rows once in random order.
    seed : int
        Of that order.
    """

    step: float | str | Callable[[int], float] = "1/L"
    momentum: float | str = 0.0
    nesterov: bool = False
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        name, step, momentum = "gradient_descent", self.step, self.momentum
        if not (step in ("1/L", "exact") or callable(step) or (_is_number(step) and step > 0)):
            raise ValueError(
                f"{name}: step must be a number > 0, '1/L', 'exact' or a function of the pass "
                f"number; got {step!r}."
            )
        if not (momentum == "adaptive" or (_is_number(momentum) and 0 <= momentum < 1)):
            raise ValueError(
                f"{name}: momentum must be a number in [0, 1) or 'adaptive'; got {momentum!r}."
            )
        if self.nesterov and momentum == 0:
            raise ValueError(f"{name}: nesterov=True needs momentum; pass momentum='adaptive'.")
        if step == "exact" and (momentum != 0 or self.batch_size is not None):
            raise ValueError(
                f"{name}: step='exact' searches along the full gradient; it takes neither "
                "momentum nor batch_size."
            )
        if momentum == "adaptive" and self.batch_size is not None:
            raise ValueError(
                f"{name}: momentum='adaptive' restarts on the full gradient; with batch_size pass "
                "a number."
            )
        if self.batch_size is not None and not (
            isinstance(self.batch_size, int) and self.batch_size > 0
        ):
            raise ValueError(f"{name}: batch_size must be an int > 0; got {self.batch_size!r}.")

    @classmethod
    def of(cls, options: Options) -> Rule:
        """Take the rule from a solve's options; None means the default."""
        given = {f.name: getattr(options, f.name) for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Quadratic(NamedTuple):
    """f through products: blocks are (..., m, k) and (..., n, k); d2 is (..., n) or None.

    ``part(x, rows)`` is A_I^H (c_I - A_I x) over the rows I; None where rows are not at hand.
    """

    mv: Callable[[Tensor], Tensor]
    rmv: Callable[[Tensor], Tensor]
    c: Tensor
    g: Tensor | None = None
    d2: Tensor | None = None
    part: Callable[[Tensor, Tensor], Tensor] | None = None

    def remainder(self, x: Tensor, s: Tensor, share: float = 1.0) -> Tensor:
        """Add to A^H r what g and D contribute to s, or a share of it."""
        if self.g is not None:
            s = s + share * self.g
        if self.d2 is not None:
            s = s - share * self.d2.unsqueeze(-1) * x
        return s

    def curvature(self, p: Tensor) -> Tensor:
        """p^H G p per column, (..., 1, k)."""
        curvature = (p.conj() * self.rmv(self.mv(p))).real.sum(-2, keepdim=True)
        if self.d2 is not None:
            curvature = curvature + (self.d2.unsqueeze(-1) * p.abs() ** 2).sum(-2, keepdim=True)
        return curvature


class State(NamedTuple):
    """Where the iteration is: x, r = c - A x and s = -grad f(x) / 2."""

    x: Tensor
    r: Tensor
    s: Tensor


def descend(q: Quadratic, x: Tensor, rule: Rule, lipschitz: Tensor) -> Iterator[State]:
    """Yield the states x_0 = x, x_1, ... without end; with mini-batches, one per pass.

    Parameters
    ----------
    q : Quadratic
        The function.
    x : Tensor, shape (..., n, k)
        Start.
    rule : Rule
        The kind of step.
    lipschitz : Tensor, broadcastable to (..., 1, k)
        L = 2 ||G||.
    """
    order = np.random.default_rng(rule.seed)
    v = torch.zeros_like(x)
    beta: Any = 0.0 if rule.momentum == "adaptive" else rule.momentum
    age: Any = 0.0
    for k in itertools.count():
        r = q.c - q.mv(x)
        s = q.remainder(x, q.rmv(r))
        yield State(x, r, s)
        if rule.step == "exact":
            # t = s^H s / s^H G s minimises f(x + t s)
            square, curvature = (s.abs() ** 2).sum(-2, keepdim=True), q.curvature(s)
            x = x + s * (square / torch.where(curvature > 0, curvature, 1))
            continue
        t: Any = rule.step(k) if callable(rule.step) else rule.step
        if t == "1/L":
            t = 1 / lipschitz
        if rule.batch_size is not None:
            for rows in torch.from_numpy(order.permutation(q.c.shape[-2])).split(rule.batch_size):
                assert q.part is not None
                share = len(rows) / q.c.shape[-2]
                s = q.remainder(x, q.part(x, rows.to(x.device)), share)
                v = beta * v + 2 * s
                x = x + t * (2 * s + beta * v if rule.nesterov else v)
            continue
        v = beta * v + 2 * s
        if rule.momentum == "adaptive":
            # a move v against the descent s has overshot: forget it
            ahead = (v.conj() * s).real.sum(-2, keepdim=True) > 0
            age = torch.where(ahead, age + 1.0, 0.0)
            beta = age / (age + 3)
            x = x + t * (2 * s + beta * v)
        else:
            x = x + t * (2 * s + beta * v if rule.nesterov else v)


def spectral_bound(q: Quadratic, like: Tensor, steps: int, adaptive: bool = True) -> Tensor:
    """||G||_2 by power iteration from below, to about 1e-4: (..., 1, 1) and 1 for G = 0.

    ``adaptive`` stops when the estimate has settled, which needs to look at the data.
    """
    v = np.random.default_rng(0).standard_normal((like.shape[-2], 1))
    u = torch.from_numpy(v).to(dtype=like.dtype, device=like.device)
    u = u / torch.linalg.vector_norm(u).clamp_min(torch.finfo(like.dtype).tiny)
    u = u.expand(*like.shape[:-2], *u.shape)
    size: Any = None
    for k in range(steps):
        u = q.rmv(q.mv(u)) if q.d2 is None else q.rmv(q.mv(u)) + q.d2.unsqueeze(-1) * u
        last: Any = size
        size = torch.linalg.vector_norm(u, dim=-2, keepdim=True)
        u = u / torch.where(size > 0, size, 1)
        if adaptive and k > 10 and bool(((size - last).abs() <= 1e-5 * size).all()):
            break
    assert size is not None
    return torch.where(size > 0, size, 1)
