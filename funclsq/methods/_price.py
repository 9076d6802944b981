"""What a direct solve costs, in iterations of lsmr: the unit in which ``auto`` decides.

Both costs are sums over the sizes of the problem, with coefficients fitted to 32 problems (grids,
bundle adjustment, regression, pose graphs, tomography, random patterns) on one thread of an x86-64
server of 2023, where their ratio is right within a factor of 1.6 (iterations by compiled loops: 24
problems, within 0.8 to 1.3 of their time, on another server). Only the ratio matters. With the
entries of A^H A, its order and the entries of A in the sum, neither the products that A^H A takes
nor the entries of its factor explain any more.

A dense factor is in single precision where A is well conditioned, in double where it is not, found
after a factor in single has been made. Which one it will be tells the number of iterations that
lsmr takes, about (1/2) log(2 / eps) cond = 18 cond.
"""

from __future__ import annotations

from funclsq.backends import dense
from funclsq.methods._core import EASIEST
from funclsq.methods._dense_rows import sparse_part
from funclsq.methods._gram import gram_of, predict
from funclsq.methods._layout import analysis
from funclsq.methods._normal import DENSE_FILL, DENSE_ORDER
from funclsq.operators import SparseOp

__all__ = ["HARD", "Price"]

SPARSE_FACTOR = 80.0  # iterations, where the factor has not been laid out: 40 to 180 were measured
HARD = 18 * EASIEST  # iterations from which on a dense factor is one in double precision
_LARGEST = 1e4

# Nanoseconds.
_STEP = 3e4, 5.4, 0.83  # of lsmr: once, per row and column, per entry
_STEP_IN_ONE_PASS = 1.2e4, 3.5, 1.4  # the same where loops are compiled for it (see passes)
_BLOCK, _BLOCK_SIZE, _BLOCK_COLUMN, _BLOCK_ENTRY = 2.2e5, 11.5, 3.8, 2.0  # the same on k columns
_BASE, _ORDER, _ENTRY = 1.6e6, 1200.0, 100.0  # of a direct solve: once, per unknown, per entry
_NORMAL_ENTRY = 13.5  # per entry of A^H A
_FLOP = 0.09  # of a sparse factor
_SINGLE_FLOP, _DENSE_FLOP = 0.009, 0.048  # of a dense one: single precision, double after single


class Price:
    """Iterations of lsmr on one column that cost as much as a factorisation and a solve.

    Attributes
    ----------
    value : float
        For a matrix on which lsmr takes fewer than HARD iterations.
    most : float
        For any other.
    exact : bool
        Whether the size of the factor is known, not supposed.
    """

    def __init__(self, op: SparseOp, name: str | None) -> None:
        m, n = op.shape
        self._pattern = op.pattern if m >= n else op.pattern.T
        self._size, self._count = m + n, op.pattern.nnz_unique
        once, per_size, per_entry = _STEP if op.passes() is None else _STEP_IN_ONE_PASS
        self._step = once + per_size * self._size + per_entry * self._count
        self._dtype = "complex128" if op.dtype.is_complex else "float64"
        self._name = name
        self.exact = True
        order = min(m, n)
        self._normal, density = predict(op.pattern)  # entries of A^H A
        if density > DENSE_FILL:
            if order <= DENSE_ORDER:
                self._dense(order, order**3 / 3)
            else:
                self.value = self.most = _LARGEST
            return
        self.value, self.most, self.exact = SPARSE_FACTOR, SPARSE_FACTOR, False
        if self._pattern.cache.get("price_known"):
            self.settle()

    def columns(self, k: int) -> float:
        """Cost of a step of lsmr on k columns, to that on one.

        Right within a factor of 1.8 for 15 of the problems and 2 to 32 columns.
        """
        if k <= 1:
            return 1.0
        each = _BLOCK_SIZE + _BLOCK_COLUMN * k  # of a row or column
        return (_BLOCK + each * self._size + _BLOCK_ENTRY * self._count) / self._step

    def after(self, steps: float) -> float:
        """The price where lsmr takes so many iterations."""
        return self.value if steps < HARD else self.most

    def settle(self) -> float:
        """Lay the factor out (once per pattern) where the backend tells its size."""
        if not self.exact:
            gram = gram_of(sparse_part(self._pattern))
            self._normal = gram.nnz  # and not an estimate, so that every call reckons alike
            symbolic = analysis(gram, self._name, self._dtype, None)
            work = getattr(symbolic, "work", None)
            if isinstance(symbolic, dense.Symbolic):
                self._dense(min(self._pattern.shape), symbolic.work[1])
            elif work is not None:
                self.value = self.most = self._in_steps(_FLOP * work[1])
            self.exact = True
            self._pattern.cache["price_known"] = True
        return self.value

    def _dense(self, order: int, flops: float) -> None:
        single = order >= dense.SINGLE_ORDER
        self.most = self._in_steps(_DENSE_FLOP * flops)
        self.value = self._in_steps(_SINGLE_FLOP * flops) if single else self.most

    def _in_steps(self, factor: float) -> float:
        order = min(self._pattern.shape)
        besides = _BASE + _ORDER * order + _ENTRY * self._count + _NORMAL_ENTRY * self._normal
        return min((factor + besides) / self._step, _LARGEST)
