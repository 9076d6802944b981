"""How a sparse normal matrix is factored: its analysis, kept with the pattern, and whether dense.

A factor that would be nearly full is made dense (see ``backends.dense``), unless a backend was
asked for by name. rslab tells the fill from the pattern alone; SuperLU tells it with its first
factor, which is then made again, so that equal values always give equal digits. The others do not
tell.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from funclsq.backends import backend, dense
from funclsq.backends.registry import Factor
from funclsq.methods._gram import Gram

__all__ = ["analysis", "factored"]

_MAX_SYMBOLIC = 4  # analyses kept per pattern
_MOST_DENSE = 1 << 27  # entries that the dense factors of a batch may have in all


def analysis(gram: Gram, name: str | None, dtype: str, batch: int | None) -> Any:
    """Return the analysis of N, or of ``batch`` of them; kept with the pattern."""
    with gram.pattern.lock:
        key = _key(gram, name, dtype, batch)
        cache = gram.pattern.cache
        found = cache.pop(key, None)
        if found is None:
            found = _analysed(gram, name, dtype, batch)
            kept = [k for k in cache if isinstance(k, tuple) and k[0] == "symbolic"]
            for old in kept[: max(0, len(kept) - _MAX_SYMBOLIC + 1)]:
                del cache[old]
        cache[key] = found
    return found


def factored(
    gram: Gram, name: str | None, batch: int | None, data: np.ndarray, single: bool = False
) -> Factor:
    """Factor the values of N, or of ``batch`` of them; ``single``: if dense, then in single."""
    dtype = data.dtype.name
    symbolic = analysis(gram, name, dtype, batch)
    if isinstance(symbolic, dense.Symbolic):
        return symbolic.factor(data, single)
    factor = symbolic.factor(data)
    if _free(gram, name, batch) and _nearly_full(gram, symbolic, batch):
        symbolic = dense.Symbolic(gram.indptr, gram.indices, batch)
        with gram.pattern.lock:
            gram.pattern.cache[_key(gram, name, dtype, batch)] = symbolic
        return symbolic.factor(data, single)
    return factor


def _key(gram: Gram, name: str | None, dtype: str, batch: int | None) -> tuple[Any, ...]:
    return "symbolic", backend(name, dtype).NAME, batch, _free(gram, name, batch)


def _free(gram: Gram, name: str | None, batch: int | None) -> bool:
    """Whether the factor may be dense."""
    return name in (None, "auto") and (batch or 1) * gram.n**2 <= _MOST_DENSE


def _analysed(gram: Gram, name: str | None, dtype: str, batch: int | None) -> Any:
    if _free(gram, name, batch):
        # a batch has the fill of each of its members
        one = None if batch is None else analysis(gram, name, dtype, None)
        if one is None:
            one = backend(name, dtype).analyze(*_repeated(gram, None))
            if not _nearly_full(gram, one, None):
                return one
        if isinstance(one, dense.Symbolic) or batch is None:
            return dense.Symbolic(gram.indptr, gram.indices, batch)
    return backend(name, dtype).analyze(*_repeated(gram, batch))


def _nearly_full(gram: Gram, symbolic: Any, batch: int | None) -> bool:
    """Whether a sparse factor of this analysis would be nearly full, where that is known."""
    work = getattr(symbolic, "work", None)
    if work is None or isinstance(symbolic, dense.Symbolic):
        return False
    return work[0] > dense.NEARLY_FULL * (batch or 1) * gram.n * (gram.n + 1) / 2


def _repeated(gram: Gram, batch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Structure of N, or of the block diagonal of ``batch`` times N, with int32 indices."""
    indptr, indices = gram.indptr, gram.indices
    if batch is not None:
        block = np.arange(batch, dtype=np.int64)[:, None]
        indices = (indices + block * gram.n).reshape(-1)
        indptr = np.append((indptr[:-1] + block * gram.nnz).reshape(-1), batch * gram.nnz)
    if indptr[-1] >= np.iinfo(np.int32).max:
        raise MemoryError(
            f"the normal matrix has {int(indptr[-1])} entries, more than sparse direct methods "
            "here can index; use solver='lsmr'."
        )
    return indptr.astype(np.int32), indices.astype(np.int32)
