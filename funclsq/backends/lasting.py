"""Load a native module in a thread that never ends.

An allocator inside a native library may tie its main heap to the thread that loads the library
(rslab's does). Where that thread ends, the next thread to enter the library crashes the process;
and a first solve may well come from a short-lived thread, a JAX callback for one.
"""

from __future__ import annotations

import importlib
import queue
import threading
from types import ModuleType

__all__ = ["lasting_import"]


def lasting_import(name: str) -> ModuleType:
    """Import a module as ``import`` does, but from a thread that lives as long as the process."""
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
