"""JAX and torch on the same random problems, over a fixed set of shapes (one program for each).

    python -m tests.fuzz_jax --cases 2000 [--seed 0]

Both frameworks run the same solver on the same numbers, so that x agrees to the rounding of what
is composed around it, and so do the cotangents of every operand.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)

import numpy as np
import torch

import funclsq as fl
import funclsq.jax as flj

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_cases import Seeded, _entries, _powers

SHAPES = ((7, 3), (5, 5), (3, 6), (17, 8), (1, 4), (4, 1), (3, 0))
DTYPES = ("float64", "complex128", "float32", "complex64")
SOLVERS = ("auto", "cholesky", "svd", "lsmr")
OPERANDS = ((), ("damp",), ("weights",), ("damp", "weights", "x0"))


@dataclasses.dataclass(frozen=True)
class Program:
    """What is static: one compilation for each."""

    shape: tuple[int, int]
    dtype: str
    solver: str
    operands: tuple[str, ...]
    members: int | None  # a batch of values and right-hand sides under vmap

    @functools.cached_property
    def pattern(self) -> fl.SparsityPattern:
        """Two thirds of the entries, one of them given twice."""
        m, n = self.shape
        rng = np.random.default_rng(m * 100 + n)
        row, col = np.nonzero(rng.random(self.shape) < 2 / 3)
        twice = slice(0, 1)
        row, col = np.append(row, row[twice]), np.append(col, col[twice])
        return fl.SparsityPattern(row, col, self.shape)

    @functools.cached_property
    def jax(self) -> Any:
        """(arguments, cotangent) -> x and the cotangents of the arguments."""

        def solve(args: dict[str, Any]) -> Any:
            def one(values: Any, b: Any) -> Any:
                more = {name: args[name] for name in self.operands}
                return flj.lstsq(
                    flj.Sparse(self.pattern, values),
                    b,
                    **more,
                    solver=self.solver,
                    on_failure="ignore",
                )

            call = one if self.members is None else jax.vmap(one)
            return call(args["values"], args["b"])

        @jax.jit
        def both(args: dict[str, Any], k: Any) -> Any:
            x, pull = jax.vjp(solve, args)
            return x, pull(k)[0]

        return both

    def torch(self, args: dict[str, Any], k: torch.Tensor) -> Any:
        """As :attr:`jax`, by torch, and whether all solves converged."""
        leaves = {name: t.clone().requires_grad_() for name, t in args.items()}

        def one(values: torch.Tensor, b: torch.Tensor) -> fl.Solution:
            more = {name: leaves[name] for name in self.operands}
            A = fl.Sparse(self.pattern, values)
            return fl.solve(A, b, **more, solver=self.solver, on_failure="ignore")

        call = one if self.members is None else torch.func.vmap(one)
        sol = call(leaves["values"], leaves["b"])
        bars = torch.autograd.grad(sol.x, list(leaves.values()), k)
        return sol.x.detach(), dict(zip(leaves, bars)), bool(sol.converged.all())


def programs() -> list[Program]:
    """The fixed set: every shape with every dtype, the rest in turn."""
    found = []
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(DTYPES):
            operands = OPERANDS[(i + j) % len(OPERANDS)]
            members = 3 if (i + 2 * j) % 3 == 0 else None
            found.append(Program(shape, dtype, SOLVERS[(i + 3 * j) % 4], operands, members))
    return found


def problem(program: Program, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, bool]:
    """Arguments, a cotangent, and whether no derivative leaves the range."""
    pick, rng = Seeded(seed), np.random.default_rng(seed)
    m, n = program.shape
    dtype = getattr(torch, program.dtype)
    lead = () if program.members is None else (program.members,)
    args = {
        "values": _entries(rng, (*lead, program.pattern.nnz), dtype),
        "b": _entries(rng, (*lead, m), dtype),
    }
    if pick.integer(0, 3) == 0:  # repeated columns: a lower rank
        args["values"] = np.ones_like(args["values"])
    real = np.dtype(program.dtype).type(0).real.dtype
    extra = {
        "damp": rng.integers(1, 25) / 16,
        "weights": rng.integers(0, 33, m) / 16,
        "x0": _entries(rng, (n,), dtype),
    }
    args |= {name: np.asarray(extra[name]) for name in program.operands}
    scaling = pick.one_of(("none", "moderate", "moderate", "extreme"))
    if scaling != "none":  # moderate: no square or cube leaves the range
        top = {"moderate": 8, "extreme": 30}[scaling] * (1 if real == np.float32 else 9)
        name = pick.one_of(("values", "b"))
        args[name] = args[name] * _powers(rng, 1, top)
    k = _entries(rng, (*lead, n), dtype)
    with np.errstate(all="ignore"):
        cast = {
            name: t.astype(real if name in ("damp", "weights") else program.dtype)
            for name, t in args.items()
        }
    return cast, k.astype(program.dtype), scaling != "extreme"


def check(program: Program, seed: int) -> None:
    """JAX and torch agree on x and on every cotangent; JAX wrote to no input."""
    args, k, mild = problem(program, seed)
    given = {name: jax.numpy.asarray(t) for name, t in args.items()}
    x, bars = jax.tree.map(np.asarray, program.jax(given, jax.numpy.asarray(k.conj())))
    for name, t in given.items():
        assert np.array_equal(np.asarray(t), args[name]), f"{name} was written to"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.FunclsqWarning)
        tensors = {name: torch.from_numpy(t.copy()) for name, t in args.items()}
        want_x, want, converged = program.torch(tensors, torch.from_numpy(k))
    _close("x", x, want_x.numpy(), mild)
    if mild and converged:  # else derivatives are those of an x that is none
        for name, bar in want.items():
            # of this size are derivatives in an operand; some cancel to less
            natural = (np.abs(k) @ np.abs(want_x.numpy()).T).max(initial=0)
            natural /= np.abs(args[name]).max(initial=np.finfo(bar.numpy().dtype).tiny)
            _close(name, bars[name].conj(), bar.numpy(), mild, natural)


def _close(name: str, got: np.ndarray, want: np.ndarray, mild: bool, natural: float = 0.0) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if mild:
        assert np.isfinite(got).all(), f"{name}: {got}"
    size = max(np.abs(want).max(initial=0), natural)
    real = np.finfo(want.dtype)
    if not (real.tiny / real.eps**2 < size < real.max * real.eps**2):
        return  # XLA flushes subnormal numbers to zero, and intermediates may overflow
    error = np.abs(got - want).max(initial=0)
    assert error <= 1e4 * real.eps * size, f"{name}: JAX is {error / size:.2e} off torch"


def main() -> int:
    """Run many cases over the fixed set of programs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fixed, start, found = programs(), time.monotonic(), Counter()
    for done in range(args.cases):
        program, seed = fixed[done % len(fixed)], args.seed + done
        try:
            check(program, seed)
        except Exception as error:
            found[f"{type(error).__name__} {program}"] += 1
            print(f"seed {seed}: {program}: {error}", flush=True)
        if (done + 1) % 100 == 0:
            print(f"{done + 1} cases, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{args.cases} cases over {len(fixed)} programs, {found.total()} failed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
