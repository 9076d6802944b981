"""Progress on a terminal; silence everywhere else, and where tqdm is not installed."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["clock", "steps"]

_EVERY = 0.2  # seconds


@contextlib.contextmanager
def steps(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Show a bar of ``total`` steps; yields what to call, with a text, after each of them."""
    bar = _bar(total=total, desc=title, unit="step")
    if bar is None:
        yield _ignore
        return

    def tick(text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    with bar:
        yield tick


@contextlib.contextmanager
def clock(title: str) -> Iterator[Callable[[str], None]]:
    """Show the seconds that work of unknown length takes; yields what to call with a text."""
    bar = _bar(total=1, desc=title, bar_format="{desc} {elapsed} {postfix}")
    if bar is None:
        yield _ignore
        return
    done = threading.Event()

    def run() -> None:
        while not done.wait(_EVERY):
            bar.refresh()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        with bar:
            yield lambda text: bar.set_postfix_str(text, refresh=False)
            done.set()
            thread.join()
    finally:
        done.set()


def _bar(**settings: Any) -> Any:
    """Return a bar on standard error, or None where nobody would see it."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(leave=False, file=sys.stderr, **settings)


def _ignore(text: str) -> None:
    pass
