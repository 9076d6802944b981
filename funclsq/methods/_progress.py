"""What a long solve tells while it runs: a callback, a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from funclsq.methods._protocol import Options

__all__ = ["reporter"]

Call = Callable[[dict[str, Any]], bool]


@contextlib.contextmanager
def reporter(options: Options) -> Iterator[Call | None]:
    """Give the function that a solver calls with its state, or None where nobody listens.

    Parameters
    ----------
    options : Options
        ``callback`` is called with a dict: ``iteration``, and per column of the (scaled) problem
        ``active``, ``residual_norm`` and ``normal_residual_norm``, as NumPy arrays. It ends the
        solve by raising StopIteration.
        ``progress`` shows a bar if tqdm is installed.

    Yields
    ------
    callable or None
        Takes the state; True means that the solve shall end.
    """
    bar = _bar() if options.progress else None
    if bar is None and options.callback is None:
        yield None
        return

    def call(state: dict[str, Any]) -> bool:
        if bar is not None:
            bar.update(state["iteration"] - bar.n)
            size = f"{state['normal_residual_norm'].max():.1e}"
            bar.set_postfix(normal_residual=size, refresh=False)
        if options.callback is not None:
            try:
                options.callback(state)
            except StopIteration:
                return True
        return False

    with bar if bar is not None else contextlib.nullcontext():
        yield call


def _bar() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(desc="funclsq", unit=" steps", leave=False)
