"""Oracle: central differences of x alone, with their own error estimate; no derivative formula.

x comes from LAPACK: a QR factorisation for full column rank, otherwise an SVD truncated at the
known rank, which makes x smooth in every entry of A. Along a line in the inputs it is
differentiated by :func:`scipy.differentiate.derivative` (8th order, steps reduced until its
error estimate is met), which gives the jvp as it stands. A gradient is checked by its products
with directions, ``Re <x_bar, x_dot>``: every unit vector for a small problem, a few random
directions otherwise. A Hessian-vector product is checked by its products with directions too,
as a derivative of a derivative; of larger problems it is the derivative of the closed form's
gradient, which the differences of x have checked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
from scipy.differentiate import derivative

from funclsq.validate.closed_form import gradient
from funclsq.validate.estimate import Estimate
from funclsq.validate.maps_dense import DenseMaps
from funclsq.validate.maps_sparse import SparseMaps
from funclsq.validate.problem import Arrays, Problem, stacked_svd
from funclsq.validate.spectrum import extremes, norm_estimate
from funclsq.validate.tangents import Directions

__all__ = ["differences"]

_UNITS = 100  # inputs of at most this size are differenced in every entry
_ROUNDING = 16 * np.finfo(float).eps  # of x, relative
_SECOND = 200_000  # m n^2 up to which second differences are affordable


def differences(
    problem: Problem,
    d: Directions,
    probes: list[Directions] | None = None,
    large: SparseMaps | None = None,
) -> dict[str, Estimate]:
    """Return x, and its derivatives as central differences with error estimates.

    Parameters
    ----------
    problem : Problem
        With known rank.
    d : Directions
        Along what.
    probes : list of Directions, optional
        Further directions for the products with gradients.
    large : SparseMaps, optional
        What solves large problems; given where its factor is to be shared.

    Returns
    -------
    dict of str to Estimate
        ``x``, ``jvp k``, ``vjp k``; and ``hvp k`` for small problems.
    """
    line = _Lines(problem, d.cotangent, large or SparseMaps())
    m, n = problem.shape
    out = {"x": Estimate(line.x({}, 0.0))}
    for key, a in problem.inputs.items():
        x_dot, error = line.derivative({key: d.tangents[key]})
        out[f"jvp {key}"] = Estimate(x_dot, error)
        if a.size <= _UNITS and not line.stuck(key):
            out[f"vjp {key}"] = _in_every_entry(line, key, a)
        else:
            tried = [each.tangents[key] for each in (d, *(probes or ()))]
            slopes, error = line.slopes([{key: t} for t in tried])
            out[f"vjp {key}"] = Estimate(slopes, error, np.stack(tried))
    if m * n * n <= _SECOND and probes:
        tried = [{key: probes[0].tangents[key]} for key in problem.inputs]
        slopes, error = line.mixed(d.tangents, tried)
        for (key, probe), slope in zip(probes[0].tangents.items(), slopes, strict=True):
            out[f"hvp {key}"] = Estimate(slope[None], error, probe[None])
    else:
        out.update(_of_gradient(line, d))
    return out


def _of_gradient(line: _Lines, d: Directions) -> dict[str, Estimate]:
    """Return the derivative of the closed form's gradient along the tangents."""
    make_maps = DenseMaps if line.problem.small else line.large

    @functools.cache
    def at(t: float) -> Arrays:
        return gradient(line.problem.moved(d.tangents, t), d.cotangent, make_maps)

    out, reach = {}, line.reach(d.tangents)
    for key in line.problem.inputs:
        value, error = _derivative(functools.partial(_pick, at, f"vjp {key}"), reach, 1e-10)
        out[f"hvp {key}"] = Estimate(value, error)
    return out


def _pick(at: Callable[[float], Arrays], name: str, t: float) -> np.ndarray:
    return at(t)[name]


