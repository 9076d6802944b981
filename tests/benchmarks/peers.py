"""The contestants: this library in several settings, and the libraries it is measured against.

A contestant is prepared for a problem (the pattern is known) and then called with the numbers
of one repetition. It returns x, or x with the cotangents of the values and of b. Peers are used
as their documentation recommends, with the best sparse product that their framework has, and
with a tolerance that the suite chooses so that the error reached is the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch

import funclsq as fl
from tests.benchmarks.problems import Data, Problem

__all__ = ["CONTESTANTS", "Contestant"]

Answer = tuple[Any, ...]
Run = Callable[[Data], Answer]
Prepare = Callable[[Problem, bool, float], Run]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """``prepare(problem, gradient, tol)`` returns the function that is timed."""

    name: str
    prepare: Prepare
    tolerances: tuple[float, ...] = (0.0,)  # tried from the loosest on; (0,) has none to choose
    needs: str = ""

    @property
    def available(self) -> bool:
        try:
            __import__(self.needs or "torch")
        except ImportError:
            return False
        return True


LADDER = tuple(10.0**-p for p in range(6, 16))


# This library


def ours(problem: Problem, gradient: bool, tol: float, **options: Any) -> Run:
    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
    options = {"damp": problem.damp, **options}
    if tol:
        options |= {"atol": tol, "btol": tol}

    def run(data: Data) -> Answer:
        values, b = torch.from_numpy(data.values), torch.from_numpy(data.b)
        if not gradient:
            return (fl.lstsq(fl.Sparse(S, values), b, **options),)
        values.requires_grad_()
        b.requires_grad_()
        x = fl.lstsq(fl.Sparse(S, values), b, **options)
        return x.detach(), *torch.autograd.grad(x, (values, b), torch.from_numpy(data.x_bar))

    return run


def ours_jax(problem: Problem, gradient: bool, tol: float, **options: Any) -> Run:
    jax, jnp = _jax()
    import funclsq.jax as flj

    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
    options = {"damp": problem.damp, **options}
    if tol:
        options |= {"atol": tol, "btol": tol}

    def solve(values, b):
        return flj.lstsq(flj.Sparse(S, values), b, **options)

    return _jax_run(jax, jnp, solve, gradient)


# SciPy


def scipy_lsmr(problem: Problem, gradient: bool, tol: float, scaled: bool, method=spla.lsmr) -> Run:
    """Column by column; the gradient by three solves by hand, as users write it."""
    row, col = problem.row, problem.A.indices
    n = problem.A.shape[1]
    m = problem.A.shape[0]

    def each(A, B):
        return np.stack([_lsmr(method, A, c, tol) for c in B.T], 1)

    def run(data: Data) -> Answer:
        A = problem.stacked(data.values)
        s = 1 / np.sqrt(np.asarray((A * A).sum(0)).ravel()) if scaled else np.ones(n)
        S = A @ sp.diags_array(s) if scaled else A
        s = s[:, None]
        b = data.b.reshape(m, -1)
        full = np.vstack([b, np.zeros((A.shape[0] - m, b.shape[1]))])
        x = s * each(S, full)
        shape = data.x_bar.shape
        if not gradient:
            return (x.reshape(shape),)
        y = each(S.T.tocsr(), s * data.x_bar.reshape(n, -1))
        z = s * each(S, y)
        r, y = (full - A @ x)[:m], y[:m]
        values_bar = (r[row] * z[col] - y[row] * x[col]).sum(1)
        return x.reshape(shape), values_bar, y.reshape(data.b.shape)

    return run


def _lsmr(method: Any, A: Any, b: np.ndarray, tol: float) -> np.ndarray:
    count = 20 * max(A.shape)
    cap = {"maxiter": count} if method is spla.lsmr else {"iter_lim": count}
    return method(A, b, atol=tol, btol=tol, conlim=0, **cap)[0]


def cholmod(problem: Problem, gradient: bool, tol: float) -> Run:
    """Normal equations by CHOLMOD, analysed once, refactored, refined once; z by two more."""
    from sksparse.cholmod import analyze_AAt

    first = problem.stacked(problem.A.data).T.tocsc()
    factor = analyze_AAt(first)
    row, col, (m, n) = problem.row, problem.A.indices, problem.A.shape

    def run(data: Data) -> Answer:
        A = problem.stacked(data.values)
        AT = A.T  # CSC
        factor.cholesky_AAt_inplace(sp.csc_matrix(AT))
        b = data.b.reshape(m, -1)
        full = np.vstack([b, np.zeros((A.shape[0] - m, b.shape[1]))])
        x = factor(AT @ full)
        x += factor(AT @ (full - A @ x))
        shape = data.x_bar.shape
        if not gradient:
            return (x.reshape(shape),)
        g = data.x_bar.reshape(n, -1)
        z = factor(g)
        z += factor(g - AT @ (A @ z))
        r, y = (full - A @ x)[:m], (A @ z)[:m]
        values_bar = (r[row] * z[col] - y[row] * x[col]).sum(1)
        return x.reshape(shape), values_bar, y.reshape(data.b.shape)

    return run


def spqr(problem: Problem, gradient: bool, tol: float) -> Run:
    """Sparse QR, x only."""
    import sparseqr

    if gradient:
        raise NotImplementedError("x only")

    def run(data: Data) -> Answer:
        A = problem.stacked(data.values).tocoo()
        b = np.zeros((A.shape[0], problem.k))
        b[: problem.A.shape[0]] = data.b.reshape(-1, problem.k)
        x = sparseqr.solve(A, b, tolerance=0)
        return (np.asarray(x).reshape(data.x_bar.shape),)

    return run


# torch


def torchsparsegradutils(problem: Problem, gradient: bool, tol: float) -> Run:
    from torchsparsegradutils import sparse_generic_lstsq
    from torchsparsegradutils.utils import lsmr

    first = problem.stacked(problem.A.data)
    stacked = first.tocoo()
    row = np.repeat(np.arange(first.shape[0]), np.diff(first.indptr))
    place = torch.from_numpy(np.stack([row, first.indices]).astype(np.int64))
    mine = torch.from_numpy(_entries_of(problem))
    m, n = problem.A.shape
    maxiter = 20 * max(stacked.shape)

    def columns(solve, A, B):
        if B.ndim == 1:
            return solve(A, B)
        return torch.stack([solve(A, B[:, i]) for i in range(B.shape[1])], 1)

    def forth(A, b):
        return lsmr(A, b, atol=tol, btol=tol, conlim=1e15, maxiter=maxiter)[0]

    def back(A, b):
        return lsmr(torch.adjoint(A), b, A, atol=tol, btol=tol, conlim=1e15, maxiter=maxiter)[0]

    def run(data: Data) -> Answer:
        values = torch.from_numpy(problem.stacked(data.values).data)
        A = torch.sparse_coo_tensor(place, values, stacked.shape, is_coalesced=True)
        b = torch.zeros((stacked.shape[0], *data.b.shape[1:]), dtype=torch.float64)
        b[:m] = torch.from_numpy(data.b)
        A.requires_grad_(gradient)
        b.requires_grad_(gradient)
        x = sparse_generic_lstsq(
            A, b, functools.partial(columns, forth), functools.partial(columns, back)
        )
        if not gradient:
            return (x,)
        A_bar, b_bar = torch.autograd.grad(x, (A, b), torch.from_numpy(data.x_bar))
        A_bar = A_bar.coalesce().values()
        return x.detach(), A_bar[mine], b_bar[:m]

    return run


def _entries_of(problem: Problem) -> np.ndarray:
    """Where the entries of A are among those of [A; damp I]: the first ones."""
    return np.arange(problem.A.nnz)


DENSE = 3_000_000  # entries up to which a matrix is written out for the dense solvers


def torch_dense(problem: Problem, gradient: bool, tol: float) -> Run:
    """torch.linalg.lstsq (LAPACK gelsy, its default) on [A; damp I] written out."""
    m, n = _written_out(problem)
    row, col = torch.from_numpy(problem.row).long(), torch.from_numpy(problem.A.indices).long()

    def run(data: Data) -> Answer:
        A = torch.zeros((m, n), dtype=torch.float64)
        A[row, col] = torch.from_numpy(data.values)
        b = torch.from_numpy(data.b.reshape(m, -1))
        A.requires_grad_(gradient)
        b.requires_grad_(gradient)
        full, rhs = A, b
        if problem.damp:
            full = torch.cat([A, problem.damp * torch.eye(n, dtype=A.dtype)])
            rhs = torch.cat([b, b.new_zeros((n, b.shape[1]))])
        x = torch.linalg.lstsq(full, rhs).solution
        shape = data.x_bar.shape
        if not gradient:
            return (x.reshape(shape),)
        x_bar = torch.from_numpy(data.x_bar.reshape(n, -1))
        A_bar, b_bar = torch.autograd.grad(x, (A, b), x_bar)
        return x.detach().reshape(shape), A_bar[row, col], b_bar.reshape(data.b.shape)

    return run


def jax_dense(problem: Problem, gradient: bool, tol: float) -> Run:
    """jnp.linalg.lstsq (by the SVD) on [A; damp I] written out."""
    jax, jnp = _jax()
    m, n = _written_out(problem)
    row, col = jnp.asarray(problem.row), jnp.asarray(problem.A.indices)

    def solve(values, b):
        A = jnp.zeros((m, n)).at[row, col].set(values)
        if problem.damp:
            A = jnp.concatenate([A, problem.damp * jnp.eye(n)])
            b = jnp.concatenate([b, jnp.zeros((n, *b.shape[1:]))])
        return jnp.linalg.lstsq(A, b)[0]

    return _jax_run(jax, jnp, solve, gradient)


def _written_out(problem: Problem) -> tuple[int, int]:
    m, n = problem.A.shape
    if m * n > DENSE:
        raise NotImplementedError("too large to write out")
    return m, n


# JAX


def _jax() -> tuple[Any, Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax, jax.numpy


def _jax_run(jax: Any, jnp: Any, solve: Callable[..., Any], gradient: bool) -> Run:
    def both(values, b, x_bar):
        x, pull = jax.vjp(solve, values, b)
        return x, *pull(x_bar)

    forward, both = jax.jit(solve), jax.jit(both)

    def run(data: Data) -> Answer:
        values, b = jnp.asarray(data.values), jnp.asarray(data.b)
        if not gradient:
            return (jax.block_until_ready(forward(values, b)),)
        return jax.block_until_ready(both(values, b, jnp.asarray(data.x_bar)))

    return run


def _jax_product(problem: Problem, jax: Any, jnp: Any) -> Callable[..., Any]:
    """[A; damp I] v by gather and segment sum, rows sorted: the fastest on this CPU."""
    row, col = jnp.asarray(problem.row), jnp.asarray(problem.A.indices)
    m = problem.A.shape[0]

    def product(v, values):
        out = jax.ops.segment_sum(values * v[col], row, num_segments=m, indices_are_sorted=True)
        return jnp.concatenate([out, problem.damp * v]) if problem.damp else out

    return product


def _jax_columns(problem: Problem, jax: Any, jnp: Any, one: Callable[..., Any]):
    n = problem.A.shape[1]

    def solve(values, b):
        if problem.damp:
            b = jnp.concatenate([b, jnp.zeros((n, *b.shape[1:]))])
        if b.ndim == 1:
            return one(values, b)
        return jax.lax.map(lambda c: one(values, c), b.T).T

    return solve


def matfree(problem: Problem, gradient: bool, tol: float) -> Run:
    jax, jnp = _jax()
    from matfree import lstsq

    product = _jax_product(problem, jax, jnp)
    n = problem.A.shape[1]
    solver = lstsq.lsmr(atol=tol, btol=tol, ctol=1e-15, maxiter=200_000, is_full_rank=True)

    def one(values, b):
        def vecmat(u, values):
            zero = jnp.zeros((n,))
            return jax.linear_transpose(lambda v: product(v, values), zero)(u)[0]

        return solver(vecmat, b, values)[0]

    return _jax_run(jax, jnp, _jax_columns(problem, jax, jnp, one), gradient)


def lineax(problem: Problem, gradient: bool, tol: float, normal: bool) -> Run:
    jax, jnp = _jax()
    import lineax as lx

    product = _jax_product(problem, jax, jnp)
    n = problem.A.shape[1]
    if normal:
        solver = lx.Normal(lx.CG(rtol=tol, atol=tol, max_steps=200_000))
    else:
        solver = lx.LSMR(rtol=tol, atol=tol, conlim=1e15, max_steps=200_000)
    like = jax.ShapeDtypeStruct((n,), jnp.float64)

    def one(values, b):
        operator = lx.FunctionLinearOperator(lambda v: product(v, values), like)
        return lx.linear_solve(operator, b, solver, throw=False).value

    return _jax_run(jax, jnp, _jax_columns(problem, jax, jnp, one), gradient)


def _with(prepare: Callable[..., Run], **settings: Any) -> Prepare:
    return functools.partial(prepare, **settings)


CONTESTANTS: dict[str, Contestant] = {
    c.name: c
    for c in (
        Contestant("funclsq", ours),
        Contestant("funclsq at this error", ours, LADDER),
        Contestant("funclsq lsmr", _with(ours, solver="lsmr", rank="full"), LADDER),
        Contestant("funclsq lsmr, rank unknown", _with(ours, solver="lsmr"), LADDER),
        Contestant("funclsq lsqr", _with(ours, solver="lsqr", rank="full"), LADDER),
        Contestant("funclsq cgls", _with(ours, solver="cgls", rank="full"), LADDER),
        Contestant("funclsq cholesky", _with(ours, solver="cholesky")),
        Contestant("funclsq qr", _with(ours, solver="qr")),
        Contestant("funclsq.jax", ours_jax, needs="jax"),
        Contestant("funclsq.jax lsmr", _with(ours_jax, solver="lsmr", rank="full"), LADDER, "jax"),
        Contestant("SciPy lsmr", _with(scipy_lsmr, scaled=False), LADDER),
        Contestant("SciPy lsmr scaled by hand", _with(scipy_lsmr, scaled=True), LADDER),
        Contestant("SciPy lsqr", _with(scipy_lsmr, scaled=False, method=spla.lsqr), LADDER),
        Contestant("torchsparsegradutils", torchsparsegradutils, LADDER, "torchsparsegradutils"),
        Contestant("matfree lsmr", matfree, LADDER, "matfree"),
        Contestant("lineax LSMR", _with(lineax, normal=False), LADDER, "lineax"),
        Contestant("lineax Normal(CG)", _with(lineax, normal=True), LADDER, "lineax"),
        Contestant("torch.linalg.lstsq", torch_dense),
        Contestant("jnp.linalg.lstsq", jax_dense, needs="jax"),
        Contestant("CHOLMOD", cholmod, needs="sksparse.cholmod"),
        Contestant("SPQR", spqr, needs="sparseqr"),
    )
}
warnings.filterwarnings("ignore", category=fl.FunclsqWarning)  # the error column says it
