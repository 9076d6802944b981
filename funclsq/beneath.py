"""The data under what torch puts around a tensor: torch.func's wrappers, a tracer's stand-ins."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

__all__ = ["beneath", "differentiated", "outside_transforms", "tracing"]

outside_transforms = temporarily_clear_interpreter_stack  # inside, no result is wrapped


def tracing() -> bool:
    """Whether tensors are stand-ins without data (torch.compile, make_fx)."""
    return bool(
        torch.compiler.is_compiling() or torch.fx.experimental.proxy_tensor.get_proxy_mode()
    )


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether derivatives of what is made from these may be asked for; a hint, at times too wide.

    True inside every ``grad``, ``vjp``, ``jvp`` and forward-mode level, whatever it is taken by.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    kinds = torch._C._functorch.TransformType
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in levels)


def beneath(t: Tensor, batched: Exception | None = None) -> Tensor:
    """Take torch.func's wrappers off; raise ``batched``, if given, where vmap maps over ``t``.

    Without it the whole batch is returned, with vmap's dimension where it lies.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if batched is not None and functorch.is_batchedtensor(t):
            raise batched
        t = functorch.get_unwrapped(t)
    return t