def _in_every_entry(line: _Lines, key: str, a: np.ndarray) -> Estimate:
    """Return the gradient, from one derivative per real degree of freedom."""
    units = (1.0, 1j) if np.iscomplexobj(a) else (1.0,)
    steps = []
    for unit in units:
        for e in range(a.size):
            step = np.zeros(a.size, a.dtype)
            step[e] = unit * line.size[key]
            steps.append({key: step.reshape(a.shape)})
    slopes, error = line.slopes(steps)
    parts = slopes.reshape(len(units), a.size) / line.size[key]
    value = sum((unit * part for unit, part in zip(units, parts, strict=True)), 0 * parts[0])
    return Estimate(value.reshape(a.shape), error / line.size[key])


class _Lines:
    """x along lines in the inputs of a problem, and derivatives along them."""

    def __init__(self, problem: Problem, cotangent: np.ndarray, large: SparseMaps) -> None:
        self.problem, self.cotangent, self.large = problem, cotangent, large
        self._here = [(s, _solver(p, self.large)) for s, p in problem.column_problems()]
        self.size = {
            k: float(np.sqrt(np.mean(np.abs(a) ** 2))) or 1.0 if a.size else 1.0
            for k, a in problem.inputs.items()
        }
        self._scale = problem.column_scale()
        self._slack = extremes(problem, self.large)[1]

    def stuck(self, key: str) -> bool:
        """Whether some entries of this input must not leave 0."""
        zero = (self.problem.inputs[key] == 0).any()
        return bool(zero) and (key == "damp" or key == "weights")

    def x(self, along: Arrays, t: float, start: Problem | None = None) -> np.ndarray:
        """Return x at a distance t from the start."""
        problem = (start or self.problem).moved(along, t)
        moved = start is not None or any(k in along for k in ("A", "damp", "weights"))
        solvers = (
            [(s, _solver(p, self.large)) for s, p in problem.column_problems()]
            if moved
            else self._here
        )
        A = problem.matrix
        b, x0 = problem.inputs["b"], problem.inputs.get("x0", np.zeros(problem.shape[1]))
        b, x0 = (a[:, None] if a.ndim == 1 else a for a in (b, x0))
        A = problem.scattered(problem.inputs["A"]) if A is None else A
        c = b - A @ x0
        y = [solve(c[:, columns]) for columns, solve in solvers]
        return (x0 + np.concatenate(y, axis=1)).reshape(problem.x_shape)

    def derivative(self, along: Arrays) -> tuple[np.ndarray, float]:
        """Return dx/dt at t = 0 and the norm of its estimated error."""
        if along.keys() <= {"b", "x0"}:  # x is affine in these: one difference is exact
            up, down = self.x(along, 1.0), self.x(along, -1.0)
            rounding = _ROUNDING * float(np.linalg.norm(up) + np.linalg.norm(down))
            return (up - down) / 2, rounding
        return _derivative(lambda t: self.x(along, t), self.reach(along), 1e-12)

    def slopes(self, lines: list[Arrays], start: Problem | None = None) -> tuple[Any, float]:
        """Return d/dt of Re <x_bar, x> at t = 0 along each line, and the norm of the errors."""
        if start is None and all(along.keys() <= {"b", "x0"} for along in lines):
            moves = [self.derivative(along) for along in lines]
            slopes = [_product(self.cotangent, x_dot) for x_dot, _ in moves]
            errors = [error for _, error in moves]
            return np.array(slopes), float(np.linalg.norm(errors) * np.linalg.norm(self.cotangent))

        def products(t: float) -> np.ndarray:
            return np.array([_product(self.cotangent, self.x(along, t, start)) for along in lines])

        return _derivative(products, min(self.reach(along) for along in lines), 1e-12)

    def mixed(self, first: Arrays, second: list[Arrays]) -> tuple[np.ndarray, float]:
        """Return d/dt d/ds of Re <x_bar, x> along t first + s second, for each second line."""

        def slopes(t: float) -> np.ndarray:
            return self.slopes(second, _on_rank(self.problem.moved(first, t)))[0]

        return _derivative(slopes, self.reach(first), 1e-9)

    def _weighted_norm(self, values: np.ndarray) -> float:
        """Return the norm of W^(1/2) V S for the matrix V with these entries."""
        w = self.problem.weights().max(axis=1, initial=0)[:, None]
        A, S = self.problem.scattered(values), self._scale[:, None]
        return norm_estimate(lambda v: S * (A.conj().T @ (w * (A @ (S * v)))), S.size) ** 0.5

    def reach(self, along: Arrays) -> float:
        """Return a step that stays well inside the region where x is smooth."""
        rate, problem = 1e-3, self.problem
        for key, a in along.items():
            if key == "A":
                rate += self._weighted_norm(a) / self._slack
            elif key == "damp":
                rate += float((np.abs(a) * self._scale).max(initial=0)) / self._slack
            elif key == "weights":
                w = problem.inputs[key]
                part = np.abs(a) / np.where(w == 0, w.mean() or 1, w)
                zero = (np.abs(a) * (w == 0)).max(initial=0)
                A = problem.toarray() * self._scale
                rows = np.linalg.norm(A, axis=1).max() if zero else 0.0
                rate += float(part.max(initial=0)) + zero * (rows / self._slack) ** 2
        return min(0.5, 0.3 / rate)


