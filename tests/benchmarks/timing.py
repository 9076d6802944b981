"""Interleaved timing: every repetition runs all contestants, in rotating order, on new numbers.

Each contestant gets numbers of its own in each repetition: settings of this library share what
they keep of equal values, and one of them would find ready what another has just factored.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Entry", "interleave", "once", "ratios", "settle"]

SETTLED = 18  # solves after which what is kept is no longer made in fresh memory


@dataclasses.dataclass
class Entry:
    """One contestant on one piece of work: seconds of each repetition, or why there are none."""

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    error: float | None = None
    tol: float = 0.0
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


def once(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    gc.disable()
    start = time.perf_counter()
    out = function(*arguments)
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds, out


def settle(run: Callable[[Any], Any], draw: Callable[[int], Any], seconds: float) -> None:
    """Run untimed until the memory in use has been used before, or for three seconds.

    Where memory is handed out to a process for the first time, the system (a virtual machine, above
    all) takes up to 30 us for a page of it: the first solves of a process take up to twice as long
    as those after. This library keeps what 16 of them prepared, and uses its memory again then.
    """
    for number in range(min(SETTLED, int(3 / max(seconds, 1e-9)))):
        run(draw(900_000 + number))


def interleave(
    runs: dict[str, Callable[[Any], Any]],
    draw: Callable[[int], Any],
    repetitions: int,
    at_most: dict[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds per contestant and repetition; ``at_most`` limits repetitions of the slow ones."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        shift = repetition % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            if repetition < (at_most or {}).get(name, repetitions):
                data = draw(1000 * (names.index(name) + 1) + repetition)
                seconds[name].append(once(runs[name], data)[0])
    return seconds


def ratios(mine: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of mine / others, repetition by repetition."""
    each = [a / b for a, b in zip(mine, others)]
    if not each:
        nan = float("nan")
        return nan, nan, nan
    return statistics.median(each), min(each), max(each)
