"""What funclsq costs inside JAX: the bridge itself, and against the solvers of JAX libraries.

    python tests/benchmarks/jax_cost.py [--repeats 5] [--starts 3] [--json FILE] [--cpu]

Every timed call of the comparison has new values, so nothing is found in a cache; the first call is
made in processes of its own, which have compiled nothing of the kind before. Peers:
matfree lsmr, lineax LSMR, lineax Normal(CG) (all three on a gather-and-scatter product) and
jnp.linalg.lstsq.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

import funclsq as fl
import funclsq.jax as flj
from funclsq import raw
from funclsq.jax import host
from funclsq.jax.host_primitive import bare_call

jax.config.update("jax_enable_x64", True)

clock = time.perf_counter
TOL = 1e-10
OURS = "funclsq"


def median(f, repeats, warm=3):
    for _ in range(warm):
        f()
    times = []
    for _ in range(repeats):
        start = clock()
        f()
        times.append(clock() - start)
    return float(np.median(times))


def overhead(repeats=1500):
    """Microseconds of a jitted call beyond the torch solve inside it, small problem, new values.

    A loop of such calls, the solve timed inside each; then loops of each of the other things, and
    of the jitted call and the same solve made from Python, in turns. Differences are taken call by
    call. JAX's own share is a jitted host call that does nothing, after a solve that has filled
    the caches as ours has; last the jitted call with its solve replaced by an answer at hand.
    """
    rng = np.random.default_rng(0)
    pattern = fl.SparsityPattern(*np.nonzero(rng.random((60, 10)) < 0.4), (60, 10))
    data = [(rng.standard_normal(pattern.nnz), rng.standard_normal(60)) for _ in range(repeats)]
    in_torch = [tuple(map(torch.from_numpy, pair)) for pair in data]
    in_jax = [tuple(map(jnp.asarray, pair)) for pair in data]
    result = [jax.ShapeDtypeStruct((10, 1), jnp.float64)]
    f = jax.jit(lambda v, b: flj.lstsq(flj.Sparse(pattern, v), b))
    nothing = jax.jit(lambda v, b: bare_call(lambda *_: (), result, (v, b[:, None]))[0][:, 0])
    plan, settings, found = solve_inside(f, *in_jax[0])
    solve, inside = host.raw_solve, []

    def timed(*args):
        start = clock()
        out = solve(*args)
        inside.append(clock() - start)
        return out

    def call(i):
        f(*in_jax[i]).block_until_ready()

    def same(i):
        v, b = in_torch[i]
        solve(plan, (v,), None, None, b.unsqueeze(1), None, *settings)

    def jax_alone(i):
        nothing(*in_jax[i]).block_until_ready()

    def outside_jit(i):
        v, b = in_jax[i]
        flj.lstsq(flj.Sparse(pattern, v), b).block_until_ready()

    def torch_call(i):
        v, b = in_torch[i]
        fl.lstsq(fl.Sparse(pattern, v), b)

    with replaced_solve(timed):
        (calls,) = in_turns(repeats, call)
    inside = np.array(inside)
    turns = in_turns(repeats, call, same)
    columns = {
        "jitted call": calls,
        "the torch solve inside it": inside,
        "jitted call beyond the torch solve inside it": calls - inside,
        "a host call that does nothing, after a solve (JAX's own)": in_turns(
            repeats, same, jax_alone
        )[1],
        "jitted call beyond the same solve called alone, in turns": turns[0] - turns[1],
        "flj.lstsq outside jit": in_turns(repeats, outside_jit)[0],
        "fl.lstsq in torch": in_turns(repeats, torch_call)[0],
    }
    with replaced_solve(lambda *_: found):
        columns["jitted call, an answer at hand for its solve"] = in_turns(repeats, call)[0]
    return {
        name: {
            "median": 1e6 * np.median(t[20:]),
            "10th percentile": 1e6 * np.percentile(t[20:], 10),
        }
        for name, t in columns.items()
    }


def in_turns(repeats, *calls):
    """Seconds of each call with the numbers 0, 1, ...; nothing is kept from the call before."""
    times = np.empty((len(calls), repeats))
    for i in range(repeats):
        for row, call in zip(times, calls):
            raw.clear_cache()
            start = clock()
            call(i)
            row[i] = clock() - start
    return times


@contextlib.contextmanager
def replaced_solve(other):
    """Let host calls run another solve."""
    solve = host.raw_solve
    host.raw_solve = other
    try:
        yield
    finally:
        host.raw_solve = solve


def solve_inside(f, *operands):
    """The plan and settings with which a jitted function calls the torch core, and its answer."""
    seen = []
    solve = host.raw_solve

    def spy(plan, params, w, d2, c, g, *settings):
        seen.append((plan, settings, solve(plan, params, w, d2, c, g, *settings)))
        return seen[-1][-1]

    with replaced_solve(spy):
        f(*operands).block_until_ready()
    return seen[0]


def passes(repeats=7):
    """Time that a 100 MB operand costs beyond the solve, in passes over it, on new values.

    The solve is the preparation of the method and its application, timed inside; what it made is
    held until the clock has stopped.
    """
    m, n = 1_250_000, 10
    rng = np.random.default_rng(0)
    A, b = jnp.asarray(rng.standard_normal((m, n))), jnp.asarray(rng.standard_normal(m))
    one = median(lambda: float(torch.from_dlpack(A).sum()), 10)
    forward = jax.jit(lambda A, b: flj.lstsq(A, b, solver="qr", rank="full"))
    held, inside = [], []
    prepare = raw.registry.prepare

    def timed(*args):
        start = clock()
        prepared = prepare(*args)
        solve = prepared.solve
        inside.append(clock() - start)

        def timed_solve(c, g):
            start = clock()
            out = solve(c, g)
            inside.append(clock() - start)
            return out

        prepared.solve = timed_solve
        held.append(prepared)
        return prepared

    beyond, method = [], []
    raw.registry.prepare = timed
    try:
        for i in range(repeats + 1):
            B = (A * (1.0 + i)).block_until_ready()
            inside.clear()
            start = clock()
            x = forward(B, b).block_until_ready()
            beyond.append(clock() - start - sum(inside))
            method.append(sum(inside))
            held.clear()
            del x
    finally:
        raw.registry.prepare = prepare
        raw.clear_cache()
    return {
        "one pass, ms": 1e3 * one,
        "the method itself, ms": 1e3 * float(np.median(method[1:])),
        "everything beyond it, passes": float(np.median(beyond[1:])) / one,
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
        "funclsq auto, the same and rank=full": lambda v, b: flj.lstsq(
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


def first_call(name, m, n, per_row):
    """Seconds of the first value-and-gradient, compilation included; JAX has compiled before."""
    row, col, values, b = problem(m, n, per_row)
    values, b = jnp.asarray(values), jnp.asarray(b)
    jax.block_until_ready(values + 1)
    solve = contenders(row, col, (m, n), TOL)[name]
    f = jax.jit(jax.value_and_grad(functools.partial(loss, solve), has_aux=True))
    start = clock()
    jax.block_until_ready(f(values, b))
    return clock() - start


def first_calls(name, shape, starts):
    """Median of the first call in that many processes of its own, each with nothing compiled."""
    how = "jax_cost.clock = time.process_time;" if clock is time.process_time else ""
    code = f"import time, jax_cost; {how} print(jax_cost.first_call({name!r}, *{shape!r}))"
    here = os.path.dirname(os.path.abspath(__file__))
    found = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(starts)
    ]
    return float(np.median([float(text.split()[-1]) for text in found]))


def compare(m, n, per_row, repeats, starts):
    """First call, and median of value-and-gradient on new values in turns, for every contender."""
    row, col, values, b = problem(m, n, per_row)
    import scipy.sparse as sp

    values, b = jnp.asarray(values), jnp.asarray(b)
    rng = np.random.default_rng(1)
    rows, programs = {}, {}
    for name, solve in contenders(row, col, (m, n), TOL).items():
        f = jax.jit(jax.value_and_grad(functools.partial(loss, solve), has_aux=True))
        try:
            jax.block_until_ready(f(values, b))
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
            continue
        rows[name] = {FIRST: first_calls(name, (m, n, per_row), starts)} if starts else {}
        programs[name] = f
    times, errors = ({name: [] for name in programs} for _ in range(2))
    for _ in range(repeats):
        v = values * (1 + 0.1 * rng.standard_normal(values.size))
        A = sp.csr_array((np.asarray(v), (row, col)), (m, n))
        for name, f in programs.items():
            start = clock()
            (_, x), _ = jax.block_until_ready(f(v, b))
            times[name].append(clock() - start)
            resid = A.T @ (np.asarray(b) - A @ np.asarray(x))
            errors[name].append(np.linalg.norm(resid) / np.linalg.norm(A.T @ np.asarray(b)))
    for name in programs:
        rows[name] |= {TIME: float(np.median(times[name])), ERROR: float(np.max(errors[name]))}
    return rows | advantage(rows)


FIRST, TIME, ERROR = "first call, s", "value and gradient, s", "||A'r|| / ||A'b||"


def advantage(rows):
    """How many times faster ours is than the fastest peer, where it is at least as accurate."""
    timed = {name: row for name, row in rows.items() if TIME in row}
    peers = {name: row for name, row in timed.items() if not name.startswith(OURS)}
    ours = {name: row for name, row in timed.items() if name.startswith(OURS)}
    out = {}
    for what in (TIME, FIRST):
        if not all(what in row for row in timed.values()):
            continue
        rival = min(peers, key=lambda name: peers[name][what])
        good = {n: r for n, r in ours.items() if r[ERROR] <= peers[rival][ERROR]}
        out[f"fastest peer / ours, {what[:-3]}"] = {
            f"{name} (rival {rival})": peers[rival][what] / row[what] for name, row in good.items()
        }
    return out


def main():
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="processes for each first call")
    parser.add_argument("--json")
    parser.add_argument(
        "--cpu", action="store_true", help="processor time: on a machine that others use too"
    )
    args = parser.parse_args()
    if args.cpu:
        globals()["clock"] = time.process_time
    print("load averages", os.getloadavg(), "processor time" if args.cpu else "wall time")
    tables = {"a small jitted call, us": overhead(), "100 MB operand": passes()}
    for shape in ((1850, 712, 5), (20000, 2000, 10)):
        tables["{} x {}, {} per row".format(*shape)] = compare(*shape, args.repeats, args.starts)
    for title, table in tables.items():
        print(f"\n{title}")
        for name, value in table.items():
            if isinstance(value, dict):
                value = "  ".join(
                    f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
                )
                print(f"  {name:64s} {value}")
            else:
                print(f"  {name:64s} {value:.4g}")
    if args.json:
        with open(args.json, "w") as stream:
            json.dump(tables, stream, indent=1)


if __name__ == "__main__":
    main()
