"""Many problems of one pattern: a batch, vmap, a Python loop, dense batches of torch and JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import funclsq as fl
from tests.benchmarks.problems import Problem, random_rows
from tests.benchmarks.suite import error, log
from tests.benchmarks.timing import Entry, interleave

__all__ = ["compare_batches", "one_pattern", "torch_runs"]

LOOPED = 40  # members that the loop over lstsq is timed on


def compare_batches(count: int, repetitions: int) -> list[dict[str, Any]]:
    """``count`` problems of 200 x 50 with 5 per row: x, values_bar and b_bar."""
    problem = one_pattern()
    m, n = problem.A.shape
    runs, draw = torch_runs(problem, count)
    runs |= _jax_runs(problem, count)
    data = draw(0)
    exact = tuple(t.detach().numpy() for t in runs["torch.linalg.qr, dense batch"](data))
    entries = []
    for name, run in runs.items():
        answer = run(data)
        part = tuple(t[: len(answer[0])] for t in exact)
        entries.append(Entry(name, error=error(answer, part)))
    times = interleave(runs, draw, repetitions)
    times["funclsq, a loop"] = [t * count / LOOPED for t in times["funclsq, a loop"]]
    rows = []
    for entry in entries:
        entry.seconds = times[entry.name]
        log(f"batch of {count}: {entry.name:36} {entry.median:9.4f} s  error {entry.error:.1e}")
        rows.append(
            {
                "problem": f"batch-{count}",
                "title": f"{count} problems of {m} x {n}, 5 per row",
                "work": "x and gradient",
                "contestant": entry.name,
                "seconds": entry.seconds,
                "error": entry.error,
                "tol": 0.0,
                "note": f"timed on {LOOPED} members" if "loop" in entry.name else "",
            }
        )
    return rows


def one_pattern() -> Problem:
    """200 x 50 with 5 per row: small, so that what a call costs besides its work counts."""
    return Problem("batch", random_rows(200, 50, 5, spread=0.0))


def torch_runs(
    problem: Problem, count: int, device: str = "cpu"
) -> tuple[dict[str, Callable[[Any], Any]], Callable[[int], tuple[torch.Tensor, ...]]]:
    """What this library and torch do with ``count`` problems, and the numbers for it by seed."""
    m, n = problem.A.shape
    row = torch.from_numpy(problem.row).to(device)
    col = torch.from_numpy(problem.A.indices).long().to(device)
    S = fl.SparsityPattern(problem.row, problem.A.indices, (m, n))

    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        sizes = ((count, problem.A.nnz), (count, m), (count, n))
        return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(device) for s in sizes)

    def gradient(x, inputs, x_bar):
        return x.detach(), *torch.autograd.grad(x, inputs, x_bar)

    def batch(data):
        values, b, x_bar = (t.detach().requires_grad_() for t in data)
        x = fl.lstsq(fl.Sparse(S, values), b.unsqueeze(-1)).squeeze(-1)
        return gradient(x, (values, b), x_bar.detach())

    def one(values, b):
        return fl.lstsq(fl.Sparse(S, values), b)

    def vmapped(data):
        values, b, x_bar = (t.detach().requires_grad_() for t in data)
        return gradient(torch.func.vmap(one)(values, b), (values, b), x_bar.detach())

    def loop(data):
        out = []
        for values, b, x_bar in zip(*(t[:LOOPED] for t in data)):
            values, b = values.detach().requires_grad_(), b.detach().requires_grad_()
            out.append(gradient(one(values, b), (values, b), x_bar))
        return tuple(torch.stack(parts) for parts in zip(*out))

    def written_out(data):
        values, b, x_bar = data
        A = torch.zeros((count, m, n), dtype=torch.float64, device=device)
        A[:, row, col] = values
        return A.requires_grad_(), b.detach().unsqueeze(-1).requires_grad_(), x_bar.unsqueeze(-1)

    def sampled(x, A, b, x_bar):
        x, A_bar, b_bar = gradient(x, (A, b), x_bar)
        return x.squeeze(-1), A_bar[:, row, col], b_bar.squeeze(-1)

    def dense_qr(data):
        A, b, x_bar = written_out(data)
        Q, R = torch.linalg.qr(A)
        return sampled(torch.linalg.solve_triangular(R, Q.mT @ b, upper=True), A, b, x_bar)

    def dense_cholesky(data):
        A, b, x_bar = written_out(data)
        L = torch.linalg.cholesky(A.mT @ A)
        return sampled(torch.cholesky_solve(A.mT @ b, L), A, b, x_bar)

    runs = {
        "funclsq, a batch": batch,
        "funclsq, vmap": vmapped,
        "funclsq, a loop": loop,
        "torch.linalg.qr, dense batch": dense_qr,
        "torch.linalg.cholesky, dense batch": dense_cholesky,
    }
    return runs, draw


def _jax_runs(problem: Problem, count: int) -> dict[str, Any]:
    try:
        import jax
    except ImportError:
        return {}
    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    import funclsq.jax as flj

    # No jnp.linalg.qr: of 1000 such matrices it never returns (jaxlib 0.10.2, two cores, without
    # this library in the process too).
    m, n = problem.A.shape
    row, col = np.asarray(problem.row), np.asarray(problem.A.indices)
    S = fl.SparsityPattern(row, col, (m, n))

    def normal(values, b):
        A = jnp.zeros((m, n)).at[row, col].set(values)
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(A.T @ A), True), A.T @ b)

    def sparse(values, b):
        return flj.lstsq(flj.Sparse(S, values), b)

    def timed(one):
        def both(values, b, x_bar):
            x, pull = jax.vjp(jax.vmap(one), values, b)
            return x, *pull(x_bar)

        both = jax.jit(both)

        def run(data):
            return jax.block_until_ready(both(*(jnp.asarray(t.numpy()) for t in data)))

        return run

    return {
        "funclsq.jax, vmap": timed(sparse),
        "JAX Cholesky of A^T A, vmap": timed(normal),
    }
