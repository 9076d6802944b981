"""Generators of the benchmark problems: a pattern, values, and how new values are drawn.

A repetition never sees values that an earlier one saw, so that no cache of values is flattered;
the pattern stays, as it does in use.
"""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg
import torch

from tests import realdata

__all__ = ["PROBLEMS", "Absent", "Data", "Problem", "random_rows", "reference"]


@dataclasses.dataclass(frozen=True)
class Data:
    """The numbers of one repetition."""

    values: np.ndarray
    b: np.ndarray
    x_bar: np.ndarray


@dataclasses.dataclass(frozen=True)
class Problem:
    """min ||A x - b||^2 + damp^2 ||x||^2 on a fixed pattern, entries in CSR order."""

    name: str
    A: sp.csr_array
    damp: float = 0.0
    k: int = 1

    @property
    def row(self) -> np.ndarray:
        return np.repeat(np.arange(self.A.shape[0]), np.diff(self.A.indptr))

    def draw(self, seed: int) -> Data:
        """Every row and column stretched by about 1%, an inconsistent b, a cotangent of x.

        All values are new, and what makes the matrix hard (dependent columns) stays.
        """
        rng = np.random.default_rng(seed)
        m, n = self.A.shape
        rows, columns = (1 + 0.01 * rng.standard_normal(size) for size in (m, n))
        values = self.A.data * rows[self.row] * columns[self.A.indices]
        x = rng.standard_normal((n, self.k))
        b = self.matrix(values) @ x
        b += 0.1 * np.linalg.norm(b) / np.sqrt(b.size) * rng.standard_normal((m, self.k))
        x_bar = rng.standard_normal((n, self.k))
        return Data(values, b[:, 0] if self.k == 1 else b, x_bar[:, 0] if self.k == 1 else x_bar)

    def matrix(self, values: np.ndarray) -> sp.csr_array:
        return sp.csr_array((values, self.A.indices, self.A.indptr), shape=self.A.shape)

    def stacked(self, values: np.ndarray) -> sp.csr_array:
        """[A; damp I], for solvers without damping."""
        A = self.matrix(values)
        if not self.damp:
            return A
        return sp.vstack([A, self.damp * sp.eye_array(A.shape[1])], format="csr")


def _csr(A) -> sp.csr_array:
    A = sp.csr_array(A)
    A.sum_duplicates()
    A.indices, A.indptr = A.indices.astype(np.int32), A.indptr.astype(np.int32)
    return A


def random_rows(m: int, n: int, per_row: int, seed: int = 0, spread: float = 1.5) -> sp.csr_array:
    """``per_row`` entries in each row, at random places, columns in units ``spread`` decades apart.

    Condition number about 1.5 10^spread; 2 once the columns are scaled.
    """
    rng = np.random.default_rng(seed)
    col = rng.integers(0, n, m * per_row)
    row = np.repeat(np.arange(m), per_row)
    values = rng.standard_normal(m * per_row) * (10 ** rng.uniform(0, spread, n))[col]
    A = sp.coo_array((values, (row, col)), shape=(m, n))
    return _csr(A)


def grid(side: int) -> sp.csr_array:
    """First differences between neighbours of a grid; damping makes it a screened Laplacian."""
    D = sp.diags_array(
        [-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1], shape=(side - 1, side)
    )
    eye = sp.eye_array(side)
    return _csr(sp.vstack([sp.kron(D, eye), sp.kron(eye, D)]))


def with_full_rows(A: sp.csr_array, count: int, seed: int = 0) -> sp.csr_array:
    """A few rows with an entry in every column below A: constraints on sums."""
    rows = np.random.default_rng(seed).standard_normal((count, A.shape[1]))
    return _csr(sp.vstack([A, sp.csr_array(rows / np.sqrt(A.shape[1]))]))


