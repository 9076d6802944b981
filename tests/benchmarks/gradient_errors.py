"""How far gradients by kept factors are from exact ones: cholesky's beside SPQR's; no times."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import spsolve_triangular

import funclsq as fl
from funclsq.methods._needless import norms
from funclsq.methods._normal import Normal
from funclsq.methods._protocol import Options
from funclsq.methods.cholesky import prepare
from funclsq.operators import SparseOp
from tests.benchmarks.problems import PROBLEMS, Absent, Data, Problem, reference
from tests.benchmarks.suite import log

__all__ = ["gradient_errors"]


def gradient_errors(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Errors in the values and in b; solves of a gradient; its foretold correction by the true."""
    rows = []
    for name in names:
        try:
            problem = PROBLEMS[name]()
        except Absent as absent:
            log(f"{name}: left out: {absent}")
            continue
        data = problem.draw(3)
        _, *exact = reference(problem, data)
        found, solves = _ours(problem, data)
        try:
            rival = _errors(_by_spqr(problem, data), exact)
        except ImportError:
            rival = None
        row = {
            "problem": problem.name,
            "cholesky": _errors(found, exact),
            "SPQR": rival,
            "solves": solves,
            "foretold": _foretold(problem, data),
        }
        log(f"{name:16} {row}")
        rows.append(row)
    return rows


def _errors(found: list[np.ndarray], exact: list[np.ndarray]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


def _ours(problem: Problem, data: Data) -> tuple[list[np.ndarray], int]:
    """The gradients at full accuracy, and the solves with the factor that they took."""
    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
    values, b = (torch.from_numpy(a.copy()).requires_grad_() for a in (data.values, data.b))
    x = fl.lstsq(fl.Sparse(S, values), b, damp=problem.damp, solver="cholesky")
    made, solve = [], Normal.solve

    def counted(normal: Normal, q: torch.Tensor) -> torch.Tensor:
        made.append(q)
        return solve(normal, q)

    Normal.solve = counted  # type: ignore[method-assign]
    try:
        bars = torch.autograd.grad(x, (values, b), torch.from_numpy(data.x_bar))
    finally:
        Normal.solve = solve  # type: ignore[method-assign]
    return [bar.numpy() for bar in bars], len(made)


def _by_spqr(problem: Problem, data: Data) -> list[np.ndarray]:
    """The same through R of a sparse QR factorisation, columns scaled: z = R^-1 R^-T x_bar."""
    import sparseqr

    A, B = problem.matrix(data.values), problem.stacked(data.values).tocsc()
    m, n = A.shape
    scale = 1 / np.sqrt(np.asarray(B.multiply(B).sum(0)).ravel())
    b = np.zeros((B.shape[0], 1))
    b[:m, 0] = data.b
    Z, R, order, _ = sparseqr.rz(sp.coo_matrix(B @ sp.diags_array(scale)), b, tolerance=0)
    R = sp.csr_array(sp.csr_array(R)[:n])
    z, x = np.empty(n), np.empty(n)
    forth = spsolve_triangular(sp.csr_array(R.T), (scale * data.x_bar)[order], lower=True)
    z[order] = spsolve_triangular(R, forth, lower=False)
    x[order] = spsolve_triangular(R, np.asarray(Z).ravel()[:n], lower=False)
    z, x = scale * z, scale * x
    r, y = data.b - A @ x, A @ z
    row, col = problem.row, problem.A.indices
    return [r[row] * z[col] - y[row] * x[col], y]


def _foretold(problem: Problem, data: Data) -> float | None:
    """|B dz| as foretold for the gradient, by what it is; None where it is not foretold."""
    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
    op = SparseOp(S, torch.from_numpy(data.values.copy()))
    n = op.shape[1]
    damp = torch.full((n,), problem.damp, dtype=torch.float64) if problem.damp else None
    core = prepare(op, damp, Options())._problem.core  # type: ignore[union-attr]
    if core._known is None:
        return None
    B = core.normal.B
    c = torch.zeros(B.shape[0], 1, dtype=torch.float64)
    c[: op.shape[0], 0] = torch.from_numpy(data.b)
    core.solve(c, None)
    if core._known.response is None:
        return None
    g = core.normal.scale[:, None] * torch.from_numpy(data.x_bar)[:, None]
    q = g - B.rmv(B.mv(core._rough(g)))
    return float((core._known.response * norms(q) / norms(B.mv(core._rough(q)))).item())
