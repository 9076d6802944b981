"""solver="auto": the method that suits the matrix, by measurements (docs: choosing a solver).

In order:

1. no entries at hand (matrix-free)                         lsmr
2. dense, or small enough to be written out                 qr   (rank-revealing, batched)
   (a batch of sparse ones with more than 8 columns is not: sparse products and small
   factors of A^H A take 0.1 to 0.9 of its time there)
3. sparse on a GPU                                          lsmr
4. few right-hand sides: a trial of lsmr, as long as it     lsmr, if it converges
   looks cheaper than a factor (see _Watch)
5. A^H A (or A A^H) too full for a sparse factor and large  lsmr
6. else                                                     cholesky (its factor dense where
                                                            a sparse one would be nearly full)
7. cholesky finds a null space too large for it             qr while A can be written out, else lsmr
"""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import torch
from torch import Tensor

from funclsq.methods._normal import DENSE_FILL, DENSE_ORDER
from funclsq.methods._price import Price
from funclsq.methods._protocol import Options, Prepared, Raw
from funclsq.methods.cholesky import NeedsDense, predict
from funclsq.methods.cholesky import prepare as prepare_cholesky
from funclsq.methods.lsmr import prepare as prepare_lsmr
from funclsq.methods.qr import prepare as prepare_qr
from funclsq.operators import DenseOp, Operator, SparseOp
from funclsq.solution import Choice, Status

__all__ = ["PreparedAuto", "instead_of_cholesky", "prepare"]

SMALL_ENTRIES = 1 << 14  # m n up to which one sparse matrix is written out for QR
SMALL_BATCHED = 8  # min(m, n) up to which each matrix of a sparse batch is
WRITABLE_ENTRIES = 1 << 25  # m n up to which a rank-deficient one is
CHECK_EVERY = 12  # iterations after which a trial may be given up
MOST_LIKELY = 64.0  # iterations that an easy matrix is supposed to take at most
SLACK = 1.0  # the prices of a factor that a trial may cost at most
HOPELESS = 1 / 4  # the same, where what remains does not get less
GROWTH = 3.0  # what is foretold grows so many times what it grew since the last check


def prepare(op: Operator, damp: Tensor | None, options: Options, full_rank: bool) -> Prepared:
    """Choose what can be chosen before a right-hand side is seen."""
    if isinstance(op, DenseOp) or (isinstance(op, SparseOp) and _small(op, damp)):
        return _because(Choice.small, prepare_qr(op, damp, options, full_rank))
    if isinstance(options.rank, int) and options.rank < min(op.shape):
        return _because(Choice.rank, prepare_qr(op, damp, options, full_rank))
    if not isinstance(op, SparseOp):
        return _because(Choice.matrix_free, prepare_lsmr(op, damp, options, full_rank))
    if op.device.type != "cpu":
        return _because(Choice.device, prepare_lsmr(op, damp, options, full_rank))
    return PreparedAuto(op, damp, options, full_rank)


def instead_of_cholesky(
    op: Operator, damp: Tensor | None, options: Options, full_rank: bool
) -> Prepared:
    """What can have a null space of any size: qr while A can be written out, else lsmr."""
    m, n = op.shape
    written = m * n * (getattr(op, "batch", None) or 1) <= WRITABLE_ENTRIES
    prepare_other = prepare_qr if written else prepare_lsmr
    return _because(Choice.null_space, prepare_other(op, damp, options, full_rank))


def _because(choice: Choice, prepared: Any) -> Prepared:
    """Note why this method was taken."""
    prepared.method = choice.on(prepared.method)
    return prepared


def _small(op: SparseOp, damp: Tensor | None) -> bool:
    m, n = op.shape
    if op.device.type == "cpu" and (op.batch is not None or (damp is not None and damp.ndim == 2)):
        return min(m, n) <= SMALL_BATCHED and m * n <= SMALL_ENTRIES
    if damp is not None:
        m += n
    return m * n <= SMALL_ENTRIES