def _derivative(f: Callable[[float], np.ndarray], reach: float, tolerance: float) -> Any:
    """Return f'(0) for an array-valued f and the norm of the estimated error."""
    here = f(0.0)
    if not here.size:
        return here, 0.0
    rough = np.linalg.norm(f(reach / 16) - f(-reach / 16)) / (reach / 8)
    seen: dict[float, np.ndarray] = {}

    def flat(t: float) -> np.ndarray:
        if t not in seen:
            seen[t] = np.ascontiguousarray(f(t)).ravel().view(float)
        return seen[t]

    def columns(t: np.ndarray) -> np.ndarray:
        if t.ndim == 1:
            return flat(float(t[0]))
        return np.stack([flat(float(each)) for each in t[0]], axis=-1)

    size = here.ravel().view(float).size
    best = [np.zeros(size), np.full(size, np.inf), np.full(size, reach)]

    def keep(found: Any) -> None:
        """Keep the estimate of the smallest error: SciPy returns the last one."""
        if not found.nit.max():
            return
        better = found.error < best[1]
        for mine, new in zip(best, (found.df, found.error, reach / 2.0**found.nit), strict=True):
            mine[better] = new[better]

    derivative(
        columns,
        np.zeros(size),
        tolerances={"atol": tolerance * rough / np.sqrt(size), "rtol": 0.0},
        initial_step=reach,
        preserve_shape=True,
        callback=keep,
    )
    value, error, step = best
    rounding = _ROUNDING * float(np.linalg.norm(here)) / step.min()
    total = float(np.linalg.norm(error)) + rounding
    return value.view(here.dtype).reshape(here.shape), total


def _solver(part: Problem, large: SparseMaps) -> Callable[[np.ndarray], np.ndarray]:
    """Return c -> x - x0 for one matrix."""
    m, n = part.shape
    w, damp = part.weights(), part.damping()
    if not part.small:
        return large(part).T
    A = part.toarray()
    if part.full_column_rank and (w <= 0).any():
        K = np.block([[np.eye(m), A], [(w * A).conj().T, -np.diag(damp**2)]])
        return lambda c: np.linalg.solve(K, np.vstack([c, np.zeros((n, c.shape[1]))]))[m:]
    root = np.sqrt(w)
    if not part.full_column_rank:
        u, s, vh = stacked_svd(part)
        u, s, v = u[:m, : part.rank], s[: part.rank, None], vh[: part.rank].conj().T
        return lambda c: v @ (u.conj().T @ (root * c) / s)
    M = np.vstack([root * A, np.diag(damp)]) if damp.any() else root * A
    q, r = np.linalg.qr(M)
    return lambda c: scipy.linalg.solve_triangular(r, q[:m].conj().T @ (root * c))


def _on_rank(problem: Problem) -> Problem:
    """Return the problem with A moved to the nearest matrix of its rank, in the weighted norm."""
    if problem.full_column_rank:
        return problem
    _, part = problem.column_problems()[0]
    v = stacked_svd(part)[2][: problem.rank].conj().T
    return dataclasses.replace(problem, matrix=(problem.toarray() @ v) @ v.conj().T)


def _product(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b).real)
