"""One least-squares problem as plain float64 (or complex128) NumPy data.

Everything in this package that judges funclsq starts from here and uses none of its code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse

__all__ = ["DENSE_LIMIT", "Arrays", "Problem", "stacked_svd", "turned"]

Arrays = dict[str, np.ndarray]
DENSE_LIMIT = 4_000_000  # entries of A up to which the dense oracles run


@dataclasses.dataclass(frozen=True)
class Problem:
    """min ||W^(1/2)(A x - b)||^2 + ||D (x - x0)||^2, the minimiser nearest x0, rank held fixed.

    Parameters
    ----------
    row, col : int array, shape (nnz,)
        Where the entries of A are stored; repeated entries are summed.
    inputs : dict of str to array
        ``A``: (nnz,) values; ``b``: (m,) or (m, k); and, where given, ``damp``: () or (n,),
        ``weights``: (m,) or (m, k), ``x0``: (n,) or (n, k).
    shape : tuple of int
        ``(m, n)``.
    rank : int
        Rank of ``[W^(1/2) A; D]``; -1 before it is known.
    dtype : numpy.dtype
        Precision that the candidates work in; the data here are always double.
    dense : bool
        Whether A came as a dense matrix (its entries are all of them, in row order).
    matrix : array, shape (m, n), optional
        Stands for A in place of its entries where A was moved onto the matrices of fixed rank,
        which most patterns cannot express.
    """

    row: np.ndarray
    col: np.ndarray
    inputs: Arrays
    shape: tuple[int, int]
    rank: int
    dtype: np.dtype
    dense: bool = False
    matrix: np.ndarray | None = None

    @property
    def complex(self) -> bool:
        """Whether A, b or x0 is complex."""
        return any(np.iscomplexobj(a) for a in self.inputs.values())

    @property
    def vector(self) -> bool:
        """Whether b, and so x, is one vector."""
        return self.inputs["b"].ndim == 1

    @property
    def columns(self) -> int:
        """Number of right-hand sides."""
        return 1 if self.vector else self.inputs["b"].shape[1]

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of x."""
        return (self.shape[1], *self.inputs["b"].shape[1:])

    @property
    def full_column_rank(self) -> bool:
        """Whether the minimiser is unique."""
        return self.rank == self.shape[1]

    def scattered(self, values: np.ndarray) -> Any:
        """Return the matrix with these entries: an array where it is small, else SciPy CSR."""
        if not self.small and values.dtype != object:
            return scipy.sparse.coo_array((values, (self.row, self.col)), self.shape).tocsr()
        dense = np.zeros(self.shape, dtype=values.dtype)
        np.add.at(dense, (self.row, self.col), values)
        return dense

    def pattern(self) -> Any:
        """Return the matrix with every entry 0."""
        return self.scattered(np.zeros(self.row.size))

    def toarray(self) -> np.ndarray:
        """Return A as a dense matrix."""
        if self.matrix is not None:
            return self.matrix
        return self._full(self.inputs["A"])

    def _full(self, values: np.ndarray) -> np.ndarray:
        matrix = self.scattered(values)
        return matrix if isinstance(matrix, np.ndarray) else matrix.toarray()

    def damping(self) -> np.ndarray:
        """Return the diagonal of D, shape (n,)."""
        return np.broadcast_to(self.inputs.get("damp", 0.0), self.shape[1:]) * 1.0

    def weights(self) -> np.ndarray:
        """Return the diagonal of W, shape (m, 1) or, where it differs by column, (m, k)."""
        w = self.inputs.get("weights", np.ones(self.shape[0]))
        return w[:, None] if w.ndim == 1 else w

    def reversed(self) -> Problem:
        """Return the problem with its rows and columns in opposite order; A's entries stay."""
        m, n = self.shape
        return dataclasses.replace(
            self,
            row=m - 1 - self.row,
            col=n - 1 - self.col,
            inputs={key: turned(key, a) for key, a in self.inputs.items()},
            matrix=None if self.matrix is None else self.matrix[::-1, ::-1],
        )

    def moved(self, change: Mapping[str, np.ndarray], t: Any = 1.0) -> Problem:
        """Return the problem at ``inputs + t * change``."""
        inputs = {
            key: np.asarray(a + t * change[key]) if key in change else a
            for key, a in self.inputs.items()
        }
        matrix = self.matrix
        if matrix is not None and "A" in change:
            matrix = matrix + t * self._full(change["A"])
        return dataclasses.replace(self, inputs=inputs, matrix=matrix)

    def column_scale(self) -> np.ndarray:
        """Return the scaling S that makes the columns of [A; D] S unit vectors, shape (n,).

        All ones where A has no full column rank: there the scaled solution would be another.
        """
        if not self.full_column_rank:
            return np.ones(self.shape[1])
        A = self.scattered(self.inputs["A"])
        squares = np.asarray((abs(A) ** 2).sum(axis=0)).ravel() + self.damping() ** 2
        return 1 / np.sqrt(np.where(squares > 0, squares, 1.0))

    def column_problems(self) -> list[tuple[slice, Problem]]:
        """Split into problems that share one matrix: by column where the weights differ so."""
        if self.inputs.get("weights", np.ones(0)).ndim < 2:
            return [(slice(None), self)]
        each = [slice(j, j + 1) for j in range(self.columns)]
        return [(s, dataclasses.replace(self, inputs=self.only(s, self.inputs))) for s in each]

    @property
    def small(self) -> bool:
        """Whether the dense oracles can take it."""
        return self.shape[0] * self.shape[1] <= DENSE_LIMIT

    def only(self, columns: slice, arrays: Arrays) -> Arrays:
        """Return the share of some columns of b in arrays that are shaped like the inputs."""
        out = dict(arrays)
        for key in {"b", "x0"} & arrays.keys():
            out[key] = self.only_x(columns, arrays[key])
        if "weights" in out and out["weights"].ndim == 2:
            out["weights"] = out["weights"][:, columns.start]
        return out

    def only_x(self, columns: slice, x: np.ndarray) -> np.ndarray:
        """Return some columns of an array of x's shape."""
        return x if x.ndim == 1 else x[:, columns]

    def perturbed(self, rng: np.random.Generator, size: float) -> Problem:
        """Return the problem with every number changed by a random relative amount of ``size``.

        The oracles hold the rank fixed, so a change of the entries acts as its projection onto
        the matrices of that rank.
        """
        change = {key: a * size * rng.standard_normal(a.shape) for key, a in self.inputs.items()}
        return self.moved(change)


def turned(key: str, a: np.ndarray) -> np.ndarray:
    """Return what belongs to the rows or columns of A, b or x, in opposite order."""
    return a if key == "A" or a.ndim == 0 else a[::-1].copy()


def stacked_svd(
    problem: Problem, nudge: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U, s, V^H of [W^(1/2) A; D] S, V square; weights the same for all columns.

    With a ``nudge``, (m + n, n), of that matrix changed by the nudge times its column norms.
    """
    scaled = problem.column_scale()
    stacked = np.vstack(
        [
            np.sqrt(problem.weights()) * problem.toarray() * scaled,
            np.diag(problem.damping() * scaled),
        ]
    )
    if nudge is not None:
        stacked = stacked + nudge * np.linalg.norm(stacked, axis=0)
    u, s, vh = np.linalg.svd(stacked, full_matrices=False)
    return u, s, vh