def bundle(cameras: int, points: int, seen: int, seed: int = 0) -> sp.csr_array:
    """Jacobian of bundle adjustment: rows of 9 camera and 3 point unknowns; 1e-3 I added below."""
    rng = np.random.default_rng(seed)
    camera = np.sort(rng.random((points, cameras)).argsort(1)[:, :seen], 1).ravel()
    point = np.repeat(np.arange(points), seen)
    count = camera.size
    col = np.hstack(
        [camera[:, None] * 9 + np.arange(9), cameras * 9 + point[:, None] * 3 + np.arange(3)]
    )
    col = np.repeat(col, 2, 0)
    row = np.repeat(np.arange(2 * count), 12)
    values = rng.standard_normal((2 * count, 12))
    J = sp.coo_array(
        (values.ravel(), (row, col.ravel())), shape=(2 * count, cameras * 9 + points * 3)
    )
    return _csr(sp.vstack([J, 1e-3 * sp.eye_array(J.shape[1])]))


def one_hot(m: int, levels: tuple[int, ...], seed: int = 0) -> sp.csr_array:
    """Regression on factors: one entry 1 per row and factor (the first level dropped)."""
    rng = np.random.default_rng(seed)
    parts = [sp.csr_array(np.ones((m, 1)))]
    for count in levels:
        level = np.minimum(rng.geometric(3 / count, m) - 1, count - 1)
        rows = np.arange(m)
        hot = sp.coo_array((np.ones(m), (rows, level)), shape=(m, count)).tocsc()
        used = np.diff(hot.indptr) > 0
        parts.append(sp.csr_array(hot[:, used][:, 1:]))
    return _csr(sp.hstack(parts))


def terrain(rows: int, side: int, seed: int = 0) -> sp.csr_array:
    """Elevations read between the nodes of a grid (bilinear), plus weak smoothness."""
    rng = np.random.default_rng(seed)
    y, x = rng.random((2, rows)) * (side - 1.001)
    i, j = y.astype(int), x.astype(int)
    s, t = y - i, x - j
    col = np.stack([i * side + j, i * side + j + 1, (i + 1) * side + j, (i + 1) * side + j + 1], 1)
    value = np.stack([(1 - s) * (1 - t), (1 - s) * t, s * (1 - t), s * t], 1)
    row = np.repeat(np.arange(rows), 4)
    A = sp.coo_array((value.ravel(), (row, col.ravel())), shape=(rows, side * side))
    return _csr(sp.vstack([A, 0.05 * grid(side)]))


def tomography(side: int, angles: int) -> sp.csr_array:
    """Parallel rays through a square of pixels, four samples per pixel length."""
    rows, cols, values = [], [], []
    offsets = np.arange(side) - (side - 1) / 2
    steps = np.arange(-side, side, 0.25)
    ray = 0
    for angle in np.linspace(0, np.pi, angles, endpoint=False):
        c, s = np.cos(angle), np.sin(angle)
        for offset in offsets:
            x = offset * c - steps * s + side / 2
            y = offset * s + steps * c + side / 2
            inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
            pixel = y[inside].astype(int) * side + x[inside].astype(int)
            rows.append(np.full(pixel.size, ray))
            cols.append(pixel)
            values.append(np.full(pixel.size, 0.25))
            ray += 1
    place = (np.concatenate(rows), np.concatenate(cols))
    return _csr(sp.coo_array((np.concatenate(values), place), shape=(ray, side * side)))


def real(rel: str) -> sp.csr_array:
    """A matrix of the data folder."""
    if not (realdata.FOLDER / rel).exists():
        raise Absent(f"no data file {rel}")
    return _csr(realdata.load(rel)[0])


