"""Load a native module that brings an allocator of its own.

Such an allocator may tie its main heap to the thread that loads the library (rslab's does). Where
that thread ends, the next thread to enter the library crashes the process; and a first solve may
well come from a short-lived thread, a JAX callback for one. So the thread that loads never ends.

The allocator's settings are read from the environment, once, as the library is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import threading
from collections.abc import Iterator
from types import ModuleType

__all__ = ["lasting_import"]


def lasting_import(name: str, **settings: str) -> ModuleType:
    """Import a module as ``import`` does, but from a thread that lives as long as the process.

    ``settings`` are environment variables for the time of the import, unless the user set them.
    """
    with _environment(settings):
        return _import(name)


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    users = {name.upper() for name in os.environ}  # mimalloc reads names of either case
    ours = {name: value for name, value in settings.items() if name not in users}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _import(name: str) -> ModuleType:
    if threading.current_thread() is threading.main_thread():
        return importlib.import_module(name)
    answer: queue.SimpleQueue[ModuleType | BaseException] = queue.SimpleQueue()

    def load() -> None:
        try:
            answer.put(importlib.import_module(name))
        except BaseException as error:  # for the caller, who waits
            answer.put(error)
            return
        threading.Event().wait()

    threading.Thread(target=load, name=f"funclsq keeps {name}", daemon=True).start()
    found = answer.get()
    if isinstance(found, BaseException):
        raise found
    return found
