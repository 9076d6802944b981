"""What funclsq costs inside JAX: the bridge itself, and against the solvers of JAX libraries.

    python tests/benchmarks/jax_cost.py [--repeats 5] [--json FILE]

Every timed call of the comparison has new values, so nothing is found in a cache. Peers:
matfree lsmr, lineax LSMR, lineax Normal(CG) (all three on a gather-and-scatter product) and
jnp.linalg.lstsq.
"""

from __future__ import annotations

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

import funclsq as fl
import funclsq.jax as flj
from funclsq.jax import host

jax.config.update("jax_enable_x64", True)

TOL = 1e-10


def median(f, repeats, warm=3):
    for _ in range(warm):
        f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def overhead(repeats=1000):
    """Time of a jitted call beyond the torch solve inside it, small problem."""
    rng = np.random.default_rng(0)
    pattern = fl.SparsityPattern(*np.nonzero(rng.random((60, 10)) < 0.4), (60, 10))
    v, b = jnp.asarray(rng.standard_normal(pattern.nnz)), jnp.asarray(rng.standard_normal(60))
    f = jax.jit(lambda v, b: flj.lstsq(flj.Sparse(pattern, v), b))
    inside = []
    solve = host.raw_solve

    def timed(*args):
        start = time.perf_counter()
        out = solve(*args)
        inside.append(time.perf_counter() - start)
        return out

    host.raw_solve = timed
    try:
        for _ in range(20):
            f(v, b).block_until_ready()
        inside.clear()
        total = []
        for _ in range(repeats):
            start = time.perf_counter()
            f(v, b).block_until_ready()
            total.append(time.perf_counter() - start)
    finally:
        host.raw_solve = solve
    A = flj.Sparse(pattern, v)
    unjitted = median(lambda: flj.lstsq(A, b).block_until_ready(), repeats // 5)
    beyond = np.array(total) - np.array(inside)
    return {
        "jitted call, us": 1e6 * float(np.median(total)),
        "torch solve inside, us": 1e6 * float(np.median(inside)),
        "bridge beyond it, us": 1e6 * float(np.median(beyond)),
        "call outside jit, us": 1e6 * unjitted,
    }


def passes():
    """Time that a 100 MB operand costs beyond the solve, in passes over it."""
    m, n = 1_250_000, 10
    rng = np.random.default_rng(0)
    A, b = jnp.asarray(rng.standard_normal((m, n))), jnp.asarray(rng.standard_normal(m))
    one = median(lambda: float(host.torch.from_dlpack(A).sum()), 10)
    inside = []
    solve = host.raw_solve

    def timed(*args):
        start = time.perf_counter()
        out = solve(*args)
        inside.append(time.perf_counter() - start)
        return out

    host.raw_solve = timed
    try:
        f = jax.jit(lambda A, b: flj.lstsq(A, b, solver="qr", rank="full"))
        f(A, b).block_until_ready()
        inside.clear()
        start = time.perf_counter()
        f(A, b).block_until_ready()
        total = time.perf_counter() - start
    finally:
        host.raw_solve = solve
    return {
        "one pass, ms": 1e3 * one,
        "bridge beyond the solve, passes": (total - inside[-1]) / one,
    }


def problem(m, n, per_row, seed=0):
    """Random sparse problem; columns graded by 45."""
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(m), per_row)
    col = rng.integers(0, n, m * per_row)
    grade = np.exp(np.linspace(0, np.log(45.0), n))
    values = rng.standard_normal(row.size) / grade[col]
    return row, col, values, rng.standard_normal(m)


