"""Oracle: Golub and Pereyra's formulas written out, with first and second derivatives.

With G = A^H W A + D^2 and its pseudo-inverse G^+ (of fixed rank), four maps suffice:

    T c = G^+ A^H W c        T^H g = W A G^+ g        E g = G^+ g        N g = g - G^+ G g

and x = x0 + T (b - A x0) = T b + E D^2 x0 + N x0. Along a change of A, W and D^2 that keeps the
rank they move by

    T' c = -T A' y + E (A'^H W r + A^H W' r - (D^2)' y) + N A'^H T^H y,    y = T c,  r = c - A y
    E' g = -T A' z - E (A'^H T^H g + A^H W' A z + (D^2)' z) + E T A' n + N A'^H T^H z
    N' g = -T A' n - N A'^H T^H g,                                         z = E g,  n = N g

and the gradient of Re <g, x> is, with z = E g, n = N g, y = x - x0, r = b - A x,

    A: W r z^H - (T^H g) x^H + (T^H y) n^H      b: T^H g      x0: n + D^2 z
    weights: Re(conj(A z) r)                    damp^2: -Re(conj(z) y)

whose derivative is the Hessian-vector product. How the maps are applied is given from outside:
by a dense SVD, by a sparse factorisation, or in 80 digits.

References: Golub & Pereyra (1973), doi:10.1137/0710036.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from funclsq.validate.problem import Arrays, Problem
from funclsq.validate.tangents import Directions

__all__ = ["Maps", "damping_sizes", "evaluate", "gradient"]


class Maps(Protocol):
    """The four maps of one matrix, for blocks of columns; ``A`` is an array or SciPy matrix."""

    A: Any

    def T(self, c: np.ndarray) -> np.ndarray:
        """Return G^+ A^H W c."""

    def Th(self, g: np.ndarray) -> np.ndarray:
        """Return W A G^+ g."""

    def E(self, g: np.ndarray) -> np.ndarray:
        """Return G^+ g."""

    def N(self, g: np.ndarray) -> np.ndarray:
        """Return g - G^+ G g."""


def evaluate(problem: Problem, d: Directions, make_maps: Callable[[Problem], Maps]) -> Arrays:
    """Return x and its first and second derivatives at a problem, by the formulas above.

    Parameters
    ----------
    problem : Problem
        Where.
    d : Directions
        Along what.
    make_maps : callable
        Makes the maps of a problem whose weights are the same for all columns.

    Returns
    -------
    dict
        ``x``; ``vjp k``, ``jvp k`` and ``hvp k`` for every input k.
    """
    parts = []
    for columns, part in problem.column_problems():
        point = _Point(part, make_maps(part), problem.only_x(columns, d.cotangent))
        along = problem.only(columns, d.tangents)
        found = {"x": point.x, **_named("vjp", point.gradient())}
        for key in problem.inputs:
            found[f"jvp {key}"] = _Motion(point, {key: along[key]}).x
        found.update(_named("hvp", _Motion(point, along).gradient()))
        parts.append(found)
    return _merged(problem, parts)


def gradient(problem: Problem, cotangent: np.ndarray, make_maps: Callable[..., Maps]) -> Arrays:
    """Return ``x`` and ``vjp k`` for every input k; the arrays may hold mpmath numbers."""
    parts = []
    for columns, part in problem.column_problems():
        point = _Point(part, make_maps(part), problem.only_x(columns, cotangent))
        parts.append({"x": point.x, **_named("vjp", point.gradient())})
    return _merged(problem, parts)


def damping_sizes(
    problem: Problem, d: Directions, make_maps: Callable[[Problem], Maps]
) -> dict[str, float]:
    """Return what ``vjp damp`` and ``hvp damp`` are sums of, without the signs.

    z has a part in the null space of A and y has none, so that their product is far smaller
    than its terms; no change of the data tells of that, but rounding does.
    """
    size = {"vjp damp": 0.0, "hvp damp": 0.0}
    for columns, part in problem.column_problems():
        p = _Point(part, make_maps(part), problem.only_x(columns, d.cotangent))
        along = _Motion(p, problem.only(columns, d.tangents))
        z, y = np.linalg.norm(p.z), np.linalg.norm(p.y)
        z_dot, y_dot = np.linalg.norm(along.z), np.linalg.norm(along.y)
        damp, move = np.abs(p.damp).max(initial=0), np.abs(along.damp).max(initial=0)
        size["vjp damp"] += float(2 * damp * z * y)
        size["hvp damp"] += float(2 * move * z * y + 2 * damp * (z_dot * y + z * y_dot))
    return size


class _Point:
    """x and all that the derivatives need, for the columns that share one matrix."""

    def __init__(self, problem: Problem, maps: Maps, g: np.ndarray) -> None:
        b = _block(problem.inputs["b"])
        self.problem, self.maps, self.g = problem, maps, _block(g)
        self.w, self.damp = problem.weights(), problem.damping()[:, None]
        A = self.A = maps.A
        self.x0 = np.broadcast_to(_block(problem.inputs.get("x0", 0 * self.g)), self.g.shape)
        self.d2 = self.damp**2
        self.x = maps.T(b) + maps.E(self.d2 * self.x0) + maps.N(self.x0)
        self.y = self.x - self.x0
        self.r = b - A @ self.x
        self.z, self.n = maps.E(self.g), maps.N(self.g)
        self.q, self.u = maps.Th(self.g), maps.Th(self.y)
        self.az = A @ self.z

    def gradient(self) -> Arrays:
        """Return the gradient of Re <g, x> in every input, damp and x0 not yet summed."""
        return {
            "A": self.at_entries(self.w * self.r, self.z)
            - self.at_entries(self.q, self.x)
            + self.at_entries(self.u, self.n),
            "b": self.q,
            "damp": -2 * self.damp[:, 0] * _real_dot(self.z, self.y),
            "weights": _real_dot(self.az, self.r),
            "x0": self.n + self.d2 * self.z,
        }

    def at_entries(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return left right^H at the stored entries."""
        return (left[self.problem.row] * right.conj()[self.problem.col]).sum(1)


