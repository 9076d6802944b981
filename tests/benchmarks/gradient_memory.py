"""Memory that a backward pass allocates, against the bytes of values, b and x.

200,000 x 20,000 with 2,000,000 nonzeros and 8 right-hand sides: no array of nonzeros x columns
(128 MB) may appear. Run it with ``python tests/benchmarks/gradient_memory.py``.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import torch

import funclsq as fl


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Peak:
    """The highest resident size while a block runs, above that at its start."""

    def __enter__(self) -> Peak:
        self.start = self.high = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.high = max(self.high, resident())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.high = max(self.high, resident())

    @property
    def bytes(self) -> int:
        """Peak above the start."""
        return self.high - self.start


def measure(m: int, n: int, per_row: int, k: int, solver: str) -> tuple[float, float]:
    """Peak of the backward pass in units of the bytes of values, b and x; and its seconds."""
    rng = np.random.default_rng(0)
    row, col = np.repeat(np.arange(m), per_row), rng.integers(0, n, m * per_row)
    pattern = fl.SparsityPattern(row, col, (m, n))
    values = torch.from_numpy(rng.standard_normal(pattern.nnz)).requires_grad_()
    b = torch.from_numpy(rng.standard_normal((m, k))).requires_grad_()
    x = fl.lstsq(fl.Sparse(pattern, values), b, solver=solver, rank="full")
    unit = sum(t.numel() * t.element_size() for t in (values, b, x))
    cotangent = torch.from_numpy(rng.standard_normal(x.shape))
    started = time.perf_counter()
    with Peak() as peak:
        torch.autograd.grad(x, (values, b), cotangent)
    return peak.bytes / unit, time.perf_counter() - started


def main() -> None:
    """Print the table."""
    print("backward pass, peak allocation / bytes of (values, b, x); the bound is 6")
    for solver in ("lsmr", "lsqr"):
        measure(2000, 200, 10, 8, solver)  # libraries and thread pools are loaded
        ratio, seconds = measure(200_000, 20_000, 10, 8, solver)
        print(f"  {solver:5s} {ratio:5.2f}   ({seconds:.1f} s)")


if __name__ == "__main__":
    main()
