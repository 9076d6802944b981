"""Times of x, and of x with its gradient, of every contestant at one achieved error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.benchmarks.peers import CONTESTANTS, Contestant
from tests.benchmarks.problems import PROBLEMS, Absent, Data, Problem, reference
from tests.benchmarks.timing import Entry, interleave, once, settle

__all__ = ["WORKS", "compare", "log"]

WORKS = ("x", "x and gradient")

TARGET = 1e-8  # relative error that all have to reach, in x and both cotangents
HOPELESS = 10.0  # times the patience: so long does no compilation take, there is no second run


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def error(answer: tuple[Any, ...], exact: tuple[np.ndarray, ...]) -> float:
    """Worst relative error (2-norm) over what was returned."""
    out = 0.0
    for got, want in zip(answer, exact):
        got = np.asarray(got.detach() if hasattr(got, "detach") else got)
        gap = np.linalg.norm(got - want) / np.linalg.norm(want)
        out = max(out, float(gap) if np.isfinite(gap) else np.inf)
    return out


def calibrate(
    contestant: Contestant,
    problem: Problem,
    gradient: bool,
    data: Data,
    exact: tuple[np.ndarray, ...],
    patience: float,
) -> tuple[Entry, Callable[[Data], Any] | None, float]:
    """Find the loosest tolerance that reaches TARGET (by bisection), compiled and warm."""
    entry = Entry(contestant.name)
    low, high = 0, len(contestant.tolerances) - 1
    best: tuple[Callable[[Data], Any], float, float, float] | None = None
    while low <= high:
        middle = (low + high) // 2
        tol = contestant.tolerances[middle]
        try:
            run = contestant.prepare(problem, gradient, tol)
            seconds, answer = once(run, data)  # here it compiles, and analyses the pattern
            gap = error(answer, exact)
            if seconds < HOPELESS * patience:
                seconds = once(run, problem.draw(1))[0]
        except Exception as problem_found:  # a peer that fails is a row of the table
            entry.note = f"{type(problem_found).__name__}: {problem_found}"[:120]
            return entry, None, 0.0
        if seconds >= patience:
            entry.note = f"left out: {seconds:.1f} s for one run"
            return entry, None, seconds
        if gap <= TARGET:
            best, high = (run, tol, gap, seconds), middle - 1
        else:
            low, entry.error = middle + 1, gap
    if best is None:
        entry.note = f"does not reach an error of {TARGET:.0e}"
        return entry, None, 0.0
    run, entry.tol, entry.error, seconds = best
    return entry, run, seconds


def compare(
    names: Iterable[str],
    contestants: Iterable[str],
    repetitions: int,
    patience: float,
    works: Iterable[str] = WORKS,
) -> list[dict[str, Any]]:
    """Rows of the main table: each problem, x alone and x with gradient, every contestant."""
    rows = []
    for name in names:
        try:
            problem = PROBLEMS[name]()
            data = problem.draw(0)
            exact = reference(problem, data)
        except (Absent, ArithmeticError) as reason:
            log(f"{name}: {reason}")
            continue
        for work in works:
            gradient = work != "x"
            runs, entries, slow, lasting = {}, [], {}, {}
            for key in contestants:
                contestant = CONTESTANTS[key]
                if not contestant.available:
                    entries.append(Entry(key, note="not installed"))
                    continue
                entry, run, seconds = calibrate(
                    contestant, problem, gradient, data, exact, patience
                )
                entries.append(entry)
                if run is not None:
                    runs[key], lasting[key] = run, seconds
                    slow[key] = repetitions if seconds < patience / 5 else 2
            for key, run in runs.items():
                settle(run, problem.draw, lasting[key])
            times = interleave(runs, problem.draw, repetitions, slow)
            for entry in entries:
                entry.seconds = times.get(entry.name, [])
                rows.append(_row(problem, name, work, entry))
                log(
                    f"{name:15} {work:15} {entry.name:28} "
                    f"{entry.median:9.4f} s  error {entry.error}  {entry.note}"
                )
    return rows


def _row(problem: Problem, key: str, work: str, entry: Entry) -> dict[str, Any]:
    return {
        "problem": key,
        "title": problem.name,
        "shape": list(problem.A.shape),
        "nnz": int(problem.A.nnz),
        "k": problem.k,
        "damp": problem.damp,
        "work": work,
        "contestant": entry.name,
        "seconds": entry.seconds,
        "error": entry.error,
        "tol": entry.tol,
        "note": entry.note,
    }