class _Motion:
    """How a point moves along a direction; inputs that are not named stay."""

    def __init__(self, p: _Point, along: Arrays) -> None:
        self.p = p
        self.A = p.problem.scattered(along["A"]) if "A" in along else 0 * p.problem.pattern()
        self.w = _block(along["weights"]) if "weights" in along else 0 * p.w
        self.damp = 0 * p.damp + (_block(along["damp"]) if "damp" in along else 0)
        self.d2 = 2 * p.damp * self.damp
        self.x0 = _block(along["x0"]) if "x0" in along else 0 * p.x0
        self.b = _block(along["b"]) if "b" in along else 0 * p.r
        self.Ah = _adjoint(self.A)
        T, E, N = p.maps.T, p.maps.E, p.maps.N
        back = (
            p.d2 * self.x0 + self.Ah @ (p.w * p.r) + _adjoint(p.A) @ (self.w * p.r) - self.d2 * p.y
        )
        self.x = T(self.b - self.A @ p.x) + E(back) + N(self.Ah @ p.u + self.x0)
        self.y = self.x - self.x0

    @property
    def z(self) -> np.ndarray:
        """The derivative of z = E g."""
        return self.moved_e(self.p.g, self.p.z, self.p.n, self.p.q)

    def gradient(self) -> Arrays:
        """Return the derivative of the point's gradient: a Hessian-vector product."""
        p, T, N = self.p, self.p.maps.T, self.p.maps.N
        r = self.b - self.A @ p.x - p.A @ self.x
        z = self.z
        n = -T(self.A @ p.n) - N(self.Ah @ p.q)
        az = self.A @ p.z + p.A @ z
        q = self.w * p.az + p.w * az
        e = p.maps.E(p.y)
        e_dot = self.moved_e(p.y, e, N(p.y), p.u) + p.maps.E(self.y)
        u = self.w * (p.A @ e) + p.w * (self.A @ e + p.A @ e_dot)
        damp = self.damp[:, 0] * _real_dot(p.z, p.y)
        damp = damp + p.damp[:, 0] * (_real_dot(z, p.y) + _real_dot(p.z, self.y))
        at = p.at_entries
        return {
            "A": at(self.w * p.r + p.w * r, p.z)
            + at(p.w * p.r, z)
            - at(q, p.x)
            - at(p.q, self.x)
            + at(u, p.n)
            + at(p.u, n),
            "b": q,
            "damp": -2 * damp,
            "weights": _real_dot(az, p.r) + _real_dot(p.az, r),
            "x0": n + self.d2 * p.z + p.d2 * z,
        }

    def moved_e(self, g: Any, z: np.ndarray, n: np.ndarray, q: np.ndarray) -> np.ndarray:
        """Return E' g, with z = E g, n = N g and q = T^H g."""
        p, T, E, N, Th = self.p, self.p.maps.T, self.p.maps.E, self.p.maps.N, self.p.maps.Th
        back = self.Ah @ q + _adjoint(p.A) @ (self.w * (p.A @ z)) + self.d2 * z
        return E(T(self.A @ n) - back) - T(self.A @ z) + N(self.Ah @ Th(z))


def _merged(problem: Problem, parts: list[Arrays]) -> Arrays:
    """Join groups of columns and give every quantity the shape of what it belongs to."""
    out = {}
    for name in parts[0]:
        kind, _, key = name.partition(" ")
        pieces = [part[name] for part in parts]
        if kind in ("x", "jvp"):
            like = np.empty(problem.x_shape)
        elif key in problem.inputs:
            like = problem.inputs[key]
        else:
            continue
        if kind not in ("x", "jvp") and key in ("A", "damp"):
            whole = sum(pieces[1:], pieces[0])
            out[name] = whole if like.ndim else np.asarray(whole.sum())
            continue
        whole = np.concatenate([_block(piece) for piece in pieces], axis=1)
        if like.ndim == 1 and whole.shape[1] != 1:
            whole = whole.sum(1)  # one x0 for all columns
        out[name] = whole.reshape(like.shape)
    return out


def _named(kind: str, arrays: Arrays) -> Arrays:
    return {f"{kind} {key}": a for key, a in arrays.items()}


def _block(a: np.ndarray) -> np.ndarray:
    return a[:, None] if a.ndim == 1 else a


def _adjoint(A: Any) -> Any:
    return A.conj().T


def _real_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Re(conj(a) b) summed over columns."""
    product = (a.conj() * b).sum(1)
    return _real_parts(product) if product.dtype == object else product.real


_real_parts = np.frompyfunc(lambda v: v.real, 1, 1)
