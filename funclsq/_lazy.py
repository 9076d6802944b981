"""Submodules that are imported when first named: ``import funclsq`` stays quick."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from types import ModuleType

__all__ = ["submodules"]


def submodules(package: str, names: Collection[str]) -> Callable[[str], ModuleType]:
    """Return the module-level ``__getattr__`` (PEP 562) that imports these on first use."""

    def attribute(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return attribute
