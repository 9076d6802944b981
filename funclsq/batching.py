"""vmap rules: a batch of columns is more columns; a batch of matrices is a leading dimension.

Each rule brings a batched call to one call in the shapes of the primitive, whatever ``call`` is:
an autograd Function above the transforms, or the opaque operator below them.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["vmap_sddmm", "vmap_solve", "vmap_spmm"]


def front(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 0)


def fold_columns(size: int, t: Tensor | None, dim: int | None) -> Tensor | None:
    """(..., rows, k) batched at dim -> (..., rows, size * k)."""
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, -2).flatten(-2)


def unfold_columns(size: int, t: Tensor) -> Tensor:
    return t.unflatten(-1, (size, -1)).movedim(-2, 0)


def merge_batch(size: int, tensors, dims, cores):
    """Bring the batch to the front, merged with an inner batch; None keeps shared operands."""
    moved = [front(t, d) for t, d in zip(tensors, dims)]
    inner = None
    for t, d, core in zip(moved, dims, cores):
        if t is not None and t.ndim > core + (d is not None):
            inner = t.shape[0 if d is None else 1]
    if inner is None:
        return moved, None
    out = []
    for t, d, core in zip(moved, dims, cores):
        if t is None or (d is None and t.ndim == core):
            out.append(t)
            continue
        if d is None:
            t = t.unsqueeze(0)
        elif t.ndim == core + 1:
            t = t.unsqueeze(1)
        out.append(t.expand(size, inner, *t.shape[2:]).flatten(0, 1))
    return out, inner


def split_batch(size: int, inner: int | None, t: Tensor) -> Tensor:
    return t if inner is None else t.unflatten(0, (size, inner))


def vmap_spmm(size, dims, values, v, call):
    """A v or A^H v over a batch of values, of columns, or of both."""
    if dims[0] is None:  # one matrix: more columns
        return unfold_columns(size, call(values, fold_columns(size, v, dims[1])))
    (values, v), inner = merge_batch(size, (values, v), dims, (1, 2))
    return split_batch(size, inner, call(values, v))


def vmap_sddmm(size, dims, U, V, call):
    """One sampled outer product per member."""
    (U, V), inner = merge_batch(size, (U, V), dims, (2, 2))
    return split_batch(size, inner, call(U, V))


def vmap_solve(size, dims, param_ndims, tensors, call):
    """Batch (w, d2, c, g, gate, *params), each at its entry of dims or shared."""
    w, d2, c, g, gate, *params = tensors
    if all(d is None for d in (*dims[:2], *dims[5:])):  # one matrix: more columns
        if dims[4] is not None:  # one matrix is deficient or not, for every column
            gate = gate.movedim(dims[4], 0).amax(0)
        c, g = fold_columns(size, c, dims[2]), fold_columns(size, g, dims[3])
        x, s, info = call(w, d2, c, g, gate, *params)
        table = info.unflatten(-2, (size, -1)).movedim(-3, 0)
        return unfold_columns(size, x), unfold_columns(size, s), table
    merged, inner = merge_batch(size, tensors, dims, (1, 1, 2, 2, 0, *param_ndims))
    return tuple(split_batch(size, inner, t) for t in call(*merged))
