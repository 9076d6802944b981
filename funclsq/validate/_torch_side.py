"""Value and derivatives of a torch function through torch.func, in every nesting of two modes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["torch_answers"]

Arrays = dict[str, np.ndarray]
Function = Callable[[dict[str, Tensor]], Tensor]


def torch_answers(
    fn: Function,
    inputs: Arrays,
    tangents: Arrays,
    cotangent: np.ndarray,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return value and derivatives of ``fn``, a function of a dict of tensors, as NumPy arrays.

    Parameters
    ----------
    fn : callable
        ``fn({key: Tensor}) -> Tensor``.
    inputs, tangents : dict of str to array
        Where, and along what.
    cotangent : array, shape as the value
        Every gradient is that of ``Re <cotangent, fn>``.
    only : tuple of str
        The kinds wanted, of "value", "jvp", "vjp" and so on; all unless given.

    Returns
    -------
    dict
        ``value``; for every key ``jvp key``, ``vjp key``, and its Hessian-vector product as
        ``hvp key`` (forward over reverse), ``hvp key (r/r)`` and ``hvp key (r/f)``; and
        ``jvp of jvp``, the product of the cotangent with the second directional derivative.
        Where torch raised, the exception stands in place of the array.
    """
    at = {key: torch.tensor(a) for key, a in inputs.items()}
    along = {key: torch.tensor(a) for key, a in tangents.items()}
    x_bar = torch.tensor(cotangent)

    def gradient(p: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.vjp(fn, p)[1](x_bar)[0]

    def slope(p: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(fn, (p,), (along,))[1]

    def move(key: str) -> Tensor:
        one = {k: t if k == key else torch.zeros_like(t) for k, t in along.items()}
        return torch.func.jvp(fn, (at,), (one,))[1]

    out: dict[str, Any] = {}

    def record(names: list[str], compute: Callable[[], Any]) -> None:
        if only and names[0].partition(" ")[0] not in only:
            return
        try:
            found = compute()
            found = found if isinstance(found, dict) else {"": found}
            for name, a in zip(names, found.values(), strict=True):
                out[name] = a.detach().resolve_conj().numpy()
        except Exception as error:  # what a candidate raises is a finding, not a failure of ours
            for name in names:
                out[name] = error

    record(["value"], lambda: fn(at))
    for key in inputs:
        record([f"jvp {key}"], functools.partial(move, key))
    record([f"vjp {k}" for k in at], lambda: gradient(at))
    record([f"hvp {k}" for k in at], lambda: torch.func.jvp(gradient, (at,), (along,))[1])
    record([f"hvp {k} (r/r)" for k in at], lambda: torch.func.vjp(gradient, at)[1](along)[0])
    record([f"hvp {k} (r/f)" for k in at], lambda: torch.func.vjp(slope, at)[1](x_bar)[0])

    def twice() -> Tensor:
        second = torch.func.jvp(slope, (at,), (along,))[1]
        return (x_bar.conj() * second).real.sum()

    record(["jvp of jvp"], twice)
    return out
