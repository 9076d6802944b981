"""funclsq's operators and solvers for lineax, and so for optimistix.

import funclsq.jax.lineax as fll
lx.linear_solve(fll.SparseOperator(A), b, fll.Cholesky())
optx.least_squares(f, optx.GaussNewton(rtol, atol, linear_solver=fll.QR()), y0)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

try:
    import equinox as eqx
    import lineax as lx  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "funclsq.jax.lineax needs lineax and equinox. Install them with pip install 'funclsq[jax]'."
    ) from error
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jsparse

from funclsq.jax.coloring import recover_values
from funclsq.jax.lstsq import solve
from funclsq.jax.sparse import Sparse
from funclsq.pattern import SparsityPattern
from funclsq.solution import Status

__all__ = ["LSMR", "QR", "SVD", "Cholesky", "SparseOperator"]


class SparseOperator(lx.AbstractLinearOperator):
    """A sparse matrix as a lineax operator: from ``Sparse``, BCOO or BCSR (concrete indices).

    Parameters
    ----------
    A : Sparse, BCOO or BCSR
        Unbatched.

    Examples
    --------
    >>> import jax.numpy as jnp, lineax as lx, funclsq as fl, funclsq.jax as flj
    >>> import funclsq.jax.lineax as fll
    >>> S = fl.SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2))
    >>> A = fll.SparseOperator(flj.Sparse(S, jnp.array([2.0, 1.0, 1.0])))
    >>> lx.linear_solve(A, jnp.array([2.0, 1.0, 3.0]), fll.Cholesky()).value
    Array([1., 2.], dtype=float32)
    """

    A: Sparse

    def __init__(self, A: Any) -> None:
        self.A = Sparse.from_bcoo(A) if isinstance(A, (jsparse.BCOO, jsparse.BCSR)) else A

    def mv(self, vector: Any) -> Any:
        """A v."""
        return self.A @ vector

    def as_matrix(self) -> Any:
        """The dense matrix."""
        return self.A.todense()

    def transpose(self) -> SparseOperator:
        """A^T."""
        return SparseOperator(self.A.T)

    def in_structure(self) -> Any:
        """Shape and dtype of v."""
        return jax.ShapeDtypeStruct((self.A.pattern.shape[1],), self.A.dtype)

    def out_structure(self) -> Any:
        """Shape and dtype of A v."""
        return jax.ShapeDtypeStruct((self.A.pattern.shape[0],), self.A.dtype)


def _flag(A: Sparse, test: Any) -> bool:
    return A.pattern.shape[0] == A.pattern.shape[1] and bool(test(A.pattern.row, A.pattern.col))


lx.linearise.register(SparseOperator)(lambda op: op)
lx.materialise.register(SparseOperator)(lambda op: op)
lx.conj.register(SparseOperator)(
    lambda op: SparseOperator(Sparse(op.A.pattern, jnp.conj(op.A.values)))
)
lx.diagonal.register(SparseOperator)(lambda op: jnp.diag(op.as_matrix()))
lx.tridiagonal.register(SparseOperator)(
    lambda op: tuple(jnp.diag(op.as_matrix(), k) for k in (0, -1, 1))
)
lx.is_diagonal.register(SparseOperator)(lambda op: _flag(op.A, lambda i, j: (i == j).all()))
lx.is_tridiagonal.register(SparseOperator)(
    lambda op: _flag(op.A, lambda i, j: (abs(i.astype(int) - j) <= 1).all())
)
lx.is_lower_triangular.register(SparseOperator)(lambda op: _flag(op.A, lambda i, j: (i >= j).all()))
lx.is_upper_triangular.register(SparseOperator)(lambda op: _flag(op.A, lambda i, j: (i <= j).all()))
for _unknown in (
    lx.is_symmetric,
    lx.has_unit_diagonal,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
):
    _unknown.register(SparseOperator)(lambda op: False)


@dataclasses.dataclass(frozen=True)
class _Side:
    """Pytree structure of one side of an operator, hashable."""

    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, structure: Any) -> _Side:
        leaves, tree = jax.tree.flatten(structure)
        return cls(tree, tuple((tuple(t.shape), np.dtype(t.dtype)) for t in leaves))

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.leaves)

    @property
    def dtype(self) -> Any:
        return jnp.result_type(*(dtype for _, dtype in self.leaves))

    def ravel(self, vector: Any) -> Any:
        leaves = jax.tree.leaves(vector)
        if [tuple(t.shape) for t in leaves] != [shape for shape, _ in self.leaves]:
            raise ValueError(
                "lineax solve: the vector must have the structure of the operator's output, "
                f"{[shape for shape, _ in self.leaves]}; got {[t.shape for t in leaves]}."
            )
        return jnp.concatenate([t.reshape(-1).astype(self.dtype) for t in leaves])

    def unravel(self, flat: Any) -> Any:
        out, start = [], 0
        for shape, dtype in self.leaves:
            stop = start + math.prod(shape)
            piece = flat[start:stop].reshape(shape)
            if not jnp.issubdtype(dtype, jnp.complexfloating):
                piece = jnp.real(piece)
            out.append(piece.astype(dtype))
            start = stop
        return jax.tree.unflatten(self.tree, out)


class _State(eqx.Module):
    """The matrix, sparse or dense, and the structures of its two sides."""

    A: Any
    inside: _Side = eqx.field(static=True)
    outside: _Side = eqx.field(static=True)


_CONDITION_LIMIT = getattr(lx.RESULTS, "conlim", lx.RESULTS.breakdown)  # lineax 0.0.8 lacks it


class _Solver(lx.AbstractLinearSolver):
    """What the solvers share; each minimises ||A x - b||, of least norm where that is not unique.

    Parameters
    ----------
    pattern : SparsityPattern, optional
        Sparsity of the operator, where it is not a :class:`SparseOperator` (a Jacobian, say): its
        entries are then recovered from one product per colour of the columns. No position may
        be there twice. For the damped operators of Levenberg-Marquardt give the pattern of the
        Jacobian. Entries outside the pattern are noticed, and make the solve fail.
    rank : {"auto", "full"} or int
        What is known of the rank; "full" makes derivatives cheaper.
    """

    pattern: SparsityPattern | None = eqx.field(static=True, default=None, kw_only=True)
    rank: str | int = eqx.field(static=True, default="auto", kw_only=True)

    _name = "auto"

    def _settings(self) -> dict[str, Any]:
        return {}

    def __check_init__(self) -> None:
        """Refuse a pattern from whose entries no values can be told apart."""
        pattern = self.pattern
        if pattern is not None and pattern.nnz_unique < pattern.nnz:
            raise ValueError(
                f"pattern: {pattern.nnz - pattern.nnz_unique} of its {pattern.nnz} positions are "
                "repeated; each entry of the operator must be there once."
            )

    def init(self, operator: Any, options: Any) -> _State:
        """Take the entries of the operator."""
        del options
        inside, outside = _Side.of(operator.in_structure()), _Side.of(operator.out_structure())
        A = _sparse(operator)
        if A is not None:
            return _State(A, inside, outside)
        if self.pattern is None:
            return _State(operator.as_matrix(), inside, outside)
        pattern = _fitted(self.pattern, (outside.size, inside.size))
        linear = lx.linearise(operator)

        def mv(v: Any) -> Any:
            return outside.ravel(linear.mv(inside.unravel(v)))

        return _State(Sparse(pattern, recover_values(mv, pattern, inside.dtype)), inside, outside)

    def compute(self, state: _State, vector: Any, options: Any) -> Any:
        """Solve; the status goes to lineax's results, the rest to the statistics."""
        del options
        b = state.outside.ravel(vector)
        dtype = jnp.result_type(state.A.dtype, b.dtype)
        A = jax.tree.map(lambda t: t.astype(dtype), state.A)
        sol = solve(A, b.astype(dtype), solver=self._name, rank=self.rank, **self._settings())
        result = lx.RESULTS.where(sol.converged, lx.RESULTS.successful, lx.RESULTS.breakdown)
        for status, code in (
            (Status.MAXITER, lx.RESULTS.max_steps_reached),
            (Status.STAGNATED, lx.RESULTS.stagnation),
            (Status.CONDITION_LIMIT, _CONDITION_LIMIT),
            (Status.NONFINITE, lx.RESULTS.singular),
        ):
            result = lx.RESULTS.where(sol.status == int(status), code, result)
        stats = {
            "num_steps": sol.iterations,
            "residual_norm": sol.residual_norm,
            "normal_residual_norm": sol.normal_residual_norm,
            "rank": sol.rank,
        }
        return state.inside.unravel(sol.x), result, stats

    def transpose(self, state: _State, options: Any) -> Any:
        """State of the transposed operator."""
        return _State(state.A.T, state.outside, state.inside), options

    def conj(self, state: _State, options: Any) -> Any:
        """State of the conjugated operator."""
        return eqx.tree_at(lambda s: s.A, state, jax.tree.map(jnp.conj, state.A)), options

    def assume_full_rank(self) -> bool:
        """Whether derivatives may leave out the terms of rank deficiency."""
        return self.rank == "full"

    def allow_dependent_columns(self, operator: Any) -> bool:
        """As older versions of lineax ask it."""
        return self.rank != "full" or operator.in_size() > operator.out_size()

    def allow_dependent_rows(self, operator: Any) -> bool:
        """As older versions of lineax ask it."""
        return self.rank != "full" or operator.out_size() > operator.in_size()