def bundle_adjustment(rel: str) -> sp.csr_array:
    """Jacobian of the reprojection errors of a BAL file at its start (rows: 2 per observation).

    Camera: Rodrigues vector, translation, focal length, two radial distortions; the model is that
    of S. Agarwal et al., Bundle adjustment in the large (2010), doi:10.1007/978-3-642-15552-9_3.
    """
    path = realdata.FOLDER / rel
    if not path.exists():
        raise Absent(f"no data file {rel}")
    with gzip.open(path, "rt") as f:
        cameras, points, count = (int(t) for t in f.readline().split())
        seen = np.array([f.readline().split() for _ in range(count)], dtype=float)
        rest = torch.tensor([float(line) for line in f], dtype=torch.float64)
    camera, point = (torch.from_numpy(seen[:, i].astype(np.int64)) for i in (0, 1))
    C = rest[: 9 * cameras].reshape(-1, 9)[camera]
    P = rest[9 * cameras :].reshape(-1, 3)[point]

    def project(q: torch.Tensor) -> torch.Tensor:
        angle, t, (f, k1, k2), X = q[:3], q[3:6], q[6:9], q[9:]
        theta = torch.linalg.vector_norm(angle)
        axis = angle / theta
        turned = X * theta.cos() + torch.linalg.cross(axis, X) * theta.sin()
        y = turned + axis * (axis @ X) * (1 - theta.cos()) + t
        p = -y[:2] / y[2]
        r2 = p @ p
        return f * (1 + k1 * r2 + k2 * r2**2) * p

    J = torch.func.vmap(torch.func.jacfwd(project))(torch.cat([C, P], 1))  # (count, 2, 12)
    own = torch.cat(
        [9 * camera[:, None] + torch.arange(9), 3 * point[:, None] + torch.arange(3)], 1
    )
    own[:, 9:] += 9 * cameras
    row = torch.arange(2 * count).repeat_interleave(12)
    col = own.repeat_interleave(2, 0).reshape(-1)
    shape = (2 * count, 9 * cameras + 3 * points)
    A = sp.coo_array((J.reshape(-1).numpy(), (row.numpy(), col.numpy())), shape=shape).tocsr()
    size = np.sqrt(np.asarray((A * A).sum(0)).ravel())
    return _csr(A @ sp.diags_array(1 / size))