def contenders(row, col, shape, tol):
    """value-and-gradient functions of (values, b), by name."""
    import lineax as lx

    m, n = shape
    pattern = fl.SparsityPattern(row, col, shape)
    r, c = jnp.asarray(row), jnp.asarray(col)

    def matvec(v, x):
        return jnp.zeros(m).at[r].add(v * x[c])

    def dense(v):
        return jnp.zeros((m, n)).at[r, c].add(v)

    def through_lineax(solver):
        def x(v, b):
            op = lx.FunctionLinearOperator(
                lambda y: matvec(v, y), jax.ShapeDtypeStruct((n,), jnp.float64)
            )
            return lx.linear_solve(op, b, solver, throw=False).value

        return x

    out = {
        "funclsq auto": lambda v, b: flj.lstsq(flj.Sparse(pattern, v), b),
        "funclsq auto, tolerance of the peers": lambda v, b: flj.lstsq(
            flj.Sparse(pattern, v), b, atol=tol, btol=tol
        ),
        "the same, rank=full": lambda v, b: flj.lstsq(
            flj.Sparse(pattern, v), b, atol=tol, btol=tol, rank="full"
        ),
        "funclsq cholesky, rank=full": lambda v, b: flj.lstsq(
            flj.Sparse(pattern, v), b, solver="cholesky", rank="full"
        ),
        "lineax LSMR": through_lineax(lx.LSMR(rtol=tol, atol=tol, max_steps=5000)),
        "lineax Normal(CG)": through_lineax(lx.Normal(lx.CG(rtol=tol, atol=tol, max_steps=5000))),
    }
    try:
        from matfree import lstsq as matfree_lstsq

        lsmr = matfree_lstsq.lsmr(atol=tol, btol=tol, maxiter=5000, ctol=1e-14)

        def matfree(v, b):
            vecmat = lambda u, v: jnp.zeros(n).at[c].add(v * u[r])  # noqa: E731
            return lsmr(vecmat, b, v)[0]

        out["matfree lsmr"] = matfree
    except ImportError:
        pass
    if m * n <= 2_000_000:
        out["jnp.linalg.lstsq"] = lambda v, b: jnp.linalg.lstsq(dense(v), b)[0]
    return out


def loss(solve, v, b):
    """||x||^2, and x."""
    x = solve(v, b)
    return (x**2).sum(), x


def compare(m, n, per_row, repeats):
    """First call, and median of value-and-gradient on new values, for every contender."""
    row, col, values, b = problem(m, n, per_row)
    import scipy.sparse as sp

    b = jnp.asarray(b)
    rng = np.random.default_rng(1)
    rows = {}
    fresh = [
        jnp.asarray(values * (1 + 0.1 * rng.standard_normal(values.size))) for _ in range(repeats)
    ]
    matrices = [sp.csr_array((np.asarray(v), (row, col)), (m, n)) for v in fresh]
    for name, solve in contenders(row, col, (m, n), TOL).items():
        f = jax.jit(jax.value_and_grad(functools.partial(loss, solve), has_aux=True))
        try:
            start = time.perf_counter()
            jax.block_until_ready(f(jnp.asarray(values), b))
            first = time.perf_counter() - start
            times, errors = [], []
            for v, A in zip(fresh, matrices):
                start = time.perf_counter()
                (_, x), g = jax.block_until_ready(f(v, b))
                times.append(time.perf_counter() - start)
                resid = A.T @ (np.asarray(b) - A @ np.asarray(x))
                errors.append(np.linalg.norm(resid) / np.linalg.norm(A.T @ np.asarray(b)))
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
            continue
        rows[name] = {
            "first call, s": first,
            "value and gradient, s": float(np.median(times)),
            "||A'r|| / ||A'b||": float(np.max(errors)),
        }
    return rows


def main():
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()
    tables = {"overhead": overhead(), "100 MB operand": passes()}
    for shape in ((1850, 712, 5), (20000, 2000, 10)):
        tables["{} x {}, {} per row".format(*shape)] = compare(*shape, args.repeats)
    for title, table in tables.items():
        print(f"\n{title}")
        for name, value in table.items():
            if isinstance(value, dict):
                value = "  ".join(
                    f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
                )
            else:
                value = f"{value:.3g}"
            print(f"  {name:32s} {value}")
    if args.json:
        with open(args.json, "w") as stream:
            json.dump(tables, stream, indent=1)


if __name__ == "__main__":
    main()
