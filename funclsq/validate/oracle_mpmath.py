"""Oracle in 80 digits: x from the normal equations, derivatives by differences of it.

At 80 digits a central difference with step 1e-25 is good to 30 and more, so the jvp is the
difference of x and the Hessian-vector product that of the gradient; only the gradient is a
formula, and its product with the direction is held against the jvp to 20 digits before anything
is returned. G is inverted, or its eigendecomposition truncated at the known rank. For small
problems: the cost is a few dozen n x n decompositions in Python.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mpmath
import numpy as np

from funclsq.validate.closed_form import gradient
from funclsq.validate.problem import Arrays, Problem
from funclsq.validate.tangents import Directions

__all__ = ["MP_LIMIT", "by_mpmath"]

MP_LIMIT = 600  # entries of A up to which this is quick enough
_DIGITS = 80
_STEP = "1e-25"
_AGREE = "1e-20"


def by_mpmath(problem: Problem, d: Directions) -> Arrays:
    """Return x and its derivatives, computed in 80 digits and rounded to float64.

    Parameters
    ----------
    problem : Problem
        With known rank and at most ``MP_LIMIT`` entries in A.
    d : Directions
        Along what.

    Returns
    -------
    dict
        As :func:`funclsq.validate.closed_form.evaluate` returns.

    Raises
    ------
    ArithmeticError
        If the gradient disagrees with the differences of x, so that the oracle cannot be trusted.
    """
    with mpmath.workdps(_DIGITS):
        h = mpmath.mpf(_STEP)
        exact = Problem(
            problem.row,
            problem.col,
            {key: _exact(a) for key, a in problem.inputs.items()},
            problem.shape,
            problem.rank,
            problem.dtype,
        )
        if not problem.full_column_rank:  # start on the matrices of this rank, in 80 digits too
            exact = dataclasses.replace(exact, matrix=_Maps(exact.column_problems()[0][1]).A)
        tangents = {key: _exact(a) for key, a in d.tangents.items()}
        x_bar = _exact(d.cotangent)

        def at(along: Arrays, t: Any) -> Arrays:
            return gradient(exact.moved(along, t), x_bar, _Maps)

        found = at({}, 0)
        for key, along in tangents.items():
            up, down = at({key: along}, h), at({key: along}, -h)
            found[f"jvp {key}"] = x_dot = (up["x"] - down["x"]) / (2 * h)
            left, right = _product(x_bar, x_dot), _product(found[f"vjp {key}"], along)
            size = _norm(x_bar) * (_norm(x_dot) + _norm(along))
            if abs(left - right) > mpmath.mpf(_AGREE) * size:
                raise ArithmeticError(
                    f"validate: in 80 digits the gradient in {key} disagrees with differences of "
                    f"x by {mpmath.nstr(abs(left - right), 3)}"
                )
        up, down = at(tangents, h), at(tangents, -h)
        for key in tangents:
            found[f"hvp {key}"] = (up[f"vjp {key}"] - down[f"vjp {key}"]) / (2 * h)
    return {name: _rounded(np.asarray(a, dtype=object)) for name, a in found.items()}


class _Maps:
    """The maps of the closed form from G = A^H W A + D^2 and its eigendecomposition."""

    def __init__(self, problem: Problem) -> None:
        A = problem.toarray()
        self._w, d = problem.weights(), problem.damping()
        G = A.conj().T @ (self._w * A) + np.diag(d * d)
        n, rank = G.shape[0], problem.rank
        self._p = np.full((n, n), mpmath.mpf(0))
        if rank == n:
            inverse = mpmath.inverse(_matrix(G)) if n else G
            self._e = _array(inverse, (n, n))
            self._full = True
        else:
            values, vectors = mpmath.eighe(_matrix(G)) if n else ([], G)
            v = _array(vectors, (n, n))[:, n - rank :]
            values = np.array([values[j] for j in range(n - rank, n)], dtype=object)
            self._p = v @ v.conj().T
            self._e = (v / values) @ v.conj().T
            self._full = False
            A = A @ self._p
        self.A = A

    def T(self, c: np.ndarray) -> np.ndarray:
        """Return G^+ A^H W c."""
        return self._e @ (self.A.conj().T @ (self._w * c))

    def Th(self, g: np.ndarray) -> np.ndarray:
        """Return W A G^+ g."""
        return self._w * (self.A @ (self._e @ g))

    def E(self, g: np.ndarray) -> np.ndarray:
        """Return G^+ g."""
        return self._e @ g

    def N(self, g: np.ndarray) -> np.ndarray:
        """Return g - G^+ G g."""
        return 0 * g if self._full else g - self._p @ g


def _exact(a: np.ndarray) -> np.ndarray:
    make = mpmath.mpc if np.iscomplexobj(a) else mpmath.mpf
    out = np.empty(a.shape, dtype=object)
    out[...] = np.array([make(v) for v in a.ravel().tolist()], dtype=object).reshape(a.shape)
    return out


def _matrix(a: np.ndarray) -> mpmath.matrix:
    return mpmath.matrix(a.tolist())


def _array(a: Any, shape: tuple[int, int]) -> np.ndarray:
    out = np.empty(shape, dtype=object)
    for i in range(shape[0]):
        for j in range(shape[1]):
            out[i, j] = a[i, j]
    return out


def _product(a: np.ndarray, b: np.ndarray) -> Any:
    return mpmath.fsum((mpmath.conj(p) * q).real for p, q in zip(a.flat, b.flat, strict=True))


def _norm(a: np.ndarray) -> Any:
    return mpmath.sqrt(mpmath.fsum(abs(v) ** 2 for v in a.flat))


def _rounded(a: np.ndarray) -> np.ndarray:
    parts = [complex(v) if isinstance(v, mpmath.mpc) else float(v) for v in a.flat]
    return np.array(parts, dtype=None if parts else float).reshape(a.shape)
