"""What is judged: funclsq in torch and in JAX, or any least-squares function of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from funclsq.lstsq import lstsq
from funclsq.pattern import SparsityPattern
from funclsq.sparse import Sparse
from funclsq.validate._torch_side import torch_answers
from funclsq.validate.problem import Arrays, Problem
from funclsq.validate.tangents import Directions

__all__ = ["Candidate", "default_candidates", "jax_candidate", "torch_candidate"]

Candidate = Callable[[Problem, Directions], dict[str, Any]]


def torch_candidate(function: Callable[..., Any] = lstsq, **settings: Any) -> Candidate:
    """Return a candidate for :func:`funclsq.validate.cross_check` from a torch function.

    Parameters
    ----------
    function : callable
        ``function(A, b, **given) -> x`` with ``damp``, ``weights``, ``x0`` among the keywords
        where the problem has them; A is a dense tensor, or a :class:`funclsq.Sparse` where the
        problem is sparse.
    **settings
        Passed on to it.
    """

    def answers(problem: Problem, d: Directions) -> dict[str, Any]:
        pattern = None
        if not problem.dense:
            pattern = SparsityPattern(problem.row, problem.col, problem.shape)

        def solve(p: dict[str, Any]) -> Any:
            values, b, given = p["A"], p["b"], {k: v for k, v in p.items() if k not in ("A", "b")}
            A = values.reshape(problem.shape) if pattern is None else Sparse(pattern, values)
            return function(A, b, **given, **settings)

        return _named(torch_answers(solve, *_working(problem, d)))

    return answers


def jax_candidate(function: Callable[..., Any] | None = None, **settings: Any) -> Candidate:
    """Return a candidate from a JAX function; as :func:`torch_candidate`, of JAX arrays.

    A sparse A is a :class:`funclsq.jax.Sparse`; the function is :func:`funclsq.jax.lstsq` unless
    given.

    Raises
    ------
    ImportError
        If JAX is not installed.
    """
    import funclsq.jax as flj
    from funclsq.validate._jax_side import jax_answers

    function = flj.lstsq if function is None else function

    def answers(problem: Problem, d: Directions) -> dict[str, Any]:
        pattern = None
        if not problem.dense:
            pattern = SparsityPattern(problem.row, problem.col, problem.shape)

        def solve(p: dict[str, Any]) -> Any:
            values, b, given = p["A"], p["b"], {k: v for k, v in p.items() if k not in ("A", "b")}
            A = values.reshape(problem.shape) if pattern is None else flj.Sparse(pattern, values)
            return function(A, b, **given, **settings)

        return _named(jax_answers(solve)(*_working(problem, d)))

    return answers


def default_candidates(**settings: Any) -> tuple[dict[str, Candidate], tuple[str, ...]]:
    """Return funclsq in torch and, where JAX is installed, in JAX; and what to note."""
    candidates = {"torch": torch_candidate(**settings)}
    try:
        candidates["jax"] = jax_candidate(**settings)
    except ImportError as error:
        return candidates, (f"JAX is absent ({error}): no column for it. funclsq[jax] has it.",)
    return candidates, ()


def _working(problem: Problem, d: Directions) -> tuple[Arrays, Arrays, np.ndarray]:
    """Return inputs, tangents and cotangent in the dtype that the candidates work in."""
    real = np.zeros(0, problem.dtype).real.dtype

    def cast(a: np.ndarray) -> np.ndarray:
        return a.astype(problem.dtype if np.iscomplexobj(a) else real)

    inputs = {key: cast(a) for key, a in problem.inputs.items()}
    return inputs, {key: cast(a) for key, a in d.tangents.items()}, cast(d.cotangent)


def _named(answers: dict[str, Any]) -> dict[str, Any]:
    return {"x" if name == "value" else name: a for name, a in answers.items()}