class PreparedAuto:
    """A choice between lsmr, cholesky and qr, made at the first solve."""

    def __init__(
        self, op: SparseOp, damp: Tensor | None, options: Options, full_rank: bool
    ) -> None:
        self._op, self._damp, self._options, self._full_rank = op, damp, options, full_rank
        self._chosen: Prepared | None = None
        self._steps = 0  # of lsmr, where it was chosen by a trial
        self._runs = 1.0  # of lsmr that an answer and what follows from it take
        self._lock = threading.RLock()

    def expect_derivatives(self) -> None:
        """Reckon with a solve for derivatives after each one: by a factor it is almost free."""
        self._runs = 2.0

    def factor(self) -> None:
        """Choose now and without a trial: what is kept for many solves should be a factor."""
        with self._lock:
            if self._steps:
                self._chosen, self._steps = None, 0
            self._settle()

    def _settle(self) -> Prepared:
        with self._lock:
            if self._chosen is None:
                self._chosen = self._direct()
            return self._chosen

    def _direct(self) -> Any:
        arguments = (self._op, self._damp, self._options, self._full_rank)
        _, density = predict(self._op.pattern)
        if density > DENSE_FILL and min(self._op.shape) > DENSE_ORDER:
            return _because(Choice.full, prepare_lsmr(*arguments))
        try:
            prepared = prepare_cholesky(*arguments)
            return _because(Choice.full_factor if prepared.full else Choice.factor, prepared)
        except NeedsDense:
            return instead_of_cholesky(*arguments)

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (B^H c + g) by the method chosen; choose it first."""
        with self._lock:
            if self._chosen is None and self._op.batch is None and c is not None:
                raw = self._trial(c, g)
                if raw is not None:
                    return raw
            if self._steps and self._dear(c if g is None else g):
                self._chosen, self._steps = None, 0
        chosen = self._settle()
        try:
            return chosen.solve(c, g)
        except NeedsDense:
            with self._lock:
                arguments = (self._op, self._damp, self._options, self._full_rank)
                self._chosen = instead_of_cholesky(*arguments)
            return self._chosen.solve(c, g)

    def loosely(self, tolerance: float) -> Prepared:
        """Return the method chosen, solving to a relative tolerance if it iterates."""
        chosen: Any = self._settle()
        return chosen.loosely(tolerance) if hasattr(chosen, "loosely") else self

    def _dear(self, rhs: Tensor | None) -> bool:
        """Whether so many columns cost more by lsmr than by a factor yet to be made."""
        assert rhs is not None
        price = Price(self._op, self._options.backend)
        return price.columns(rhs.shape[-1]) * self._steps > 2 * price.after(self._steps)

    def _trial(self, c: Tensor, g: Tensor | None) -> Raw | None:
        """Some iterations of lsmr on few right-hand sides; kept if they suffice.

        Full column rank is supposed first. Where it is not known it is probed afterwards: a
        problem that lsmr does not solve need not be probed, and is given up early.
        """
        if g is not None:
            return None
        price = Price(self._op, self._options.backend)
        share = price.columns(c.shape[-1])
        options = dataclasses.replace(self._options, callback=None, progress=False)
        trial = prepare_lsmr(self._op, self._damp, options, self._full_rank)
        tall = self._op.shape[0] >= self._op.shape[1] or self._damp is not None
        eps = torch.finfo(c.dtype).eps
        goal = min(max(eps, options.atol or 0.0), 0.1)
        factor = share * self._runs
        if trial.assumed_deficient:  # a probe for the rank, to eps^(1/2), on one column, follows
            factor += 0.5 * math.log(eps) / math.log(goal)
        least = factor * _fewest(self._op.shape, goal, self._damp is not None)
        if price.value < least and price.settle() < least:
            return None
        watch = _Watch(price, share, factor, goal)
        supposed = trial.supposing_full_rank() if tall else trial
        supposed = supposed.with_options(dataclasses.replace(options, callback=watch))
        try:
            raw = supposed.solve(c, None)
        except _TooSlow:
            return None
        if not _converged(raw.status):
            return None
        if tall:
            most = math.ceil(SLACK * price.most)
            most = most if options.maxiter is None else min(most, options.maxiter)
            trial = trial.with_options(dataclasses.replace(options, maxiter=most))
            if trial.deficient:
                if trial.undecided:
                    return None
                raw = trial.solve(c, None)
                if not _converged(raw.status):
                    return None
            elif trial.cond is None:
                trial.cond = supposed.cond
        self._chosen = _because(Choice.trial, trial.with_options(self._options))
        self._steps = int(raw.iterations.max())
        return raw

    def __getattr__(self, name: str) -> Any:
        if name in ("method", "rank", "cond", "deficient", "assumed_deficient"):
            return getattr(self._settle(), name, None)
        raise AttributeError(name)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return 0 if self._chosen is None else int(self._chosen.nbytes)


class _TooSlow(Exception):
    """The trial would not end in time."""


class _Watch:
    """Ends a trial that looks dearer than giving it up.

    The rate at which ||A^H r|| fell since the second iteration foretells the iterations that the
    answer takes; where the rate slows down, what it foretells rises from check to check, and
    is taken to rise GROWTH times as much again. While it rises as fast as iterations are made, what
    remains does not get less, and the trial ends at a smaller part of the price, HOPELESS. What
    converges in a thousand iterations may look like that for four hundred: it is waited for where
    a factor costs 1600 of them, and loses a factor of two at most where it costs less. An answer
    costs ``factor`` times as much as so many steps on one column, the probe for the rank
    included. Giving up costs the steps made, ``share`` each, and the price of a factor, which is
    worked out if that decides.
    """

    def __init__(self, price: Price, share: float, factor: float, goal: float) -> None:
        self._price, self._share, self._factor, self._goal = price, share, factor, goal
        self._first, self._last, self._hopeless = 0.0, math.inf, False

    def __call__(self, state: dict[str, Any]) -> None:
        count, size = state["iteration"], float(state["normal_residual_norm"].max())
        if count == 2:
            self._first = size
        if count % CHECK_EVERY or not self._first > 0 or not size > 0:
            return
        foretold = math.inf
        if size < self._first:
            goal = self._goal * max(float(state["residual_norm"].max()), self._first)
            steps = (count - 2) * math.log(goal / self._first) / math.log(size / self._first)
            rise = max(0.0, steps - self._last)
            foretold = steps + GROWTH * rise
            self._hopeless = rise >= CHECK_EVERY
            self._last = steps
        if self._dear(count, foretold) and (self._price.exact or self._dearer(count, foretold)):
            raise _TooSlow

    def _dearer(self, count: int, foretold: float) -> bool:
        self._price.settle()
        return self._dear(count, foretold)

    def _dear(self, count: int, foretold: float) -> bool:
        price, made = self._price.after(foretold), self._share * count
        most = HOPELESS * self._price.after(math.inf) if self._hopeless else SLACK * price
        return self._factor * foretold > price + made or made > most


def _fewest(shape: tuple[int, int], goal: float, damped: bool) -> float:
    """Iterations of lsmr below which no trial is hoped to end.

    A matrix with independent random entries has, with y = n / m, the condition number
    c = (1 + sqrt(y)) / (1 - sqrt(y)) (Marchenko and Pastur), and lsmr gains (c + 1) / (c - 1) =
    1 / sqrt(y) in each iteration. Few matrices in use are better conditioned: of 19 test
    problems, random or not, none took less than 0.88 of these iterations. Those that are, such as
    one near the identity, are the reason not to count on more than MOST_LIKELY.
    """
    small, large = sorted(shape)
    if damped or small == 0:
        return 2.0 * CHECK_EVERY
    gain = 0.5 * math.log(large / small)
    random = math.log(2 / goal) / gain if gain else math.inf
    return min(max(random, 2.0 * CHECK_EVERY), MOST_LIKELY)


def _converged(status: Tensor) -> bool:
    good = torch.zeros_like(status, dtype=torch.bool)
    for code in Status:
        if code.converged:
            good |= status == int(code)
    return bool(good.all())
