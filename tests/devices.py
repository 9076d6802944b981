"""The device that the tests marked ``cuda`` run on: a real one, or one simulated on the CPU.

``FUNCLSQ_DEVICE=simulated python -m pytest -m cuda`` runs them on the latter, where no CUDA is.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch

__all__ = ["DEVICE", "Count", "waits"]

DEVICE: str | None = None
if torch.cuda.is_available():
    DEVICE = "cuda"
elif os.environ.get("FUNCLSQ_DEVICE") == "simulated":
    import simulated

    simulated.register()
    DEVICE = simulated.NAME


class Count:
    """How often the host waited for the device, and what for where that is known."""

    def __init__(self) -> None:
        self.total = 0
        self.reasons: dict[str, int] = {}
        self.bytes: dict[str, int] = {}


@contextlib.contextmanager
def waits() -> Iterator[Count]:
    """Count how often the host waits for the device: to read from it, or to move data."""
    count = Count()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                yield count
        finally:
            torch.cuda.set_sync_debug_mode("default")
        count.total = sum("synchroniz" in str(w.message) for w in seen)
        return
    with simulated.counted() as seen:
        yield count
    count.total, count.reasons, count.bytes = sum(seen.values()), dict(seen), dict(seen.bytes)
