"""Forward mode inside forward mode: what a ``jvp`` rule needs to be right when nested."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD

__all__ = ["nested_forward_mode", "primals", "transformed", "unrecorded"]


def nested_forward_mode():
    """Re-enable forward mode inside a ``jvp`` rule.

    torch switches it off there, and an outer level would silently lose every term that passes
    through the rule (pytorch issue 197867).
    """
    return fwAD._set_fwd_grad_enabled(True)


def primals(ctx) -> list[Any]:
    """Saved tensors as this level's rule must see them: without this level's tangents."""
    return [None if t is None else fwAD.unpack_dual(t).primal for t in ctx.saved_tensors]


def transformed() -> bool:
    """Whether a level of forward mode or of torch.func is active."""
    return fwAD._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def unrecorded() -> bool:
    """Whether nothing is recorded or transformed: an operator does without its derivative rule."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed())
