"""Plans and structures as torch.compile can trace them: plain attributes and an int handle.

Dynamo follows neither a cache with a lock nor hashing by content, and need not: what is static
about a solve is settled once while it traces, and the compiled graph holds the plan's number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD

from funclsq.methods._protocol import Options
from funclsq.operators import DenseStructure, SparseStructure
from funclsq.pattern import SparsityPattern, pattern_of_handle
from funclsq.plan import Plan

__all__ = ["traced_plan", "traced_structure"]

_kept: dict[int, Plan] = {}  # plans that compiled graphs refer to, which live as long


class TracedStructure:
    """Stands for a SparseStructure or DenseStructure while tracing."""

    def __init__(self, kind, shape, pattern, param_ndims) -> None:
        self.kind, self.shape, self.pattern, self.param_ndims = kind, shape, pattern, param_ndims


class TracedPlan:
    """Stands for a Plan while tracing."""

    def __init__(self, handle, structure, nonsingular) -> None:
        self.handle, self.structure, self.nonsingular = handle, structure, nonsingular


def traced_structure(shape: Any, pattern: SparsityPattern | None) -> TracedStructure:
    """Describe a structure without hashing it."""
    if pattern is None:
        return TracedStructure("dense", (shape[0], shape[1]), None, (2,))
    return TracedStructure("sparse", pattern.shape, pattern, (1,))


def traced_plan(
    structure: Any,
    settings: Any,
    full_rank: bool,
    damped: bool,
    on_failure: str,
    check: bool,
    wanted: bool,
) -> TracedPlan:
    """Settle the plan of a solve that is being traced; ``wanted``: derivatives will follow."""
    if not isinstance(structure, TracedStructure):
        raise TypeError(
            "lstsq: under torch.compile A must be a dense tensor or a funclsq.Sparse made "
            "outside; a torch sparse tensor or LinearOperator cannot be traced."
        )
    if not isinstance(settings.solver, str):
        raise TypeError("lstsq: under torch.compile solver must be a name.")
    pattern = "" if structure.pattern is None else structure.pattern.name
    m, n = map(operator.index, structure.shape)
    handle = _plan_handle(
        pattern, m, n, settings.solver, settings.given, full_rank, damped, on_failure, check, wanted
    )
    return TracedPlan(handle, structure, full_rank or damped)


def _plan_handle(pattern, m, n, solver, given, full_rank, damped, on_failure, check, wanted) -> int:
    levels = torch._C._functorch.get_interpreter_stack() or ()
    forward = any(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)
    if forward or fwAD._current_level >= 0:
        raise RuntimeError(
            "lstsq: torch.compile drops forward-mode rules without a word, so jvp, jacfwd and "
            "hessian of lstsq cannot be compiled. Compile what is inside the transform instead, "
            "or leave the transform uncompiled with torch.compiler.disable."
        )
    structure: Any = DenseStructure(m, n)
    if pattern:
        structure = SparseStructure(pattern_of_handle(int(pattern)))
    options = Options(solver=solver, **dict(given))
    plan = Plan.of(structure, options, full_rank, damped, on_failure, check, True, wanted)
    _kept[plan.handle] = plan
    return plan.handle


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo here.
_plan_handle._dynamo_marked_constant = True  # type: ignore[attr-defined]
