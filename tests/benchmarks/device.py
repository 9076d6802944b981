"""The solves on a GPU: ``python -m tests.benchmarks.device [--device cuda] [--quick]``.

Numbers lie on the device before the clock starts, and the device is waited for before it stops.
The roofline is that of a triad on the same device. An iteration's products and vector updates are
also timed by hand, one call after the other and replayed as a CUDA graph: what a graph could gain.
CuPy's lsmr, matfree and lineax are peers where they are installed.
With ``--device cpu`` the same work runs on the CPU, which is how it is tested.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import funclsq as fl
from funclsq.operators import SparseStructure
from tests.benchmarks.batches import one_pattern, torch_runs
from tests.benchmarks.iteration import by_hand
from tests.benchmarks.peers import CONTESTANTS
from tests.benchmarks.problems import PROBLEMS, Absent, Data, Problem, random_rows, reference
from tests.benchmarks.suite import error
from tests.benchmarks.tables import duration, table

FULL = tuple(name for name in PROBLEMS if name != "tomography-128")  # its reference takes minutes
LOOP = 50  # iterations between the two runs whose difference is timed
CAPTURED = 10  # of them in one CUDA graph


def clock(device: str, work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds that a call takes with what it started on the device, and what it returns."""
    wait(device)
    start = time.perf_counter()
    out = work(*arguments)
    wait(device)
    return time.perf_counter() - start, out


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def bandwidth(device: str) -> float:
    """Bytes per second of a triad on 3 x 256 MB (3 x 64 MB on the CPU)."""
    size = 32_000_000 if device.startswith("cuda") else 8_000_000
    b, c = (torch.rand(size, dtype=torch.float64, device=device) for _ in range(2))
    a = torch.empty_like(b)
    each = [clock(device, lambda: torch.add(b, c, alpha=1.5, out=a))[0] for _ in range(9)]
    return 3 * size * 8 / min(each)


