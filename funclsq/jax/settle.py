"""At interpreter exit: wait for host calls that nobody awaits.

A host call that runs or begins while the interpreter shuts down aborts the process: its thread
asks for an interpreter lock that is never given again. JAX waits for results that somebody holds
and for side effects, but knows nothing of computations whose results were dropped. So, in order,
before JAX's own exit handlers:

1. wait for side effects and for every result that is still referenced;
2. refuse new host calls (nobody can see their results), which empties the queue quickly;
3. wait until no host call runs and no thread of the runtime is at work.

Step 3 looks at the state of the process's threads, where the system shows it: a thread that waits
for a processor on a busy machine still counts as at work. Elsewhere, at processor time.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import os
import threading
import time

import jax

__all__ = ["begun", "closing", "lowered", "running"]

_LIMIT = 10.0  # seconds that step 3 may take
_STEP = 0.005  # seconds between two looks
_LOOKS = 12  # looks in a row that must find nothing at work
_TASKS = "/proc/self/task"

# A host call draws from ``begun``, puts an item into ``running``, only then looks at ``closing``
# (and gives up in step 2); it takes the item out when it returns. Neither needs a lock.
begun = itertools.count()
running: collections.deque[None] = collections.deque()
closing: list[bool] = []  # not empty in step 2
_lowered = False


def lowered() -> None:
    """Note that a program with a host call in it has been made."""
    global _lowered
    _lowered = True
    next(begun)


@atexit.register
def settle() -> None:
    """Wait for the work that nobody awaited."""
    if not _lowered:
        return
    with contextlib.suppress(Exception):  # an error of a computation is its owner's business
        jax.effects_barrier()
    for array in jax.live_arrays():
        with contextlib.suppress(Exception):
            if not array.is_deleted():
                array.block_until_ready()
    closing.append(True)
    try:
        _wait()
    finally:
        closing.clear()  # exit handlers that run later may solve, and await what they get


def _wait() -> None:
    stop = time.monotonic() + _LIMIT
    quiet = 0
    while quiet < _LOOKS and time.monotonic() < stop:
        before, used = next(begun), time.process_time()
        time.sleep(_STEP)
        busy = _runtime_at_work()
        if busy is None:  # unknown here: judge by processor time, over ten times as long
            time.sleep(9 * _STEP)
            busy = time.process_time() - used > _STEP
        quiet = 0 if busy or running or next(begun) != before + 1 else quiet + 1


def _runtime_at_work() -> bool | None:
    """Whether a thread that Python did not start is running or wants to; None if unknown."""
    own = {t.native_id for t in threading.enumerate()} | {threading.get_native_id()}
    try:
        tasks = [int(name) for name in os.listdir(_TASKS)]
    except OSError:
        return None
    for task in tasks:
        if task in own:
            continue
        with contextlib.suppress(OSError, IndexError), open(f"{_TASKS}/{task}/stat") as stream:
            state = stream.read().rpartition(")")[2].split()[0]
            if state in "RD":
                return True
    return False
