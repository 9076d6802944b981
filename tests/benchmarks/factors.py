"""Factor once and solve many; cold, same-pattern and same-values times; memory."""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import funclsq as fl
from tests.benchmarks.peers import CONTESTANTS
from tests.benchmarks.problems import PROBLEMS, Absent, Data, Problem
from tests.benchmarks.suite import log
from tests.benchmarks.timing import interleave

__all__ = ["memory", "reuse", "warmth"]

SOLVES = 20


def reuse(names: tuple[str, ...], repetitions: int) -> list[dict[str, Any]]:
    """New values, a factorisation, then 20 right-hand sides one after the other."""
    rows = []
    for name in names:
        problem = PROBLEMS[name]()
        S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
        m = problem.A.shape[0]
        noise = np.random.default_rng(0).standard_normal((SOLVES, m))

        def factorize(data: Data, S=S, problem=problem, noise=noise) -> Any:
            values = torch.from_numpy(data.values)
            f = fl.factorize(fl.Sparse(S, values), damp=problem.damp)
            return [f.solve(torch.from_numpy(data.b + extra)) for extra in noise]

        def separately(data: Data, S=S, problem=problem, noise=noise) -> Any:
            A = fl.Sparse(S, torch.from_numpy(data.values))
            return [
                fl.lstsq(A, torch.from_numpy(data.b + extra), damp=problem.damp) for extra in noise
            ]

        runs: dict[str, Callable[[Data], Any]] = {
            "funclsq, factorize": factorize,
            "funclsq, lstsq each time": separately,
        }
        if CONTESTANTS["CHOLMOD"].available:
            runs["CHOLMOD"] = _cholmod(problem, noise)
        for run in runs.values():
            run(problem.draw(0))
        times = interleave(runs, problem.draw, repetitions)
        for key, seconds in times.items():
            log(f"{name}: {key:30} {np.median(seconds):9.4f} s")
            rows.append(_row(problem, name, f"1 factorisation, {SOLVES} solves", key, seconds))
    return rows


def _cholmod(problem: Problem, noise: np.ndarray) -> Callable[[Data], Any]:
    import scipy.sparse as sp
    from sksparse.cholmod import analyze_AAt

    factor = analyze_AAt(sp.csc_matrix(problem.stacked(problem.A.data).T))
    m = problem.A.shape[0]

    def run(data: Data) -> Any:
        A = problem.stacked(data.values)
        AT = sp.csc_matrix(A.T)
        factor.cholesky_AAt_inplace(AT)
        out = []
        for extra in noise:
            b = np.zeros(A.shape[0])
            b[:m] = data.b + extra
            x = factor(AT @ b)
            out.append(x + factor(AT @ (b - A @ x)))
        return out

    return run


def warmth(name: str, repetitions: int) -> list[dict[str, Any]]:
    """Cold (a new pattern), same pattern with new values, and the very same values again."""
    problem = PROBLEMS[name]()
    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
    held = torch.from_numpy(problem.draw(0).values)

    def solve(pattern: Any, values: torch.Tensor, data: Data) -> Any:
        b = torch.from_numpy(data.b)
        return fl.lstsq(fl.Sparse(pattern, values), b, damp=problem.damp, solver="cholesky")

    turns = itertools.count(1)

    def cold(data: Data) -> Any:
        # equal patterns share what is kept: so each one has its entries in another order
        turn = next(turns)
        row, col, values = (np.roll(a, turn) for a in (problem.row, problem.A.indices, data.values))
        fresh = fl.SparsityPattern(row, col, problem.A.shape)
        return solve(fresh, torch.from_numpy(values), data)

    runs = {
        "funclsq cholesky, cold": cold,
        "funclsq cholesky, same pattern": lambda d: solve(S, torch.from_numpy(d.values), d),
        "funclsq cholesky, same values": lambda d: solve(S, held, d),
    }
    for run in runs.values():
        run(problem.draw(0))
    times = interleave(runs, problem.draw, repetitions)
    for key, seconds in times.items():
        log(f"{name}: {key:32} {np.median(seconds):9.4f} s")
    return [_row(problem, name, "x", key, seconds) for key, seconds in times.items()]


def memory(names: tuple[str, ...], contestants: tuple[str, ...]) -> list[dict[str, Any]]:
    """High-water mark of the resident set above its level before the call (Linux)."""
    rows = []
    for name in names:
        try:
            problem = PROBLEMS[name]()
        except Absent:
            continue
        for key in contestants:
            contestant = CONTESTANTS[key]
            if not contestant.available:
                continue
            tol = 1e-10 if len(contestant.tolerances) > 1 else 0.0
            run = contestant.prepare(problem, True, tol)
            run(problem.draw(0))
            fl_before = _settle()
            if fl_before is None:
                return rows
            data = problem.draw(1)
            before = _settle()
            out = run(data)
            peak = _status("VmHWM")
            del out
            row = _row(problem, name, "x and gradient", key, [])
            rows.append(row | {"megabytes": max(0.0, (peak - before) / 1024)})
            log(f"{name}: {key:30} {rows[-1]['megabytes']:8.1f} MB above the start")
    return rows


def _settle() -> int | None:
    """Give freed memory back, reset the high-water mark, and return the resident set in kB."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))


def _row(problem: Problem, key: str, work: str, contestant: str, seconds: list[float]):
    return {
        "problem": key,
        "title": problem.name,
        "work": work,
        "contestant": contestant,
        "seconds": seconds,
        "error": None,
        "tol": 0.0,
        "note": "",
    }