def near_dependent(m: int, n: int, cond: float, seed: int = 0) -> sp.csr_array:
    """Sparse rows, and columns that are in pairs the same but for a part of size 1/cond."""
    A = random_rows(m, n // 2, 5, seed, spread=0.0)
    B = random_rows(m, n // 2, 5, seed + 1, spread=0.0)
    return _csr(sp.hstack([A, A + B / cond]))


class Absent(Exception):
    """A data file that is not on this machine."""


def reference(problem: Problem, data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and the cotangents of the values and of b, for the cotangent x_bar of x.

    By a sparse LU of the normal equations (by LSMR where that does not fit), refined on residuals
    in extended precision: for problems of moderate condition number, or ArithmeticError says so.
    """
    A = problem.matrix(data.values)
    m, n = A.shape
    scale = 1 / np.sqrt(np.asarray((A * A).sum(0)).ravel() + problem.damp**2)
    S = _csr(A @ sp.diags_array(scale))
    rough = _rough_inverse(S, problem.damp * scale)
    product, adjoint = _long(A, A.data), _long_adjoint(A, A.data)

    def solve(c: np.ndarray | None, g: np.ndarray | None) -> np.ndarray:
        x = np.zeros((n, problem.k), dtype=np.longdouble)
        for _ in range(12):
            residual = -(problem.damp**2) * x
            residual += adjoint((0 if c is None else c) - product(x))
            residual += 0 if g is None else g
            rhs = np.ascontiguousarray((scale[:, None] * residual).astype(float))
            step = scale[:, None] * rough(rhs)
            x += step
            if np.linalg.norm(step) < 1e-15 * np.linalg.norm(x.astype(float)):
                return x
        raise ArithmeticError(f"{problem.name}: the reference did not converge")

    b = data.b.reshape(m, -1).astype(np.longdouble)
    x, z = solve(b, None), solve(None, data.x_bar.reshape(n, -1))
    r, y = b - product(x), product(z)
    values_bar = (r[problem.row] * z[A.indices] - y[problem.row] * x[A.indices]).sum(1)
    shape = data.x_bar.shape
    return (
        x.astype(float).reshape(shape),
        values_bar.astype(float),
        y.astype(float).reshape(data.b.shape),
    )


def _rough_inverse(S: sp.csr_array, damp: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """(S^T S + damp^2)^-1 to some digits."""
    m, n = S.shape
    if int((np.diff(S.indptr).astype(np.int64) ** 2).sum()) < 2e8:  # pairs that meet in a row
        N = (S.T @ S + sp.diags_array(damp**2)).tocsc()
        return scipy.sparse.linalg.splu(
            N, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
        ).solve
    both = sp.vstack([S, sp.diags_array(damp)], format="csr")
    back = both.T.tocsr()

    def column(g: np.ndarray) -> np.ndarray:
        # z = B^+ (B^+)^T g: the least-norm u of B^T u = g, then the z of B z = u
        u = scipy.sparse.linalg.lsmr(back, g, atol=1e-13, btol=1e-13, conlim=0, maxiter=20 * n)[0]
        return scipy.sparse.linalg.lsmr(both, u, atol=1e-13, btol=1e-13, conlim=0, maxiter=20 * n)[
            0
        ]

    return lambda rhs: np.stack([column(g) for g in rhs.T], 1)


def _long(A: sp.csr_array, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def apply(x: np.ndarray) -> np.ndarray:
        starts = np.minimum(A.indptr[:-1], max(A.nnz - 1, 0))
        out = np.add.reduceat(values[:, None] * x[A.indices], starts, axis=0)
        out[np.diff(A.indptr) == 0] = 0
        return out

    return apply


def _long_adjoint(A: sp.csr_array, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    number = sp.csr_array((np.arange(A.nnz), A.indices, A.indptr), shape=A.shape)
    T = number.T.tocsr()
    return _long(T, values[T.data])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "random": lambda: Problem("random 20000 x 2000", random_rows(20_000, 2000, 10)),
    "random-8": lambda: Problem("random, k = 8", random_rows(20_000, 2000, 10), k=8),
    "random-64": lambda: Problem("random, k = 64", random_rows(20_000, 2000, 10), k=64),
    "grid": lambda: Problem("grid 40k, damped", grid(200), damp=0.01),
    "grid-160k": lambda: Problem("grid 160k, damped", grid(400), damp=0.01),
    "grid-rows": lambda: Problem("grid 40k + 5 full rows", with_full_rows(grid(200), 5), damp=0.01),
    "bundle": lambda: Problem("bundle adjustment", bundle(40, 3000, 5)),
    "one-hot": lambda: Problem("one-hot regression", one_hot(50_000, (800, 300, 40))),
    "terrain": lambda: Problem("terrain", terrain(60_000, 120)),
    "tomography": lambda: Problem("tomography 64 x 64, damped", tomography(64, 90), damp=0.1),
    "tomography-128": lambda: Problem(
        "tomography 128 x 128, damped", tomography(128, 120), damp=0.1
    ),
    "well1033": lambda: Problem("well1033", real("sparse_lsq/well1033.mtx.gz")),
    "illc1850": lambda: Problem("illc1850", real("sparse_lsq/illc1850.mtx.gz")),
    "lp_fit2p_T": lambda: Problem("LP fit2p transposed", real("sparse_lsq/lp_fit2p_T.mtx.gz")),
    "near-dependent": lambda: Problem("near-dependent columns", near_dependent(6000, 2000, 1e3)),
    "graded": lambda: Problem("columns over 9 decades", random_rows(20_000, 2000, 10, spread=9.0)),
    "m3500": lambda: Problem("pose graph M3500, damped", real("slam_ba/M3500_gn0.npz"), damp=1.0),
    "bal-49": lambda: Problem(
        "bundle adjustment BAL 49, damped",
        bundle_adjustment("slam_ba/problem-49-7776-pre.txt.gz"),
        damp=1e-3,
    ),
    "landmark": lambda: Problem("landmark, damped", real("sparse_lsq/landmark.npz"), damp=1e-2),
    "insteval": lambda: Problem("InstEval, damped", real("regression/insteval.npz"), damp=1.0),
}
