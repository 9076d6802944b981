"""What a direct solve costs, in iterations of lsmr: the unit in which ``auto`` decides.

Both costs are sums over the sizes of the problem, with coefficients fitted to 20 problems (grids,
bundle adjustment, regression, pose graphs, random patterns) on one thread of an x86-64 server of
2023, where their ratio is right within a factor of 2. Only the ratio matters.
"""

from __future__ import annotations

from funclsq.backends import dense
from funclsq.methods._dense_rows import sparse_part
from funclsq.methods._gram import gram_of, predict
from funclsq.methods._layout import analysis
from funclsq.methods._normal import DENSE_FILL, DENSE_ORDER
from funclsq.operators import SparseOp

__all__ = ["Price"]

SPARSE_FACTOR = 60.0  # iterations, where the factor has not been laid out: 30 to 90 were measured
_LARGEST = 1e4

# Nanoseconds.
_STEP, _STEP_SIZE, _STEP_ENTRY = 1.1e5, 8.0, 2.0  # of lsmr: once, per row and column, per entry
_BASE, _SIZE, _ENTRY = 2.5e6, 600.0, 77.0  # of a direct solve, besides its factor
_FLOP, _FACTOR_ENTRY = 0.09, 41.0  # of a sparse factor and solves with it
_DENSE_FLOP, _PAIR = 0.08, 6.0  # of a dense one; per pair of entries in a row, to form A^H A


class Price:
    """Iterations of lsmr on one column that cost as much as a factorisation and a solve.

    Attributes
    ----------
    exact : bool
        Whether the size of the factor is known, not supposed.
    """

    def __init__(self, op: SparseOp, name: str | None) -> None:
        m, n = op.shape
        self._pattern = op.pattern if m >= n else op.pattern.T
        self._step = _STEP + _STEP_SIZE * (m + n) + _STEP_ENTRY * op.pattern.nnz_unique
        self._dtype = "complex128" if op.dtype.is_complex else "float64"
        self._name = name
        self.exact = True
        order = min(m, n)
        if predict(op.pattern)[1] > DENSE_FILL:
            pairs = op.pattern.nnz_unique**2 / max(m, n)
            if order <= DENSE_ORDER:
                self.value = self._in_steps(_PAIR * pairs + _DENSE_FLOP * order**3 / 3)
            else:
                self.value = _LARGEST
            return
        self.value, self.exact = SPARSE_FACTOR, False
        if self._pattern.cache.get("price_known"):
            self.settle()

    def settle(self) -> float:
        """Lay the factor out (once per pattern) where the backend tells its size."""
        if not self.exact:
            gram = gram_of(sparse_part(self._pattern))
            symbolic = analysis(gram, self._name, self._dtype, None)
            work = getattr(symbolic, "work", None)
            if isinstance(symbolic, dense.Symbolic):
                self.value = self._in_steps(_DENSE_FLOP * symbolic.work[1])
            elif work is not None:
                entries, flops = work
                self.value = self._in_steps(_FLOP * flops + _FACTOR_ENTRY * entries)
            self.exact = True
            self._pattern.cache["price_known"] = True
        return self.value

    def _in_steps(self, factor: float) -> float:
        besides = _BASE + _SIZE * sum(self._pattern.shape) + _ENTRY * self._pattern.nnz_unique
        return min((factor + besides) / self._step, _LARGEST)
