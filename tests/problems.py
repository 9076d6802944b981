"""Generators of ill-conditioned sparse least-squares problems, and their solution to 80 digits.

Every matrix is small (20 to 60 columns), so that it can also be solved by dense QR, which sets
the accuracy to compare with, and by mpmath, which tells both errors.
"""

from __future__ import annotations

import mpmath
import numpy as np
import scipy.linalg
import scipy.sparse

DIGITS = 80


def _normal(rng, shape, complex_):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if complex_ else z


def near_dependent(A: np.ndarray, cond: float) -> np.ndarray:
    """Make three columns equal to others but for a part of 1/cond of themselves."""
    A = A.copy()
    for j in range(3):
        A[:, j] = A[:, j + 3] + A[:, j] / cond
    return A


def random_sparse(cond: float, rng: np.random.Generator, complex_: bool = False) -> np.ndarray:
    """48 x 16, about 5 entries per column, three near-dependent columns."""
    n = 16
    A = np.eye(3 * n, n, dtype=complex if complex_ else float)
    mask = rng.random(A.shape) < 4 / (3 * n)
    A[mask] = _normal(rng, int(mask.sum()), complex_)
    return near_dependent(A, cond)


def grid(cond: float, rng: np.random.Generator, complex_: bool = False) -> np.ndarray:
    """First differences on a 4 x 4 grid, held at one side, three near-dependent columns."""
    D = np.eye(4) - np.eye(4, k=-1)
    A = np.vstack([np.kron(np.eye(4), D), np.kron(D, np.eye(4))])
    return near_dependent(A * _normal(rng, (32, 1), complex_), cond)


def arrow(cond: float, rng: np.random.Generator, complex_: bool = False) -> np.ndarray:
    """Bundle adjustment: 2 cameras with 3 unknowns, 6 points with 2, each seen by both."""
    A = np.zeros((24, 18), dtype=complex if complex_ else float)
    for point in range(6):
        for camera in range(2):
            rows = slice(4 * point + 2 * camera, 4 * point + 2 * camera + 2)
            A[rows, 3 * camera : 3 * camera + 3] = _normal(rng, (2, 3), complex_)
            A[rows, 6 + 2 * point : 8 + 2 * point] = _normal(rng, (2, 2), complex_)
    return near_dependent(A, cond)


def graded(cond: float, rng: np.random.Generator, complex_: bool = False) -> np.ndarray:
    """48 x 16, singular values in geometric progression, banded (chains of rotations)."""
    n = 16
    A = np.eye(3 * n, n) * np.logspace(0, -np.log10(cond), n)
    for M in (A, A.T):
        for i in range(M.shape[1] - 1):
            angle = rng.uniform(0, 2 * np.pi)
            c, s = np.cos(angle), np.sin(angle)
            M[:, [i, i + 1]] = M[:, [i, i + 1]] @ np.array([[c, s], [-s, c]])
    if complex_:
        A = A * np.exp(1j * rng.uniform(0, 6, (3 * n, 1)))
    return A


FAMILIES = {"random": random_sparse, "grid": grid, "arrow": arrow, "graded": graded}


def laplacian(k: int, power: int) -> scipy.sparse.csr_array:
    """Return a power of the integer 5-point Laplacian: cond about (0.4 k^2)^power, smooth."""
    T = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(k, k))
    eye = scipy.sparse.eye_array(k)
    L = (scipy.sparse.kron(T, eye) + scipy.sparse.kron(eye, T)).tocsr()
    out = L
    for _ in range(power - 1):
        out = out @ L
    return scipy.sparse.csr_array(out)


class Exact:
    """x = (A^H A + D^2)^+ (A^H c + g) in 80 digits, for A of full rank."""

    def __init__(self, A: np.ndarray, damp: np.ndarray | None = None) -> None:
        self.m, self.n = A.shape
        self.complex = np.iscomplexobj(A)
        self.wide = damp is None and self.m < self.n
        with mpmath.workdps(DIGITS):
            self.A = self._lift(A)
            self.Ah = _conj(self.A.T)
            N = self.A.dot(self.Ah) if self.wide else self.Ah.dot(self.A)
            if damp is not None:
                for j, d in enumerate(damp):
                    N[j, j] += mpmath.mpf(float(d)) ** 2
            self.L = _cholesky(N)

    def _lift(self, a: np.ndarray) -> np.ndarray:
        if self.complex:
            return np.vectorize(lambda z: mpmath.mpc(z.real, z.imag), otypes=[object])(a)
        return np.vectorize(lambda z: mpmath.mpf(float(z)), otypes=[object])(a)

    def _round(self, a: np.ndarray) -> np.ndarray:
        return a.astype(complex if self.complex else float)

    def solve(self, c: np.ndarray | None, g: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return x and A x, rounded."""
        with mpmath.workdps(DIGITS):
            if self.wide:
                u = 0 if c is None else self._lift(c)
                if g is not None:
                    u = u + _solve(self.L, self.A.dot(self._lift(g)))
                x = self.Ah.dot(_solve(self.L, u))
            else:
                q = 0 if c is None else self.Ah.dot(self._lift(c))
                x = _solve(self.L, q if g is None else q + self._lift(g))
            return self._round(x), self._round(self.A.dot(x))


def by_qr(A, damp, c, g) -> np.ndarray:
    """Solve the same by dense QR in double precision, columns (rows, if wide) scaled first."""
    m, n = A.shape
    if damp is not None:
        A = np.vstack([A, np.diag(damp)])
        c = None if c is None else np.vstack([c, np.zeros((n, c.shape[1]))])
    C = A if damp is not None or m >= n else A.conj().T
    size = np.linalg.norm(C, axis=0)
    Q, R = np.linalg.qr(C / size)
    size = size[:, None]

    def back(v):
        return scipy.linalg.solve_triangular(R, v)

    def forth(v):
        return scipy.linalg.solve_triangular(R.conj().T, v, lower=True)

    if C is A:
        t = 0 if c is None else Q.conj().T @ c
        return back(t if g is None else t + forth(g / size)) / size
    u = 0 if c is None else c
    if g is not None:
        u = u + back(Q.conj().T @ g) / size
    return Q @ forth(u / size)


def _conj(a: np.ndarray) -> np.ndarray:
    return np.vectorize(mpmath.conj, otypes=[object])(a)


def _cholesky(N: np.ndarray) -> np.ndarray:
    L = N.copy()
    n = L.shape[0]
    for j in range(n):
        L[j, j] = mpmath.sqrt(mpmath.re(L[j, j]))
        if j + 1 < n:
            L[j + 1 :, j] = L[j + 1 :, j] / L[j, j]
            L[j + 1 :, j + 1 :] = L[j + 1 :, j + 1 :] - np.multiply.outer(
                L[j + 1 :, j], _conj(L[j + 1 :, j])
            )
    return L


def _solve(L: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    x = rhs.copy()
    n = L.shape[0]
    for j in range(n):
        x[j] = x[j] / L[j, j]
        if j + 1 < n:
            x[j + 1 :] = x[j + 1 :] - np.multiply.outer(L[j + 1 :, j], x[j])
    for j in reversed(range(n)):
        x[j] = x[j] / L[j, j]
        if j:
            x[:j] = x[:j] - np.multiply.outer(_conj(L[j, :j]), x[j])
    return x
