"""Every step of the Krylov methods, against the minimiser over the dense Krylov subspace.

With a preconditioner N = L L^H all is as for A L^-H, whose solutions are L^H x.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funclsq import passes
from funclsq.methods._craig import Craig
from funclsq.methods._extended_cg import ExtendedCg
from funclsq.methods._scalars import scalars_for
from funclsq.methods.lsmr import Lsmr
from funclsq.methods.lsqr import Lsqr
from funclsq.operators import DenseOp, SparseOp, StackedOp
from funclsq.pattern import SparsityPattern

M, N, STEPS = 12, 7, 5
METHODS = {"lsmr": Lsmr, "lsqr": Lsqr, "cgls": ExtendedCg, "cgls with g": ExtendedCg}


def _draw(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def _basis(first, apply, count):
    """Orthonormal basis of first, apply(first), apply(apply(first)), ..."""
    found = []
    for _ in range(count):
        v = first if not found else apply(found[-1])
        for _ in range(2):
            for q in found:
                v = v - q * np.vdot(q, v)
        found.append(v / np.linalg.norm(v))
    return np.stack(found, 1)


def _minimiser(A, b, V, normal):
    A, b = (A.conj().T @ A, A.conj().T @ b) if normal else (A, b)
    return V @ np.linalg.lstsq(A @ V, b, rcond=None)[0]


def _close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=["products", "passes"])
def operator(request, monkeypatch):
    """A dense operator, or a sparse one that a single column passes in compiled loops."""
    if request.param == "products":
        return lambda A: DenseOp(torch.from_numpy(A))
    pytest.importorskip("numba")
    monkeypatch.setattr(passes, "LEAST", 0)
    places = np.divmod(np.arange(M * N), N)
    S = SparsityPattern(*places, (M, N))
    return lambda A: SparseOp(S, torch.from_numpy(A.ravel()))


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("preconditioned", [False, True], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_the_best_of_its_subspace(method, preconditioned, columns, operator):
    A, b, g = _draw(0, M, N), _draw(1, M, columns), None
    L = np.linalg.cholesky(A.conj().T @ A + np.diag(np.arange(1.0, N + 1)) * 8)
    L = L if preconditioned else np.eye(N)
    inverse = torch.from_numpy(np.linalg.inv(L @ L.conj().T))
    options = {"inverse": (lambda p: inverse @ p) if preconditioned else None}
    if method.endswith("g"):
        g = options["g"] = torch.from_numpy(_draw(2, N, columns))
    rhs = torch.from_numpy(b)
    state = METHODS[method](operator(A), rhs, scalars_for(rhs), **options)
    C = np.linalg.solve(L, A.conj().T).conj().T
    # A^H c + g is A^H of this
    whole = b if g is None else b + np.linalg.pinv(A).conj().T @ g.numpy()
    directions = {"lsmr": "h", "lsqr": "w"}.get(method, "p")
    _close(np.ravel(state.rnorm), np.linalg.norm(b, axis=0))
    _close(np.ravel(state.arnorm), np.linalg.norm(C.conj().T @ whole, axis=0))
    stretches = []
    for step in range(1, STEPS + 1):
        v = getattr(state, directions).numpy()
        lengths = np.linalg.norm(L.conj().T @ v, axis=0)
        stretches.append(np.linalg.norm(A @ v, axis=0) / lengths)
        state.step()
        _close(np.ravel(state.acond), np.max(stretches, 0) / np.min(stretches, 0))
        for i in range(columns):
            c = whole[:, i]
            V = _basis(C.conj().T @ c, lambda v: C.conj().T @ (C @ v), step + 1)
            y = _minimiser(C, c, V[:, :step], method == "lsmr")
            _close(L.conj().T @ state.x.numpy()[:, i], y)
            _close(np.ravel(state.rnorm)[i], np.linalg.norm(b[:, i] - C @ y))
            _close(np.ravel(state.arnorm)[i], np.linalg.norm(C.conj().T @ (c - C @ y)))
            if directions == "p":  # rows of the Lanczos matrix
                T = np.abs(V.conj().T @ C.conj().T @ C @ V)
                want = T[:step].sum(1).max() ** 0.5
            else:
                U = _basis(c, lambda u: C @ (C.conj().T @ u), step + 1)
                B = np.abs(U.conj().T @ C @ V)
                want = B.diagonal().max() + B.diagonal(-1).max()
            _close(np.ravel(state.anorm)[i], want)


@pytest.mark.parametrize("damped", [False, True])
def test_every_step_of_craigs_method_is_that_of_conjugate_gradients(damped, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(passes, "LEAST", 0)
    A, g = _draw(0, M, N), _draw(2, N, 1)
    op = SparseOp(
        SparsityPattern(*np.divmod(np.arange(M * N), N), (M, N)), torch.from_numpy(A.ravel())
    )
    if damped:
        damp = np.arange(1.0, N + 1)
        op, A = StackedOp(op, torch.from_numpy(damp)), np.vstack([A, np.diag(damp)])
    rhs = torch.zeros((len(A), 1), dtype=torch.complex128)
    state = Craig(op, rhs, scalars_for(rhs), g=torch.from_numpy(g))
    g, G = g[:, 0], A.conj().T @ A
    _close(state.arnorm, np.linalg.norm(g))
    U = _basis(g, lambda v: G @ v, STEPS + 1)
    V = np.linalg.qr(A @ U)[0]
    alpha, beta = (np.abs((V.conj().T @ A @ U).diagonal(k)) for k in (0, 1))
    stretches = []
    for step in range(1, STEPS + 1):
        state.step()
        part = U[:, :step]
        x = part @ np.linalg.solve(part.conj().T @ G @ part, part.conj().T @ g)
        _close(state.x.numpy()[:, 0], x)
        _close(state.rnorm, np.linalg.norm(A @ x))
        _close(state.arnorm, np.linalg.norm(g - G @ x))
        _close(state.anorm, alpha[:step].max() + beta[:step].max())
        d = state.d.numpy()[:, 0]
        _close(np.linalg.norm(A @ d), 1.0)
        stretches.append(1 / np.linalg.norm(d))
        _close(state.acond, max(stretches) / min(stretches))


@pytest.mark.parametrize("method", METHODS)
def test_columns_that_are_dropped_do_not_disturb_the_others(method):
    A, b = torch.from_numpy(_draw(0, M, N)), torch.from_numpy(_draw(1, M, 3))
    options = {"g": torch.from_numpy(_draw(2, N, 3))} if method.endswith("g") else {}
    whole, some = (METHODS[method](DenseOp(A), b, scalars_for(b), **options) for _ in range(2))
    for step in range(STEPS):
        if step == 2:
            kept = torch.tensor([2, 0])
            some.keep(kept)
            some.scalars.active = some.scalars.active[kept.numpy()]
        whole.step()
        some.step()
    torch.testing.assert_close(some.x, whole.x[:, [2, 0]])
    for name in ("rnorm", "arnorm", "anorm", "acond"):
        _close(getattr(some, name), getattr(whole, name)[[2, 0]])
