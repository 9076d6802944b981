"""A solver and its settings, as users give them, checked and frozen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

from funclsq.methods import registry
from funclsq.methods._protocol import Options

__all__ = ["Settings", "settings"]

_SETTINGS = tuple(sorted(f.name for f in dataclasses.fields(Options) if f.name != "solver"))


class Settings(NamedTuple):
    """A solver and what was asked of it, checked; plain constants, so that they can be traced."""

    solver: Any
    given: tuple[tuple[str, Any], ...]

    def options(self, extra: tuple[tuple[str, Any], ...] = ()) -> Options:
        """Freeze into Options."""
        return Options(solver=self.solver, extra=extra, **dict(self.given))


def settings(name: str, solver: Any, **given: Any) -> Settings:
    """Check solver and settings, and freeze them."""
    keywords: dict[str, Any] = {}
    while isinstance(solver, functools.partial):
        if solver.args:
            raise TypeError(f"{name}: partial(solver, ...) may fix keyword arguments only.")
        keywords = {**solver.keywords, **keywords}
        solver = solver.func
    own = getattr(solver, "funclsq_name", None)
    if own is not None:
        solver = own
    elif keywords:
        solver = functools.partial(solver, **keywords)
        keywords = {}
    if isinstance(solver, str):
        if solver not in registry.NAMES:
            raise ValueError(
                f"{name}: solver must be one of {', '.join(registry.NAMES)} or a function "
                f"solver(A, b); got {solver!r}."
            )
    elif not callable(solver):
        raise TypeError(
            f"{name}: solver must be a name or a function solver(A, b); got "
            f"{type(solver).__name__}."
        )
    given = {**given, **keywords}
    for key in given:
        if key not in _SETTINGS:
            raise TypeError(
                f"{name}: unknown setting {key!r}; the settings are {', '.join(_SETTINGS)}."
            )
    rank = given.get("rank", "auto")
    if not (rank in ("auto", "full") or (isinstance(rank, int) and rank >= 0)):
        raise ValueError(f"{name}: rank must be 'auto', 'full' or an int >= 0; got {rank!r}.")
    for key in ("atol", "btol", "rcond", "conlim"):
        value = given.get(key)
        if value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name}: {key} must be a number >= 0 or None; got {value!r}.")
    maxiter = given.get("maxiter")
    if maxiter is not None and not (isinstance(maxiter, int) and maxiter >= 0):
        raise ValueError(f"{name}: maxiter must be an int >= 0 or None; got {maxiter!r}.")
    return Settings(solver, tuple(given.items()))
