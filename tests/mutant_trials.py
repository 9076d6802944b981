"""Trials of changed sources: which tests execute a line, and which of them fails on a change.

The tests are collected once, on the source as it is. Everything after runs in forked processes:

- all tests one after the other, under a line trace: they must pass, and the time of each and the
  lines that it executes are taken;
- one trial for each change: the functions that differ get their changed code, and the tests that
  execute the changed lines run until one fails, those first that promise most for their time. All
  run where none is seen to execute them, as on threads that Python does not know.
"""

from __future__ import annotations

import ast
import gc
import json
import os
import resource
import signal
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MEMORY = 12 << 30


class Verdict(NamedTuple):
    """The test that failed, if one did, and whether its time or a crash ended it."""

    test: str | None
    late: bool = False
    crashed: bool = False


class Trials:
    """A pytest plugin that judges changes instead of running tests.

    Parameters
    ----------
    files : list of Path
        The files that changes are made in.
    work : callable
        Called with this object once the tests are known to pass.
    """

    def __init__(self, files: list[Path], work: Callable[[Trials], None]) -> None:
        self.files, self.work = files, work
        self.tried: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.whole = 0.0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the times and the lines of the tests, and go to work."""
        if session.testsfailed:
            raise pytest.UsageError("the tests cannot be collected")
        self.session = session
        self.items = {item.nodeid: item for item in session.items}
        self.functions = _functions({str(f) for f in self.files})
        gc.freeze()  # what a forked process does not touch, it need not copy
        start = os.times()
        told = self._forked(list(self.items), dict.fromkeys(self.items, 600.0), traced=True)
        end = os.times()
        self.whole = end.children_user + end.children_system
        self.whole -= start.children_user + start.children_system
        failed = _verdict(told).test
        if failed is not None:
            raise pytest.UsageError(f"fails on the source as it is: {failed}")
        done = [t for t in told if "seconds" in t]
        self.seconds = {t["test"]: t["seconds"] for t in done}
        self.lines = {t["test"]: {(file, line) for file, line in t["lines"]} for t in done}
        self.work(self)
        return True

    def judge(self, file: Path, tree: ast.Module, first: int, last: int) -> Verdict:
        """Try a file as this tree, which differs from it in these lines."""
        place = {(str(file), line) for line in range(first, last + 1)}
        names = [n for n, lines in self.lines.items() if lines & place] or list(self.items)
        # by what a kill by each has cost so far, and would if the next trial were one
        names.sort(key=lambda n: self.seconds[n] * (1 + self.tried[n]) / (1 + self.kills[n]))
        limits = {n: 10 + 10 * self.seconds[n] for n in names}
        told = self._forked(names, limits, change=(file, tree))
        verdict = _verdict(told)
        self.tried.update(t["test"] for t in told if "seconds" in t)
        if verdict.test is not None:
            self.tried[verdict.test] += 1
            self.kills[verdict.test] += 1
        return verdict

    def _forked(self, names, limits, traced=False, change=None) -> list[dict[str, Any]]:
        """Run tests in a process of their own until one fails, and return what it told."""
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of JAX, which has not been started yet
            child = os.fork()
        if child == 0:
            try:
                os.close(read)
                with os.fdopen(write, "w") as out:
                    self._child(out, names, limits, traced, change)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            told = [json.loads(line) for line in stream if line.endswith("\n")]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not told or not (code or "end" in told[-1]):
            raise pytest.UsageError("a trial could not be made")
        return [*told, {**told[-1], "signal": -code}] if code else told

    def _child(self, out, names, limits, traced, change) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if change is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            self._change(*change)

        def tell(**what) -> None:
            out.write(json.dumps(what) + "\n")
            out.flush()

        for name, after in zip(names, [*names[1:], None], strict=True):
            tell(test=name)
            lines: set[tuple[str, int]] = set()
            signal.alarm(int(limits[name]) + 1)  # ends the process
            if traced:
                _forget()
                sys.settrace(_tracer({str(f) for f in self.files}, lines))
            start = time.monotonic()
            item, following = self.items[name], self.items.get(after)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.settrace(None)
            signal.alarm(0)
            if self.session.testsfailed:
                tell(test=name, failed=True, end=True)
                return
            tell(test=name, seconds=time.monotonic() - start, lines=sorted(lines))
        tell(end=True)

    def _change(self, file: Path, tree: ast.Module) -> None:
        """Give the functions of a file the code of a tree."""
        old = _codes(compile(file.read_text(encoding="utf-8"), str(file), "exec"))
        new = _codes(compile(tree, str(file), "exec"))
        changed = [key for key in old if key in self.functions and old[key] != new[key]]
        if not changed:
            raise RuntimeError("nothing is changed")
        for key in changed:
            for function in self.functions[key]:
                function.__code__ = new[key]


def _verdict(told: list[dict[str, Any]]) -> Verdict:
    last = told[-1]
    if "signal" in last:
        late = last["signal"] == signal.SIGALRM
        return Verdict(last["test"], late, not late)
    return Verdict(last["test"] if "failed" in last else None)


def _forget() -> None:
    """Drop what earlier tests left, so that a test executes the lines that it needs."""
    sys.modules["funclsq.raw"].clear_cache()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


Place = tuple[str, str, int]


def _place(code: types.CodeType) -> Place:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _codes(code: types.CodeType) -> dict[Place, types.CodeType]:
    """The code of every function in this code, by its place."""
    found = {_place(code): code}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= _codes(inner)
    return found


def _functions(files: set[str]) -> dict[Place, list[types.FunctionType]]:
    """Every function that was made from these files, by the place of its code."""
    found: dict[Place, list[types.FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename in files:
            found.setdefault(_place(thing.__code__), []).append(thing)
    return found


def _tracer(files, lines):
    def local(frame, event, argument):
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def entered(frame, event, argument):
        return local if frame.f_code.co_filename in files else None

    return entered
