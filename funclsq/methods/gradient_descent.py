"""Gradient descent made ready for one operator, with its stopping test.

The iteration is :func:`funclsq.methods._descend.descend`. It starts at 0, which with the shift
x = x0 + S(b - A x0) that is made outside means at the user's x0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.methods._descend import Quadratic, Rule, State, descend, spectral_bound
from funclsq.methods._progress import reporter
from funclsq.methods._protocol import Options, Raw
from funclsq.methods._verify import norms
from funclsq.methods.lsmr import prepare as prepare_lsmr
from funclsq.methods.svd import pad_rows
from funclsq.operators import DenseOp, SparseOp, StackedOp
from funclsq.solution import Method, Status

__all__ = ["MAXITER", "PreparedDescent", "prepare"]

MAXITER = 10_000
_PATIENCE = 50  # steps without progress, at the rounding level, that end the iteration
_POWER_STEPS = 200


class PreparedDescent:
    """Gradient descent ready for one operator.

    A right-hand side g is only reached from the range of G. Where A may lack rank,
    y = A^{+H} g comes first, by descent on ||A^H y - g||^2, and x = A^+ (c + y) follows.
    """

    method = int(Method.gradient_descent)
    cond = None
    nbytes = 0

    def __init__(self, op: Any, damp: Tensor | None, options: Options, full_rank: bool) -> None:
        self._op, self._damp, self._options = op, damp, options
        self._rule = Rule.of(options)
        if self._rule.batch_size is not None and not isinstance(op, (DenseOp, SparseOp)):
            raise ValueError(
                "gradient_descent: mini-batches need the rows of A, and a LinearOperator has none. "
                "Pass batch_size=None."
            )
        plain = Options(rank=options.rank, rcond=options.rcond)
        self._rank_by = prepare_lsmr(op, damp, plain, full_rank)
        self._bounds: dict[bool, Tensor] = {}

    @property
    def rank(self) -> Tensor | None:
        """N where full column rank is known or was found."""
        return self._rank_by.rank

    @property
    def deficient(self) -> bool:
        """Whether [A; D] may lack full column rank; found by a few Krylov steps."""
        return self._rank_by.deficient

    @property
    def assumed_deficient(self) -> bool:
        """Whether full rank is not known yet."""
        return self._rank_by.assumed_deficient

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (A^H c + g)."""
        op, damp = self._op, self._damp
        c, g = (self._batched(t) for t in (c, g))
        like = c if c is not None else g
        assert like is not None
        m, n = op.shape
        if g is not None and self.deficient:
            system = op if damp is None else StackedOp(op, damp)
            first = self._run(Quadratic(system.rmv, system.mv, g), system.shape[0], False)
            y = first.x if c is None else first.x + pad_rows(c, system.shape[0])
            second = self._run(Quadratic(system.mv, system.rmv, y), n, False)
            status = torch.where(first.status > second.status, first.status, second.status)
            return Raw(second.x, status, first.iterations + second.iterations)
        if c is None:
            c = like.new_zeros((*like.shape[:-2], m, like.shape[-1]))
        d2 = None if damp is None else damp**2
        return self._run(Quadratic(op.mv, op.rmv, c, g, d2, _part(op, c)), n, True)

    def _batched(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        damp = self._damp
        size = self._op.batch
        if size is None and damp is not None and damp.ndim == 2:
            size = damp.shape[0]
        return t if size is None or t.ndim == 3 else t.expand(size, *t.shape)

    def _run(self, q: Quadratic, n: int, batches: bool) -> Raw:
        options, rule = self._options, self._rule
        if not batches:
            rule = dataclasses.replace(rule, batch_size=None)
        x = q.c.new_zeros((*q.c.shape[:-2], n, q.c.shape[-1]))
        forward = n == self._op.shape[1]
        if forward not in self._bounds:
            self._bounds[forward] = spectral_bound(q, x[..., :1], _POWER_STEPS)
        bound = self._bounds[forward]
        stop = _Stop(q, bound.squeeze(-2).sqrt(), options, x)
        limit = MAXITER if options.maxiter is None else options.maxiter
        with reporter(options) as report:
            for k, state in enumerate(descend(q, x, rule, 2 * bound)):
                finished = stop.look(k, state, last=k == limit)
                if report is not None and report(_told(k, stop, state)):
                    stop.interrupt(k, state)
                    break
                if finished:
                    break
        return Raw(stop.x, stop.status, stop.iterations)


def prepare(op: Any, damp: Tensor | None, options: Options, full_rank: bool) -> PreparedDescent:
    """Make gradient descent ready; ``options`` gives the :class:`Rule`, atol, btol, maxiter."""
    return PreparedDescent(op, damp, options, full_rank)


class _Stop:
    """Per column: is x good enough, has it gone astray; the answer is taken when it is.

    ||r|| <= btol ||c|| + atol ||A|| ||x||, or ||s|| <= atol (||A|| ||[r; D x]|| + ||g||). The
    default tolerances are the rounding level, where s can stop falling a little above it.
    """

    def __init__(self, q: Quadratic, anorm: Tensor, options: Options, x: Tensor) -> None:
        self.q, self.anorm, self.x = q, anorm.double().cpu().numpy(), x.clone()
        self.eps = torch.finfo(x.dtype).eps
        self.atol = 4 * self.eps if options.atol is None else options.atol
        self.btol = 4 * self.eps if options.btol is None else options.btol
        tight = self.atol <= 100 * self.eps
        self.good = (
            (Status.RESIDUAL_AT_EPS, Status.NORMAL_RESIDUAL_AT_EPS)
            if tight
            else (Status.RESIDUAL_SMALL, Status.NORMAL_RESIDUAL_SMALL)
        )
        self.consistent = q.g is None and q.d2 is None
        self.damp = None if q.d2 is None else q.d2.sqrt().unsqueeze(-1)
        self.cnorm = norms(q.c)
        self.gnorm = np.zeros_like(self.cnorm) if q.g is None else norms(q.g)
        self.code = np.full(self.cnorm.shape, -1)
        self.count, self.since = np.zeros_like(self.code), np.zeros_like(self.code)
        self.least = np.full(self.cnorm.shape, np.inf)
        self.limit = self.least  # of ||s||, beyond which the iteration has gone astray
        self.rnorm = self.snorm = self.cnorm

    @property
    def status(self) -> Tensor:
        """A Status per column."""
        return torch.from_numpy(self.code).to(self.x.device)

    @property
    def iterations(self) -> Tensor:
        """Steps made per column."""
        return torch.from_numpy(self.count).to(self.x.device)

    def look(self, k: int, state: State, last: bool) -> bool:
        """Judge the state after k steps; True when every column is settled."""
        x = state.x
        rnorm, snorm, xnorm = norms(state.r), norms(state.s), norms(x)
        self.rnorm, self.snorm = rnorm, snorm
        if k == 0:
            self.limit = snorm / self.eps
        self.since = np.where(snorm < self.least, 0, self.since + 1)
        self.least = np.minimum(self.least, snorm)
        whole = rnorm if self.damp is None else np.hypot(rnorm, norms(self.damp * x))
        anorm, axnorm = self.anorm, self.anorm * xnorm
        at_rest = snorm <= self.atol * (anorm * whole + self.gnorm)
        noise = 16 * self.eps * (anorm * (whole + axnorm) + self.gnorm)
        stuck = (self.since >= _PATIENCE) & (snorm <= noise)
        fits = self.consistent & (rnorm <= self.btol * self.cnorm + self.atol * axnorm)
        astray = ~(snorm <= self.limit)
        if not (last or (at_rest | stuck | fits | astray).any()):
            return False
        verdict = np.full(self.code.shape, int(Status.MAXITER) if last else -1)
        verdict[astray] = Status.DIVERGED
        verdict[stuck] = Status.NORMAL_RESIDUAL_AT_EPS
        verdict[at_rest] = self.good[1]
        verdict[fits] = self.good[0]
        verdict[(snorm == 0) & (k == 0)] = Status.START_SOLVES
        new = (self.code < 0) & (verdict >= 0)
        if new.any():
            self.code[new], self.count[new] = verdict[new], k
            self.x = torch.where(torch.from_numpy(new).to(x.device).unsqueeze(-2), x, self.x)
        return bool((self.code >= 0).all())

    def interrupt(self, k: int, state: State) -> None:
        """Take every column that still runs as it is."""
        new = self.code < 0
        self.code[new], self.count[new] = Status.INTERRUPTED, k
        self.x = torch.where(torch.from_numpy(new).to(self.x.device).unsqueeze(-2), state.x, self.x)


def _told(k: int, stop: _Stop, state: State) -> dict[str, Any]:
    """What a callback is given."""
    return {
        "iteration": k,
        "active": stop.code < 0,
        "residual_norm": stop.rnorm,
        "normal_residual_norm": stop.snorm,
        "x": state.x,
    }


def _part(op: Any, c: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A_I^H (c_I - A_I x) from the entries of the rows I alone."""
    if isinstance(op, DenseOp):

        def dense(x: Tensor, rows: Tensor) -> Tensor:
            A = op.A[..., rows, :]
            return A.mH @ (c[..., rows, :] - A @ x)

        return dense
    if not isinstance(op, SparseOp):
        return None
    start = op.pattern.tensor("indptr", op.device).long()
    column = op.pattern.tensor("indices", op.device)

    def sparse(x: Tensor, rows: Tensor) -> Tensor:
        first, count = start[rows], start[rows + 1] - start[rows]
        local = torch.arange(len(rows), device=op.device).repeat_interleave(count)
        before = (count.cumsum(0) - count).index_select(0, local)
        entry = first.index_select(0, local) + torch.arange(len(local), device=op.device) - before
        col = column.index_select(0, entry)
        value = op.csr_values.index_select(-1, entry).unsqueeze(-1)
        r = c[..., rows, :].index_add(-2, local, value * x.index_select(-2, col), alpha=-1)
        return torch.zeros_like(x).index_add(-2, col, value.conj() * r.index_select(-2, local))

    return sparse
