"""Arguments of the command line, and what each way of ending means to the shell."""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from funclsq import __version__
from funclsq.cli.commands import check, demo, solve
from funclsq.cli.files import UserError
from funclsq.errors import ConvergenceError, FunclsqWarning
from funclsq.methods import registry

__all__ = ["main"]

_ENDINGS = (
    "exit status: 0 on success; 1 where a solve did not converge or a comparison failed; "
    "2 where the input or the arguments cannot be used; 130 when interrupted"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process unless given.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", FunclsqWarning)
            warnings.showwarning = _show_warning
            status = options.run(options)
            sys.stdout.flush()
            return status
    except UserError as error:
        return _fail(options, str(error), 2)
    except ConvergenceError as error:
        return _fail(options, str(error), 1)
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader has left; keep the interpreter from saying so when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return _fail(options, str(error), 2)
    except MemoryError as error:
        return _fail(options, f"the problem does not fit into memory. {error}".strip(), 2)
    except KeyboardInterrupt:
        return _fail(options, "interrupted", 130)


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"funclsq {options.command}: {message}", file=sys.stderr)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="funclsq",
        description="Differentiable least squares: min ||A x - b||^2 + damp^2 ||x||^2.",
        epilog=_ENDINGS,
    )
    parser.add_argument("--version", action="version", version=f"funclsq {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "solve",
        help="solve A x = b in the least-squares sense",
        description="Solve min ||A x - b||^2 + damp^2 ||x||^2; of several minimisers, the "
        "smallest. x goes to -o, or else to standard output; how it was reached, to standard "
        "error (with --json, to standard output).",
        epilog=_ENDINGS,
    )
    command.add_argument("A", metavar="A.mtx", help="the matrix, a Matrix Market file (.gz too)")
    command.add_argument("b", metavar="b.mtx", help="the right-hand side, of one or more columns")
    command.add_argument("-o", "--output", metavar="x.mtx", help="where to write x (.gz too)")
    _common(command, "relative tolerance of the iterative solvers (atol and btol)")
    command.set_defaults(run=solve)

    command = commands.add_parser(
        "check",
        help="check x and its derivatives, torch, JAX and oracles, on your problem",
        description="Compare x, its gradients, directional derivatives and Hessian-vector "
        "products between the torch core, the JAX adapter and independent oracles.",
        epilog=_ENDINGS,
    )
    command.add_argument("A", metavar="A.mtx", help="the matrix, a Matrix Market file (.gz too)")
    command.add_argument(
        "b", metavar="b.mtx", nargs="?", help="the right-hand side; random unless given"
    )
    _common(
        command,
        "largest relative error that passes; unless given, 100 times what the oracle's own "
        "answer moves when the data move by their rounding",
    )
    command.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    command.set_defaults(run=check)

    command = commands.add_parser(
        "demo",
        help="rebuild a real mountain range from 5%% of its heights",
        description="Rebuild real terrain from 5% of its heights, noisy ones, as one sparse "
        "least-squares problem, and learn its weights by gradient descent through the solve; "
        "compare torch, JAX and oracles on the way. Prints a table and writes a picture.",
        epilog=_ENDINGS,
    )
    command.add_argument("--quick", action="store_true", help="only a crop of the map: seconds")
    command.add_argument(
        "-o",
        "--output",
        metavar="picture.png",
        default="terrain.png",
        help="where to write the picture (default terrain.png)",
    )
    _common(
        command, "largest relative difference of torch and JAX on the whole problem", "cholesky"
    )
    command.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    command.set_defaults(run=demo)
    return parser


def _common(command: argparse.ArgumentParser, tol: str, solver: str = "auto") -> None:
    command.add_argument(
        "--damp", type=_damp, default=0.0, metavar="D", help="damping, D >= 0 (default 0)"
    )
    command.add_argument(
        "--solver",
        type=_solver,
        default=solver,
        metavar="NAME",
        help=f"one of {', '.join(registry.NAMES)} (default {solver})",
    )
    command.add_argument("--tol", type=_tolerance, metavar="T", help=tol)
    command.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _damp(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0; got {text!r}")
    return value


def _tolerance(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a finite number > 0, such as 1e-8; got {text!r}")
    return value


def _solver(text: str) -> str:
    if text not in registry.NAMES:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(registry.NAMES)}; got {text!r}"
        )
    return text
