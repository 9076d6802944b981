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
import torch
from jax.experimental.buffer_callback import buffer_callback

import funclsq as fl
import funclsq.jax as flj
from funclsq import raw
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


def overhead(repeats=600):
    """Time of a jitted call beyond the torch solve inside it, small problem, new values each time.

    The same raw solve is called from Python on torch tensors of the same data, in turns with the
    jitted call, and with a callback of the same operands and results that does nothing.
    """
    rng = np.random.default_rng(0)
    pattern = fl.SparsityPattern(*np.nonzero(rng.random((60, 10)) < 0.4), (60, 10))
    data = [(rng.standard_normal(pattern.nnz), rng.standard_normal(60)) for _ in range(repeats)]
    f = jax.jit(lambda v, b: flj.lstsq(flj.Sparse(pattern, v), b))
    results = [jax.ShapeDtypeStruct(s, jnp.float64) for s in ((10, 1), (60, 1), (1, 8), ())]
    nothing = jax.jit(
        lambda v, b: buffer_callback(lambda *_: None, results)(v, b[:, None])[0][:, 0]
    )
    plan = plan_inside(f, *map(jnp.asarray, data[0]))
    calls = {
        "jitted call": lambda v, b: f(v, b).block_until_ready(),
        "the torch solve alone": lambda v, b: raw.raw_solve(plan, (v,), None, None, b, None),
        "a callback that does nothing": lambda v, b: nothing(v, b).block_until_ready(),
        "fl.lstsq in torch": lambda v, b: fl.lstsq(fl.Sparse(pattern, v), b),
        "flj.lstsq outside jit": lambda v, b: flj.lstsq(
            flj.Sparse(pattern, v), b
        ).block_until_ready(),
    }
    times = {name: [] for name in calls}
    for v, b in data:
        tensors = torch.from_numpy(v), torch.from_numpy(b)
        for name, call in calls.items():
            operands = tensors if "torch" in name else tuple(map(jnp.asarray, (v, b)))
            if name == "the torch solve alone":
                operands = tensors[0], tensors[1].unsqueeze(1)
            raw.clear_cache()
            start = time.perf_counter()
            call(*operands)
            times[name].append(time.perf_counter() - start)
    times = {name: 1e6 * np.array(t[20:]) for name, t in times.items()}
    out = {f"{name}, us": float(np.median(t)) for name, t in times.items()}
    beyond = times["jitted call"] - times["the torch solve alone"]
    out["bridge beyond the torch solve, us"] = float(np.median(beyond))
    low = [np.percentile(times[n], 5) for n in ("jitted call", "the torch solve alone")]
    out["the same at the 5th percentiles, us"] = float(low[0] - low[1])
    return out


def plan_inside(f, *operands):
    """The plan with which a jitted function calls the torch core."""
    seen = []
    solve = host.raw_solve
    host.raw_solve = lambda plan, *rest: seen.append(plan) or solve(plan, *rest)
    try:
        f(*operands).block_until_ready()
    finally:
        host.raw_solve = solve
    return seen[0]


def passes(repeats=5):
    """Time that a 100 MB operand costs beyond the solve, in passes over it, on new values."""
    m, n = 1_250_000, 10
    rng = np.random.default_rng(0)
    A, b = jnp.asarray(rng.standard_normal((m, n))), jnp.asarray(rng.standard_normal(m))
    one = median(lambda: float(torch.from_dlpack(A).sum()), 10)
    f = jax.jit(lambda A, b: flj.lstsq(A, b, solver="qr", rank="full"))
    jitted, method = [], []
    prepare = raw.registry.prepare

    def timed(*args):
        start = time.perf_counter()
        prepared = prepare(*args)
        solve = prepared.solve
        inside = [time.perf_counter() - start]

        def timed_solve(c, g):
            start = time.perf_counter()
            out = solve(c, g)
            method.append(inside[0] + time.perf_counter() - start)
            return out

        prepared.solve = timed_solve
        return prepared

    raw.registry.prepare = timed
    try:
        for i in range(repeats + 1):
            B = (A * (1.0 + i)).block_until_ready()
            start = time.perf_counter()
            f(B, b).block_until_ready()
            jitted.append(time.perf_counter() - start)
    finally:
        raw.registry.prepare = prepare
        raw.clear_cache()
    beyond = np.array(jitted[1:]) - np.array(method[1:])
    return {
        "one pass, ms": 1e3 * one,
        "the method itself, ms": 1e3 * float(np.median(method)),
        "everything beyond it, passes": float(np.median(beyond)) / one,
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
