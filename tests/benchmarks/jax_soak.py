"""Many solves inside JAX with 32 MB operands: no hang, no abort at exit, no growth, right results.

    python tests/benchmarks/jax_soak.py [--calls 1000] [--limit 1800] [--rows 1x1,2x8,...]

One process per row of the table, on one CPU or two: calls from one thread, calls from eight, and
values and gradients under two nested vmaps; every tenth call fails, in one of four ways. Work is
left behind un-awaited at the end of each process. Memory is compared between quarters of the calls,
each with threads of its own, when nothing is under way: how much it is at most depends on how many
threads copy at once. A row that takes longer than the limit has failed. The last row leaves dropped
work behind in many short processes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import time

ROWS = {
    "1x1": "one CPU, one thread",
    "2x1": "two CPUs, one thread",
    "1x8": "one CPU, eight threads",
    "2x8": "two CPUs, eight threads",
    "1xvmap": "one CPU, nested vmap of value_and_grad",
    "2xvmap": "two CPUs, nested vmap of value_and_grad",
}

EXIT = """
import jax, jax.numpy as jnp, time, torch
import funclsq.jax as flj

def slow(A, b):
    time.sleep(0.2)
    return torch.linalg.lstsq(A, b.reshape(len(b), -1)).solution.reshape(A.shape[1], *b.shape[1:])

before = jax.jit(lambda a: jax.lax.fori_loop(0, 4, lambda i, c: c @ a * 1e-3, a))
a = before(jnp.eye(800))
f = jax.jit(lambda a: flj.lstsq(a[:8, :3] + jnp.eye(8, 3), a[:8, 0], solver=slow))
g = jax.jit(lambda a: flj.lstsq(a, a[:, 0], solver="qr"))
f(a).block_until_ready(), g(a[:, :30]).block_until_ready()
for i in range(3):
    f(before(a) + i), g((before(a) + i)[:, :30])
