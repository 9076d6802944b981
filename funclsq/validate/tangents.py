"""Directions to differentiate along: random, and such that the rank of A can stay what it is."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse.linalg import LinearOperator, lsmr

from funclsq.validate.problem import Arrays, Problem, stacked_svd

__all__ = ["Directions", "directions"]

_ON_RANK = 1e-14  # how far off the matrices of fixed rank a direction may lead, relatively


@dataclasses.dataclass(frozen=True)
class Directions:
    """Where the derivatives are taken: a tangent for every input and a cotangent for x.

    Parameters
    ----------
    tangents : dict of str to array
        One for each of :attr:`Problem.inputs`, of the same shape.
    cotangent : array, shape as x
        ``x_bar``; every gradient is that of ``Re <x_bar, x>``.
    """

    tangents: Arrays
    cotangent: np.ndarray


def directions(
    problem: Problem, rng: np.random.Generator, cotangent: np.ndarray | None = None
) -> Directions:
    """Return random directions that respect what the problem is differentiable along.

    Those in A keep its rank; weights and damping of 0 stay 0 where leaving 0 would change the
    rank. Each is of the size of what it changes, column by column for A.

    Parameters
    ----------
    problem : Problem
        With its rank known.
    rng : numpy.random.Generator
        Source of the randomness.
    cotangent : array, optional
        Used instead of a random one.
    """

    def normal(shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        real = rng.standard_normal(shape)
        return real + 1j * rng.standard_normal(shape) if np.iscomplexobj(like) else real

    tangents = {}
    for key, a in problem.inputs.items():
        if key == "A":
            tangents[key] = normal(a.shape, a) * _column_sizes(problem)
        elif key in ("weights", "damp"):
            move = normal(a.shape, a) / 2
            stuck = key == "damp" or not problem.full_column_rank
            tangents[key] = move * (a if stuck else np.where(a == 0, _rms(a), a))
        else:
            tangents[key] = normal(a.shape, a) * _rms(a)
    if not problem.full_column_rank:
        tangents["A"] = _keeping_rank(problem, tangents["A"])
    if cotangent is None:
        cotangent = normal(problem.x_shape, np.zeros(1, complex if problem.complex else float))
    return Directions(tangents, cotangent)


def _keeping_rank(problem: Problem, values: np.ndarray) -> np.ndarray:
    """Project a change V of the entries onto those with (I - M M^+) [W^(1/2) V; 0] (I - M^+ M) = 0.

    With ``M = [W^(1/2) A; D]`` these are the directions in which its rank can stay (the tangent
    space of the matrices of fixed rank), here among the changes of stored entries alone. Where
    A is large, or the projection is not accurate, rows and columns are scaled instead: that
    keeps the rank and the pattern too, in fewer directions.
    """
    if problem.small:
        constraints = [_off_rank(problem, part) for _, part in problem.column_problems()]
        for _ in range(3):  # each pass removes the rounding of the one before
            for off in constraints:
                values = values - lsmr(off, off @ values, 0, 0, 0, 0, maxiter=2000)[0]
        size = np.linalg.norm(values)
        if all(np.linalg.norm(off @ values) <= _ON_RANK * size for off in constraints):
            return values
    m, n = problem.shape
    rows, columns = np.sin(1.0 + np.arange(m)), np.cos(2.0 + np.arange(n))
    return problem.inputs["A"] * (rows[problem.row] + columns[problem.col])


def _off_rank(problem: Problem, part: Problem) -> LinearOperator:
    """Return the map V -> (I - M M^+) [W^(1/2) V; 0] N on stored entries, N spanning null(M)."""
    m, w = problem.shape[0], part.weights()
    everywhere = np.where(w > 0, w, 1.0)  # a row of weight 0 must stay in the row space too,
    inputs = part.inputs | {"weights": everywhere[:, 0]}
    u, s, vh = stacked_svd(dataclasses.replace(part, inputs=inputs))
    if (s > s[:1] * np.finfo(problem.dtype).eps ** 0.5).sum() > problem.rank:  # unless outside
        u, s, vh = stacked_svd(part)
        everywhere = w
    root = np.sqrt(everywhere)
    u, null = u[:, : problem.rank], vh[problem.rank :].conj().T

    def project(y: np.ndarray) -> np.ndarray:
        return y - u @ (u[:m].conj().T @ y[:m])

    def apply(v: np.ndarray) -> np.ndarray:
        y = np.zeros((u.shape[0], null.shape[1]), u.dtype)
        y[:m] = root * (problem.scattered(v.ravel()) @ null)
        return project(y).ravel()

    def adjoint(y: np.ndarray) -> np.ndarray:
        y = y.reshape(u.shape[0], null.shape[1])
        y = root * (y - u @ (u.conj().T @ y))[:m]
        return np.einsum("ej,ej->e", y[problem.row], null.conj()[problem.col])

    size = (u.shape[0] * null.shape[1], problem.row.size)
    return LinearOperator(size, matvec=apply, rmatvec=adjoint, dtype=u.dtype)


def _rms(a: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(np.abs(a) ** 2))) if a.size else 0.0
    return size or 1.0


def _column_sizes(problem: Problem) -> np.ndarray:
    """Root mean square of the entries in each entry's column (of all entries, where that is 0)."""
    a, n = problem.inputs["A"], problem.shape[1]
    count = np.bincount(problem.col, minlength=n)
    total = np.bincount(problem.col, np.abs(a) ** 2, minlength=n)
    sizes = np.sqrt(total / np.maximum(count, 1))
    return np.where(sizes == 0, _rms(a), sizes)[problem.col]
