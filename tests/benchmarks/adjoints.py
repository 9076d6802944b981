"""What a gradient costs beyond its solve: forward and backward pass of one call, timed apart."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch

import funclsq as fl
from tests.benchmarks.problems import PROBLEMS, Absent, Data, Problem
from tests.benchmarks.suite import log
from tests.benchmarks.timing import settle

__all__ = ["adjoints"]

PATIENCE = 2.0  # seconds for a forward and a backward pass, beyond which a way is left out

WAYS: dict[str, dict[str, Any]] = {
    "cholesky": {"solver": "cholesky"},
    "cholesky, to 1e-8": {"solver": "cholesky", "atol": 1e-8},
    "lsmr, rank known": {"solver": "lsmr", "rank": "full", "atol": 1e-10, "btol": 1e-10},
    "lsmr, rank unknown": {"solver": "lsmr", "atol": 1e-10, "btol": 1e-10},
}


def adjoints(names: tuple[str, ...], repetitions: int) -> list[dict[str, Any]]:
    """x, then the gradients in all values and b, of every way to solve; new values each time."""
    rows = []
    for name in names:
        try:
            problem = PROBLEMS[name]()
        except Absent as absent:
            log(f"{name}: left out: {absent}")
            continue
        S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
        ways = []
        for way in WAYS:
            if problem.damp and way == "lsmr, rank unknown":
                continue  # damping makes every rank full
            seconds = min(sum(once(problem, S, way, problem.draw(i))) for i in range(2))
            if seconds < PATIENCE:
                settle(functools.partial(once, problem, S, way), problem.draw, seconds)
                ways.append(way)
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for repetition in range(repetitions):
            for number, way in enumerate(ways):
                data = problem.draw(1000 * (number + 1) + repetition)
                found[way].append(once(problem, S, way, data))
        for way, pairs in found.items():
            forward, backward = (list(part) for part in zip(*pairs))
            ratio = statistics.median(b / f for f, b in pairs)
            log(f"{name:12} {way:20} backward / forward {ratio:.2f}")
            rows.append(
                {
                    "problem": name,
                    "title": problem.name,
                    "way": way.split(", rank")[0] + ", damped" if problem.damp else way,
                    "forward": forward,
                    "backward": backward,
                }
            )
    return rows


def once(problem: Problem, S: fl.SparsityPattern, way: str, data: Data) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    values, b = (torch.from_numpy(a).requires_grad_() for a in (data.values, data.b))
    x_bar = torch.from_numpy(data.x_bar)
    start = time.perf_counter()
    x = fl.lstsq(fl.Sparse(S, values), b, damp=problem.damp, on_failure="ignore", **WAYS[way])
    middle = time.perf_counter()
    torch.autograd.grad(x, (values, b), x_bar)
    return middle - start, time.perf_counter() - middle
