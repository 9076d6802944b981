"""A thousand solves inside JAX with 32 MB operands: no hang, no abort, no growth, right results.

    python tests/benchmarks/jax_soak.py [--calls 1000] [--cpus 0 | 0,1] [--limit 600]

From one thread and from eight, under nested vmap, every tenth call failing. A hang fails by the
time limit (SIGALRM).
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import threading


def main() -> None:
    """Run, and exit with status 0 only if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--cpus", default="0")
    parser.add_argument("--limit", type=int, default=600)
    args = parser.parse_args()
    os.sched_setaffinity(0, {int(c) for c in args.cpus.split(",")})
    signal.alarm(args.limit)

    import jax
    import jax.numpy as jnp
    import numpy as np

    import funclsq as fl
    import funclsq.jax as flj

    m, n = 500_000, 8
    entry = np.arange(m)
    pattern = fl.SparsityPattern(
        np.repeat(entry, 2), np.stack([entry % n, (entry // n) % n], 1).reshape(-1), (m, n)
    )
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.standard_normal(2 * m), jnp.float32)
    b = jnp.asarray(rng.standard_normal((m, 16)), jnp.float32)
    print(f"operands: values {values.nbytes / 1e6:.0f} MB, b {b.nbytes / 1e6:.0f} MB")

    def solve(v, b):
        return flj.lstsq(
            flj.Sparse(pattern, v), b, solver="cholesky", rank="full", check_finite=False
        )

    single = jax.jit(solve)
    raising = jax.jit(
        lambda v, b: flj.lstsq(flj.Sparse(pattern, v), b, solver="lsmr", maxiter=1, rank="full",
                               on_failure="raise")
    )  # fmt: skip
    nested = jax.jit(
        jax.vmap(jax.vmap(jax.grad(lambda v, b: solve(v, b).sum()), (None, 0)), (0, None))
    )
    want = np.asarray(single(values, b))
    failures: list[str] = []

    def work(calls: int) -> None:
        for i in range(calls):
            if i % 10 == 9:
                try:
                    raising(values, b[:, 0]).block_until_ready()
                    failures.append("a solve that cannot converge did not raise")
                except Exception as error:
                    if "tolerance" not in str(error):
                        failures.append(f"{type(error).__name__}: {error}")
                continue
            got = np.asarray(single(values, b))
            if not np.abs(got - want).max() < 1e-4:
                failures.append(f"wrong by {np.abs(got - want).max()}")

    def memory() -> float:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize() / 1e6

    work(20)
    start = memory()
    work(args.calls // 2)
    alone = memory()
    threads = [threading.Thread(target=work, args=(args.calls // 16,)) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    many = memory()
    nested(jnp.stack([values, 2 * values]), b[:, :2].T).block_until_ready()
    work(20)
    end = memory()
    print(f"resident MB: {start:.0f} at start, {alone:.0f} after one thread, {many:.0f} after "
          f"eight, {end:.0f} after nested vmap")  # fmt: skip
    if alone - start > 100:
        failures.append(f"grew by {alone - start:.0f} MB")
    single(values, b)  # nobody awaits this
    for line in failures[:5]:
        print("FAILED", line)
    print("failed" if failures else "passed")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
