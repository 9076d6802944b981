"""solver="auto": the method that suits the matrix, by measurements (docs: choosing a solver).

In order:

1. no entries at hand (matrix-free)                         lsmr
2. dense, or small enough to be written out                 qr   (rank-revealing, batched)
   (a batch of sparse ones with more than 8 columns is not: sparse products and small
   factors of A^H A take 0.1 to 0.9 of its time there)
3. sparse on a GPU                                          lsmr
4. one right-hand side: at most 50 iterations of lsmr       lsmr, if they converge
5. A^H A (or A A^H) too full for a sparse factor and large  lsmr
6. else                                                     cholesky
7. cholesky finds a null space too large for it             qr while A can be written out, else lsmr
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor

from funclsq.methods._protocol import Options, Prepared, Raw
from funclsq.methods.cholesky import NeedsDense, predict
from funclsq.methods.cholesky import prepare as prepare_cholesky
from funclsq.methods.lsmr import prepare as prepare_lsmr
from funclsq.methods.qr import prepare as prepare_qr
from funclsq.operators import DenseOp, Operator, SparseOp
from funclsq.solution import Status

__all__ = ["PreparedAuto", "prepare"]

SMALL_ENTRIES = 1 << 14  # m n up to which one sparse matrix is written out for QR
SMALL_BATCHED = 8  # min(m, n) up to which each matrix of a sparse batch is
WRITABLE_ENTRIES = 1 << 25  # m n up to which a rank-deficient one is
TRIAL_ITERATIONS = 50
DENSE_GRAM = 0.15
LARGE_GRAM = 8192


def prepare(op: Operator, damp: Tensor | None, options: Options, full_rank: bool) -> Prepared:
    """Choose what can be chosen before a right-hand side is seen."""
    if isinstance(op, DenseOp) or (isinstance(op, SparseOp) and _small(op, damp)):
        return prepare_qr(op, damp, options, full_rank)
    if isinstance(options.rank, int) and options.rank < min(op.shape):
        return prepare_qr(op, damp, options, full_rank)
    if not isinstance(op, SparseOp) or op.device.type != "cpu":
        return prepare_lsmr(op, damp, options, full_rank)
    return PreparedAuto(op, damp, options, full_rank)


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
        self._lock = threading.RLock()

    def _settle(self) -> Prepared:
        with self._lock:
            if self._chosen is None:
                self._chosen = self._direct()
            return self._chosen

    def _direct(self) -> Any:
        arguments = (self._op, self._damp, self._options, self._full_rank)
        _, density = predict(self._op.pattern)
        if density > DENSE_GRAM and min(self._op.shape) > LARGE_GRAM:
            return prepare_lsmr(*arguments)
        try:
            return prepare_cholesky(*arguments)
        except NeedsDense:
            return self._dense()

    def _dense(self) -> Any:
        arguments = (self._op, self._damp, self._options, self._full_rank)
        m, n = self._op.shape
        if m * n * (self._op.batch or 1) <= WRITABLE_ENTRIES:
            return prepare_qr(*arguments)
        return prepare_lsmr(*arguments)

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (B^H c + g) by the method chosen; choose it first."""
        with self._lock:
            if self._chosen is None and self._op.batch is None and c is not None:
                raw = self._trial(c, g)
                if raw is not None:
                    return raw
        chosen = self._settle()
        try:
            return chosen.solve(c, g)
        except NeedsDense:
            with self._lock:
                self._chosen = self._dense()
            return self._chosen.solve(c, g)

    def _trial(self, c: Tensor, g: Tensor | None) -> Raw | None:
        """A few iterations of lsmr on one right-hand side; kept if they suffice."""
        if c.shape[-1] != 1 or g is not None:
            return None
        limit = TRIAL_ITERATIONS
        if self._options.maxiter is not None:
            limit = min(limit, self._options.maxiter)
        options = dataclasses.replace(self._options, maxiter=limit, callback=None, progress=False)
        trial = prepare_lsmr(self._op, self._damp, options, self._full_rank)
        raw = trial.solve(c, None)
        if not _converged(raw.status):
            return None
        self._chosen = trial.with_options(self._options)
        return raw

    def __getattr__(self, name: str) -> Any:
        if name in ("method", "rank", "cond", "deficient", "assumed_deficient"):
            return getattr(self._settle(), name, None)
        raise AttributeError(name)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return 0 if self._chosen is None else int(self._chosen.nbytes)


def _converged(status: Tensor) -> bool:
    good = torch.zeros_like(status, dtype=torch.bool)
    for code in Status:
        if code.converged:
            good |= status == int(code)
    return bool(good.all())
