"""Functions of pytrees, seen as functions of a dict of named arrays to one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from funclsq.validate.problem import Arrays

__all__ = ["Arguments", "Flat", "as_array"]


class Arguments:
    """The arguments, flattened: named NumPy arrays to differentiate, and the rest."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        leaves, self._spec = pytree.tree_flatten_with_path(args)
        self.inputs: Arrays = {}
        self._leaves: list[tuple[str | None, Any]] = []
        for path, leaf in leaves:
            array = as_array(leaf)
            name = f"args{pytree.keystr(path)}"
            if array is not None and array.dtype.kind in "fc":
                self.inputs[name] = array
                self._leaves.append((name, None))
            else:
                self._leaves.append((None, leaf if array is None else array))
        self.wide = any(a.dtype in (np.float64, np.complex128) for a in self.inputs.values())

    def restored(self, p: dict[str, Any], carry: Callable[[np.ndarray], Any]) -> Any:
        """Return the arguments with these arrays in their places."""
        leaves = [
            p[name] if name else carry(leaf) if isinstance(leaf, np.ndarray) else leaf
            for name, leaf in self._leaves
        ]
        return pytree.tree_unflatten(leaves, self._spec)


class Flat:
    """A function of pytrees as one of a dict of arrays, to one vector of all its outputs."""

    def __init__(
        self,
        fn: Callable[..., Any],
        arguments: Arguments,
        flatten: Callable[..., Any],
        keystr: Callable[..., str],
        carry: Callable[..., Any],
    ) -> None:
        self._fn, self._arguments = fn, arguments
        self._flatten, self._keystr, self._carry = flatten, keystr, carry

    def _named(self, p: dict[str, Any]) -> dict[str, Any]:
        out = self._fn(*self._arguments.restored(p, self._carry))
        leaves = {self._keystr(path): leaf for path, leaf in self._flatten(out)[0]}
        return {key: leaves[key] for key in sorted(leaves) if hasattr(leaves[key], "dtype")}

    def outputs(self, inputs: Arrays) -> Arrays:
        """Return the outputs at the inputs."""
        p = {key: self._carry(a) for key, a in inputs.items()}
        arrays = {key: as_array(a) for key, a in self._named(p).items()}
        return {key: a for key, a in arrays.items() if a is not None}

    def __call__(self, p: dict[str, Any]) -> Any:
        """Return the differentiable outputs, joined."""
        parts = [a.reshape(-1) for a in self._named(p).values() if _inexact(a)]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else _join(parts)


def _join(parts: list[Any]) -> Any:
    import jax.numpy as jnp

    return jnp.concatenate(parts)


def _inexact(a: Any) -> bool:
    if isinstance(a, Tensor):
        return a.is_floating_point() or a.is_complex()
    return np.dtype(a.dtype).kind in "fc"


def as_array(leaf: Any) -> np.ndarray | None:
    """Return an array of any library as NumPy's, by DLPack or its own protocol."""
    if isinstance(leaf, Tensor):
        return leaf.detach().resolve_conj().cpu().numpy()
    return np.asarray(leaf) if hasattr(leaf, "__array__") else None