"""


class Soak:
    """Calls whose results are known, and calls that must fail."""

    def __init__(self, megabytes: float, nested: bool) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        import funclsq.jax as flj

        self.np, self.failures = np, []
        m = int(megabytes * 1e6) // (8 * 4 * (2 if nested else 1))
        rng = np.random.default_rng(0)
        self.A = jnp.asarray(rng.standard_normal((m, 8)), jnp.float32)
        self.b = jnp.asarray(rng.standard_normal(m), jnp.float32)
        self.wide = jnp.asarray(rng.standard_normal((m // 100, 800)), jnp.float32)

        def solve(s, A, b, **options):
            return flj.lstsq(A * s, b, solver="qr", rank="full", **options)

        def explode(A, b):
            raise ArithmeticError("planted")

        self.one = jax.jit(solve)
        loss = jax.value_and_grad(lambda s, A, b: solve(s, A, b).sum())
        self.nested = jax.jit(jax.vmap(jax.vmap(loss, (None, None, 1)), (0, None, None)))
        self.bad = {
            "did not meet its tolerance": jax.jit(
                lambda A, b: flj.lstsq(A, b, solver="lsmr", maxiter=1, on_failure="raise")
            ),
            "not finite": jax.jit(
                lambda A, b: flj.lstsq(A, b / 0, solver="qr", on_failure="raise")
            ),
            "planted": jax.jit(lambda A, b: flj.lstsq(A, b, solver=explode)),
            "rows": jax.jit(lambda A, b: flj.lstsq(A, b[:-1])),
        }
        self.pair = jnp.stack([self.b, 2 * self.b], 1) if nested else None
        self.want = np.asarray(self.one(1.0, self.A, self.b))
        self.want_wide = np.asarray(self.one(1.0, self.A[: m // 100], self.wide))

    def call(self, i: int) -> None:
        """Make call number i, and note what is wrong with it."""
        if i % 10 == 9:
            text, f = list(self.bad.items())[i // 10 % 4]
            try:
                f(self.A, self.b).block_until_ready()
                self.failures.append(f"a call that must fail ({text}) did not")
            except Exception as error:
                if text not in str(error):
                    self.failures.append(f"{type(error).__name__}: {error}")
            return
        s = 1.0 + i % 7
        if self.pair is not None:
            scales = self.np.array([s, 2 * s], self.np.float32)
            value, slope = self.nested(scales, self.A, self.pair)
            want = self.want.sum() * self.np.outer(1 / scales, [1.0, 2.0])
            self.check(value, want)
            self.check(slope, -want / scales[:, None])
        elif i % 2:
            self.check(self.one(s, self.A, self.b), self.want / s)
        else:
            self.check(self.one(s, self.A[: len(self.wide)], self.wide), self.want_wide / s)

    def check(self, got, want) -> None:
        """Compare, relative to the size of what is wanted."""
        error = self.np.abs(self.np.asarray(got) - want).max() / self.np.abs(want).max()
        if not error < 1e-3:
            self.failures.append(f"wrong by {error:.2e}")


def resident() -> float:
    """Resident memory in MB."""
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def give_back() -> None:
    """Return freed memory to the system; threads that end leave glibc much of it, in pieces."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def soak(row: str, calls: int, megabytes: float) -> dict[str, object]:
    """Make the calls of one row in this process; what was seen."""
    cpus, kind = row.split("x")
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(cpus)]))
    import logging

    logging.getLogger("jax").setLevel(logging.CRITICAL)  # it prints every planted exception
    run = Soak(megabytes, kind == "vmap")
    count = 8 if kind == "8" else 1
    sizes: list[float] = []
    rests: list[float] = []  # after each quarter, when nothing is under way

    def work(numbers: range) -> None:
        for i in numbers:
            run.call(i)
            sizes.append(resident())

    for i in range(40):
        run.call(i)
    start = time.perf_counter()
    for quarter in range(4):
        numbers = range(quarter * calls // 4, (quarter + 1) * calls // 4)
        threads = [threading.Thread(target=work, args=(numbers[j::count],)) for j in range(count)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        give_back()
        rests.append(resident())
    seconds = time.perf_counter() - start
    grown = min(rests[2:]) - max(rests[:2])
    if grown > max(64.0, 4 * megabytes):
        run.failures.append(f"grew by {grown:.0f} MB")
    if len(sizes) != calls:
        run.failures.append(f"{calls - len(sizes)} calls were not made")
    run.one(0.5, run.A, run.b)  # nobody awaits this
    return {
        "calls": len(sizes),
        "s per call": round(seconds / calls, 3),
        "MB at most": round(max(sizes)),
        "MB after half": round(rests[1]),
        "MB at the end": round(rests[3]),
        "failures": run.failures[:5],
    }


def child(row: str, calls: int, megabytes: float, limit: float) -> dict[str, object]:
    """Run one row in a process of its own, under the time limit."""
    code = (
        "import json; from jax_soak import soak; "
        f"print(json.dumps(soak({row!r}, {calls}, {megabytes})))"
    )
    return _process(code, limit)


def _process(code: str, limit: float) -> dict[str, object]:
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failures": [f"not finished after {limit:.0f} s"]}
    lines = done.stdout.splitlines()
    found = json.loads(lines[-1]) if lines else {"failures": []}
    if done.returncode:
        found["failures"].append(f"exit status {done.returncode}: {done.stderr[-300:]}")
    return found


def exits(times: int, limit: float) -> dict[str, object]:
    """Processes that end with dropped work in the queue."""
    failures = []
    start = time.perf_counter()
    for _ in range(times):
        failures += _process(EXIT, limit)["failures"]
    return {
        "calls": times,
        "s per call": round((time.perf_counter() - start) / times, 3),
        "failures": failures[:5],
    }


def main() -> None:
    """Print the table; exit with status 0 only if every row is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--megabytes", type=float, default=32.0)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds per row")
    parser.add_argument("--exits", type=int, default=20)
    parser.add_argument("--rows", default=",".join(ROWS))
    args = parser.parse_args()
    columns = ("calls", "s per call", "MB at most", "MB after half", "MB at the end", "outcome")
    print(f"{'':42s}" + "".join(f"{c:>17s}" for c in columns), flush=True)
    failed = False
    rows = [(ROWS[r], lambda r=r: child(r, args.calls, args.megabytes, args.limit))
            for r in args.rows.split(",") if r]  # fmt: skip
    if args.exits:
        rows.append(("exit with dropped work in the queue", lambda: exits(args.exits, 120.0)))
    for title, run in rows:
        found = run()
        failed |= bool(found["failures"])
        found["outcome"] = "FAILED" if found["failures"] else "well"
        print(f"{title:42s}" + "".join(f"{found.get(c, '')!s:>17s}" for c in columns), flush=True)
        for line in found["failures"]:
            print(f"    {line}", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