def iterations(device: str, sizes: tuple[int, ...], speed: float) -> list[list[str]]:
    """An LSMR iteration against its parts by hand and its bytes over the bandwidth."""
    lines = []
    for nnz in sizes:
        A = random_rows(nnz // 10, nnz // 15, 10, spread=0.0)
        m, n = A.shape
        S = fl.SparsityPattern(Problem("", A).row, A.indices, A.shape)
        values = torch.from_numpy(A.data).to(device)
        b = torch.rand(m, dtype=torch.float64, device=device)
        hands = by_hand(SparseStructure(S).bind((values,)), device)
        runs = {"hand": hands} | ({"graph": graph(hands)} if device.startswith("cuda") else {})
        each: dict[str, list[float]] = {name: [] for name in ("iteration", "hand", "graph")}
        for repetition in range(6):
            took = {}
            for count in (10, 10 + LOOP):
                scaled = fl.Sparse(S, values * (1 + 0.01 * repetition + 0.001 * count))
                options: dict[str, Any] = {"maxiter": count, "atol": 0.0, "btol": 0.0}
                options |= {"solver": "lsmr", "rank": "full", "on_failure": "ignore"}
                took[count] = clock(device, functools.partial(fl.lstsq, scaled, b, **options))[0]
            each["iteration"].append((took[10 + LOOP] - took[10]) / LOOP)
            for name, run in runs.items():
                each[name].append(clock(device, run, LOOP)[0] / LOOP)
        middle = {name: statistics.median(seconds[1:]) for name, seconds in each.items() if seconds}
        floor = (A.nnz * 24 + (m + n) * 4 + 8 * (8 * m + 17 * n)) / speed
        times = [duration(middle[name]) if name in middle else "" for name in each]
        ratio = middle["iteration"] / floor
        lines.append([str(A.nnz), *times, duration(floor), f"{ratio:.2f}"])
    return lines


def graph(run: Callable[[int], None]) -> Callable[[int], None]:
    """The same work as a CUDA graph, captured after runs on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(CAPTURED)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run(CAPTURED)

    def replay(count: int) -> None:
        for _ in range(count // CAPTURED):
            captured.replay()

    return replay


def solves(device: str, names: tuple[str, ...], repetitions: int) -> list[list[str]]:
    """x, and x with its gradient, of this library and of CuPy."""
    lines = []
    for name in names:
        try:
            problem = PROBLEMS[name]()
            data = problem.draw(0)
            exact = reference(problem, data)
        except (Absent, ArithmeticError):
            continue
        there = [(*c, moved) for c in contestants(problem, device)]
        there += [(*c, moved_by_jax) for c in jax_contestants(problem, device)]
        for number, (title, gradient, run, move) in enumerate(there, 1):
            gap = error(run(move(data, device)), exact)
            each, space = [], high_water(device)
            for repetition in range(repetitions):
                new = move(problem.draw(1000 * number + repetition), device)  # nobody saw it
                each.append(clock(device, run, new)[0])
            work = "x and gradient" if gradient else "x"
            seconds = duration(statistics.median(each))
            lines.append([name, title, work, seconds, f"{gap:.0e}", space()])
    return lines


def high_water(device: str) -> Callable[[], str]:
    """Start to watch torch's memory on the device; what is returned tells the most since, in MB."""
    if not device.startswith("cuda"):
        return lambda: ""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return lambda: f"{(torch.cuda.max_memory_allocated(device) - before) / 1e6:.0f}"


def batches(device: str, count: int, repetitions: int) -> list[list[str]]:
    """Many problems of one pattern: x and gradient."""
    runs, draw = torch_runs(one_pattern(), count, device)
    data = draw(0)
    exact = tuple(t.detach().cpu().numpy() for t in runs["torch.linalg.qr, dense batch"](data))
    lines = []
    for number, (title, run) in enumerate(runs.items(), 1):
        answer = tuple(t.detach().cpu() for t in run(data))
        part = len(answer[0])  # the loop is timed on some members only
        gap = error(answer, tuple(t[:part] for t in exact))
        each = [clock(device, run, draw(1000 * number + i))[0] for i in range(repetitions)]
        lines.append([title, duration(statistics.median(each) * count / part), f"{gap:.0e}"])
    return lines


def moved(data: Data, device: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(a).to(device) for a in (data.values, data.b, data.x_bar))


def contestants(problem: Problem, device: str) -> list[tuple[str, bool, Callable[..., Any]]]:
    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)

    def ours(gradient: bool, solver: str) -> Callable[..., Any]:
        def run(data: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
            values, b, x_bar = data
            values, b = (t.clone().requires_grad_(gradient) for t in (values, b))
            x = fl.lstsq(fl.Sparse(S, values), b, damp=problem.damp, rank="full", solver=solver)
            if not gradient:
                return (x.cpu(),)
            pulled = torch.autograd.grad(x, (values, b), x_bar)
            return tuple(t.detach().cpu() for t in (x, *pulled))

        return run

    found = [
        (title, gradient, ours(gradient, solver))
        for title, solver in (("funclsq", "auto"), ("funclsq cholesky", "cholesky"))
        for gradient in (False, True)
    ]
    try:
        import cupy
        import cupyx.scipy.sparse as csp
        from cupyx.scipy.sparse.linalg import lsmr
    except ImportError:
        return found
    indptr, indices = cupy.asarray(problem.A.indptr), cupy.asarray(problem.A.indices)

    def theirs(data: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        values, b, _ = data
        A = csp.csr_matrix((cupy.from_dlpack(values), indices, indptr), shape=problem.A.shape)
        columns = cupy.from_dlpack(b).reshape(b.shape[0], -1)
        options = {"damp": problem.damp, "atol": 1e-12, "btol": 1e-12, "maxiter": 20_000}
        x = [lsmr(A, columns[:, j], **options)[0] for j in range(columns.shape[1])]
        return (np.stack([cupy.asnumpy(c) for c in x], 1).reshape(-1, *b.shape[1:]),)

    return [*found, ("CuPy lsmr", False, theirs)]


def moved_by_jax(data: Data, device: str) -> Data:
    import jax

    there = (data.values, data.b, data.x_bar)
    return Data(*jax.block_until_ready([jax.device_put(a) for a in there]))


def jax_contestants(problem: Problem, device: str) -> list[tuple[str, bool, Callable[..., Any]]]:
    """The peers in JAX, where they are installed and JAX has a device of this kind."""
    try:
        import jax
    except ImportError:
        return []
    if jax.default_backend() != ("gpu" if device.startswith("cuda") else "cpu"):
        return []
    found = []
    for title in ("matfree lsmr", "lineax LSMR"):
        for gradient in (False, True):
            with contextlib.suppress(ImportError, NotImplementedError):
                found.append((title, gradient, CONTESTANTS[title].prepare(problem, gradient, 1e-9)))
    return found


def main() -> None:
    """Print the bandwidth and three tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.device", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    a = parser.parse_args()
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device is at hand; --device cpu runs the same work on the CPU")
    warnings.filterwarnings("ignore", category=fl.FunclsqWarning)  # the error column says it
    speed = bandwidth(a.device)
    name = torch.cuda.get_device_name(a.device) if a.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}: {speed / 1e9:.0f} GB/s in a triad\n")
    sizes = (100_000, 1_000_000) if a.quick else (100_000, 1_000_000, 10_000_000)
    lines = iterations(a.device, sizes, speed)
    heads = ["entries", "an LSMR iteration", "its parts by hand", "in a CUDA graph"]
    print(table([*heads, "bandwidth floor", "iteration / floor"], lines))
    problems = FULL[:1] if a.quick else FULL
    lines = solves(a.device, problems, a.repetitions)
    print(table(["problem", "", "work", "time", "error", "MB"], lines))
    count = 100 if a.quick else 1000
    lines = batches(a.device, count, a.repetitions)
    print(table([f"{count} problems of one pattern, x and gradient", "time", "error"], lines))


if __name__ == "__main__":
    main()
