"""Preconditioners, and the matrices that they are for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import funclsq as fl
from funclsq.preconditioners import block_diagonal, incomplete, sketch

F64 = torch.float64
LABELS = [3, 1, 3, 1, 1, 9, 3]
MAKERS = {
    "block_diagonal": lambda A, **more: block_diagonal(A, LABELS, **more),
    "incomplete": incomplete,
    "sketch": lambda A, **more: sketch(A, oversampling=2, nnz_per_row=2, **more),
}
EACH = pytest.mark.parametrize("name", MAKERS)


def small(dtype=F64, m=40, n=7):
    """A matrix with columns over two decades, its pattern, weights and damp."""
    rng = np.random.default_rng(7)
    stored = rng.random((m, n)) < 0.5
    A = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if dtype.is_complex else 0)
    A = A * stored * np.logspace(0, 2, n)
    weights = rng.random(m)
    weights[3] = 0
    damp = np.array([0.5, 0, 0, 1, 2, 0, 3])[:n]
    real = dtype.to_real()
    return (
        torch.from_numpy(A).to(dtype),
        stored,
        torch.from_numpy(weights).to(real),
        torch.from_numpy(damp).to(real),
    )


def grid(side):
    D = sp.diags_array([-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1])
    D = D.tocsr()[: side - 1]
    eye = sp.eye_array(side)
    return sp.csr_array(sp.vstack([sp.kron(D, eye), sp.kron(eye, D)]))


def tall(m, n, cond, dtype=F64):
    """Sparse rows, singular values in geometric progression (through dense combinations)."""
    rng = np.random.default_rng(1)
    A = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if dtype.is_complex else 0)
    A = A * np.logspace(0, -np.log10(cond), n) @ np.linalg.qr(rng.standard_normal((n, n)))[0]
    return torch.from_numpy(A).to(dtype), np.ones((m, n), dtype=bool)


def arrow(cameras=4, points=40, seen=3, cond=30.0):
    """Bundle adjustment: 9 unknowns per camera, 3 per point, each group in unlike units."""
    rng = np.random.default_rng(2)
    camera = np.concatenate([rng.permutation(cameras)[:seen] for _ in range(points)])
    point = np.repeat(np.arange(points), seen)
    label = np.repeat(np.arange(cameras + points), [9] * cameras + [3] * points)
    n = label.size
    J = np.zeros((2 * camera.size, n))
    for i in range(camera.size):
        for group in (camera[i], cameras + point[i]):
            J[2 * i : 2 * i + 2, label == group] = rng.standard_normal((2, (label == group).sum()))
    for group in range(cameras + points):
        at = label == group
        s = at.sum()
        Q, R = (np.linalg.qr(rng.standard_normal((s, s)))[0] for _ in range(2))
        J[:, at] = J[:, at] @ (Q * np.logspace(0, np.log10(cond), s)) @ R
    order = rng.permutation(n)  # labels need not be consecutive
    return sp.csr_array(J[:, order]), label[order]


def hard(name):
    """The problem that a preconditioner is for: A, damp, and it."""
    if name == "block_diagonal":
        A, label = arrow()
        return fl.Sparse.from_scipy(A), 0.0, lambda A, **more: block_diagonal(A, label, **more)
    if name == "incomplete":
        return fl.Sparse.from_scipy(grid(40)), 1e-2, incomplete
    A, _ = tall(4000, 60, 1e3)
    return fl.Sparse.from_torch(A), 0.0, sketch
