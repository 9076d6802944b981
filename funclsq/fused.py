"""The sampled outer product in one pass over the entries, where numba is installed.

torch has no such loop: for few columns two vectors are gathered, multiplied and added up for each
(``products.sddmm_few``), and for more its own product takes 27 ns for an entry in float64 before it
reads a number (``products.sddmm_csr``). One thread, by torch over by the loop, on four patterns of
160,000 to 370,000 entries:

    columns           1        2        4        5        8       16       64
    float64     1.8-3.5  2.2-6.8  3.0-4.1  4.1-8.3  3.8-9.8  2.5-4.9  1.0-2.6
    complex128  1.3-4.5  3.6-5.2  2.0-7.7  1.8-3.0  1.5-2.2  1.3-2.3  1.1-1.5
    float32     1.4-2.9  3.8-5.2  1.0-2.2  1.6-4.4  1.5-2.4  1.3-2.1  1.3-1.6
    complex64   1.2-1.9  1.7-2.6  1.6-2.3  2.1-2.5  2.3-3.4  1.6-2.5  1.4-2.1

Equal to rounding, and real numbers of up to four columns to the last digit.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from funclsq import compiled, spare
from funclsq.products import few_terms

__all__ = ["sampled"]

LEAST = 1 << 14  # products (entries x columns) below which there is little to gain: 0.2 ms


def sampled(indptr: Tensor, indices: Tensor, U: Tensor, V: Tensor) -> Tensor | None:
    """sum_k U[.., i, k] conj(V[.., j, k]) at the entries of a CSR pattern; None: leave it to torch.

    U is (m, k) or (b, m, k), V (n, k) or (b, n, k); the result (nnz,) or (b, nnz).
    """
    k, members = U.shape[-1], U.shape[0] if U.ndim == 3 else 1
    work = members * indices.shape[0] * k
    if U.device.type != "cpu" or work < max(LEAST, 1):
        return None
    loops = compiled.loops()
    if loops is None:
        return None
    few = k <= few_terms(U.dtype)
    loop = loops.sample_few if few else loops.sample_many
    u, v = (_array(t.mT if few else t) for t in (U, V.conj()))
    out = spare.empty((members, indices.shape[0]), U.dtype)
    rows, cols, entries = compiled.unsigned(indptr), compiled.unsigned(indices), out.numpy()
    compiled.shared(
        lambda _, start, stop: loop(rows, cols, u, v, entries, start, stop),
        compiled.parts(rows, work),
    )
    return out.view(*U.shape[:-2], -1)


def _array(t: Tensor) -> np.ndarray:
    """A block, or one for each member, as a stack of blocks in the order of their indices."""
    a = np.ascontiguousarray(
        t.detach().resolve_conj().resolve_neg().numpy()
    )  # torch: twice as long
    return a.reshape(-1, *a.shape[-2:])