class Cholesky(_Solver):
    """Sparse Cholesky of A^H A, refined to the accuracy of QR; see :class:`_Solver`."""

    _name = "cholesky"


class QR(_Solver):
    """Dense rank-revealing QR; see :class:`_Solver`."""

    _name = "qr"


class SVD(_Solver):
    """Dense SVD; see :class:`_Solver`."""

    _name = "svd"


class LSMR(_Solver):
    """LSMR (Fong & Saunders 2011); see :class:`_Solver`.

    Parameters
    ----------
    atol, btol, conlim : float, optional
        Tolerances, as for :func:`funclsq.lstsq`.
    maxiter : int, optional
        Largest number of steps.
    """

    atol: float | None = eqx.field(static=True, default=None)
    btol: float | None = eqx.field(static=True, default=None)
    conlim: float | None = eqx.field(static=True, default=None)
    maxiter: int | None = eqx.field(static=True, default=None)

    _name = "lsmr"

    def _settings(self) -> dict[str, Any]:
        return {
            "atol": self.atol,
            "btol": self.btol,
            "conlim": self.conlim,
            "maxiter": self.maxiter,
        }


def _sparse(operator: Any) -> Sparse | None:
    """The matrix of a sparse operator, also one that is tagged or scaled."""
    if isinstance(operator, SparseOperator):
        return operator.A
    if isinstance(operator, lx.TaggedLinearOperator):
        return _sparse(operator.operator)
    factor: Any = None
    if isinstance(operator, lx.NegLinearOperator):
        factor = -1
    elif isinstance(operator, lx.MulLinearOperator):
        factor = operator.scalar
    elif isinstance(operator, lx.DivLinearOperator):
        factor = 1 / operator.scalar
    A = None if factor is None else _sparse(operator.operator)
    return None if A is None else Sparse(A.pattern, factor * A.values)


def _fitted(pattern: SparsityPattern, shape: tuple[int, int]) -> SparsityPattern:
    """The pattern, with damping rows below where the operator has them; of A^T where it fits."""
    if pattern.shape == shape:
        return pattern
    if _rows_fit(pattern, shape[::-1]):
        return _fitted(pattern, shape[::-1]).T
    m, n = pattern.shape
    if _rows_fit(pattern, shape):
        found = pattern.cache.get("with diagonal")
        if found is None:
            diagonal = np.arange(n)
            found = SparsityPattern(
                np.concatenate([pattern.row, m + diagonal]),
                np.concatenate([pattern.col, diagonal]),
                shape,
            )
            found = pattern.cache.setdefault("with diagonal", found)
        return found
    raise ValueError(
        f"pattern must have the shape of the operator, {shape}, or of the Jacobian that a damped "
        f"one has on top; got {pattern.shape}."
    )


def _rows_fit(pattern: SparsityPattern, shape: tuple[int, int]) -> bool:
    m, n = pattern.shape
    return shape in ((m, n), (m + n, n))
