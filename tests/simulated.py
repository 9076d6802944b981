"""A device made of the CPU, to find what would fail or wait on a real one.

Its tensors hold host tensors, and every operation is done on those. It behaves as CUDA does in what
a program can get wrong: operations that mix devices fail (but for numbers of no dimension), the
data cannot be read by NumPy, and whatever makes the host wait for the device, or moves data between
the two, is counted. It says nothing about the kernels, the speed or the memory of a real device.

Registering it changes torch for the whole process; tests that use it run in one of their own.
"""

from __future__ import annotations

import collections
import contextlib
import functools

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["NAME", "Tensor", "counted", "register"]

NAME = "simulated"
_WAITS = {  # the host reads what the device has computed, on CUDA too
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
    "linalg_eigh",
}
_LAZY = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)
_COMPOSITE = "CompositeImplicitAutograd"
_MADE = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "logspace")
_INDEXING = ("index", "index_put", "index_put_")
_MOVES = ("_to_copy", "copy_")
_counts: list[collections.Counter] = []


class Tensor(torch.Tensor):
    """A tensor on the simulated device; ``host`` holds its numbers."""

    @staticmethod
    def __new__(cls, host):
        layout = {"dispatch_layout": True}
        if host.layout == torch.strided:
            layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        out = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), dtype=host.dtype, device=torch.device(NAME, 0), **layout
        )
        torch._C._set_conj(out, host.is_conj())
        torch._C._set_neg(out, host.is_neg())
        out.host = host
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C._PreserveDispatchKeyGuard():
            for key in _LAZY:  # passed already, and what comes next needs them as any other
                torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
            return _do(func, args, kwargs or {})

    def __repr__(self):
        return f"simulated({self.host!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl


@contextlib.contextmanager
def counted():
    """Count by name what makes the host wait, and what moves data between host and device."""
    seen = collections.Counter()
    seen.bytes = collections.Counter()
    _counts.append(seen)
    try:
        yield seen
    finally:
        _counts.remove(seen)


def _note(what, size):
    for seen in _counts:
        seen[what] += 1
        seen.bytes[what] += size


def register():
    """Make the device known to torch."""
    _setup_privateuseone_for_python_backend(NAME)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) moves what it made
    library = torch.library.Library("_", "IMPL")
    library.fallback(_fallback, "PrivateUse1")
    made = torch.library.Library("aten", "IMPL")
    for name in _MADE:  # for which torch makes an empty tensor, and resizes it
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        made.impl(name, functools.partial(_fallback, func), "PrivateUse1")
    _kept.extend((library, made))


_kept: list = []


def _fallback(func, *args, **kwargs):
    return _do(func, args, kwargs)


def _kernels():
    from funclsq import opaque

    return {
        "solve": opaque._single_solve,
        "solve_params": opaque._listed_solve,
        "spmm": opaque._spmm,
        "sddmm": opaque._sddmm,
    }


def _do(func, args, kwargs):
    if func is torch.ops.prim.layout.default:
        return args[0].host.layout
    if func.namespace == "funclsq":
        return _kernels()[func._opname](*args, **kwargs)
    name = func._opname
    whole = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
    if whole and not name.startswith("linalg_"):  # which would resize what it writes to
        return func.decompose(*args, **kwargs)  # below autograd it comes here as a whole
    kwargs = dict(kwargs)
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, Tensor)]
    there = bool(ours)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    if name == "_efficientzerotensor":  # a host tensor without data
        func = torch.ops.aten.zeros.default
    if name in _MOVES:
        source = args[1] if name == "copy_" else args[0]
        there = isinstance(args[0], Tensor) if name == "copy_" else there
        if isinstance(source, Tensor) != there:
            size = source.nbytes if source.layout == torch.strided else 0
            _note("to the device" if there else "to the host", size)
    elif ours and any(t.ndim for t in tensors if not isinstance(t, Tensor)):
        if name in _INDEXING and isinstance(args[0], Tensor):  # whose indices may lie on the host
            _note("to the device", sum(t.nbytes for t in tensors if not isinstance(t, Tensor)))
            return _done(func, args, kwargs, there)
        raise RuntimeError(f"{func}: tensors on {NAME} and on the CPU")
    if ours and name in _WAITS:
        _note(name, 1)
    return _done(func, args, kwargs, there)


def _done(func, args, kwargs, there):
    """What the operation returns on the host, wrapped again where it is ``there``."""
    out = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if not there:
        return out
    written = [
        (kwargs.get(a.name) if i >= len(args) else args[i])
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    hosts = {id(t.host): t for w in written for t in tree_flatten(w)[0] if isinstance(t, Tensor)}

    def wrapped(t):
        if not _plain(t):
            return t
        return hosts[id(t)] if id(t) in hosts else Tensor(t)

    return tree_map(wrapped, out)


def _host(t):
    return t.host if isinstance(t, Tensor) else t


def _plain(t):
    return isinstance(t, torch.Tensor) and not isinstance(t, Tensor)
