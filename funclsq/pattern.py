"""The static half of a sparse matrix: which entries are stored, and every plan made from that.

A pattern keeps its indices as NumPy arrays. Index tensors are made from them only inside raw
kernels, where no torch.func level is active: a tensor made while ``grad`` or ``jvp`` runs is
wrapped at that level and must not be kept.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import threading
import weakref
from typing import Any

import numpy as np
import scipy  # its subpackages load on first use
import torch
from torch import Tensor

from funclsq.beneath import beneath, outside_transforms

__all__ = [
    "SparsityPattern",
]


_MAX_BATCHED = 4  # block-diagonal replicas of one pattern that are kept
# from where no other process begins: a handle in an exported program must not fit anything here
_counter = itertools.count(secrets.randbits(40) << 20)
_by_handle: weakref.WeakValueDictionary[int, SparsityPattern] = weakref.WeakValueDictionary()


class SparsityPattern:
    """Positions of the stored entries of an (m, n) matrix: entry e sits at (row[e], col[e]).

    Hashable by content, immutable, shared freely between threads, frameworks and transforms.
    Entries may come in any order and may repeat: repeated entries are summed, and each keeps
    its own value and gradient. The CSR structures of A and of A^T, and whatever plans solvers
    make (orderings, symbolic factors), are built once and kept.

    Parameters
    ----------
    row, col : integer array, shape (nnz,)
        Row and column of each entry, of any library (torch, NumPy, JAX).
    shape : tuple of int
        ``(m, n)``.

    Raises
    ------
    TypeError
        If the indices are not integers.
    ValueError
        If row and col differ in length, are not 1-D, or an index is out of bounds.

    Notes
    -----
    Cost: one sort, O(nnz), at first use; indices are kept as int32 where they fit.

    Examples
    --------
    >>> import funclsq as fl
    >>> S = fl.SparsityPattern([0, 1, 2, 2], [0, 1, 0, 1], (3, 2))
    >>> S.nnz, S.shape
    (4, (3, 2))
    """

    __slots__ = (
        "__weakref__",
        "_canonical",
        "_digest",
        "_tensors",
        "_transpose",
        "cache",
        "col",
        "handle",
        "lock",
        "name",
        "row",
        "shape",
    )

    def __init__(self, row: Any, col: Any, shape: tuple[int, int]) -> None:
        m, n = _check_shape(shape)
        row, col = _index_array(row, "row"), _index_array(col, "col")
        if row.shape != col.shape:
            raise ValueError(
                f"SparsityPattern: row and col must have the same length; got {row.size} and "
                f"{col.size}. Pass one row and one column index per stored entry."
            )
        for name, index, size in (("row", row, m), ("col", col, n)):
            if index.size and (index.min() < 0 or index.max() >= size):
                bad = int(index[(index < 0) | (index >= size)][0])
                raise ValueError(
                    f"SparsityPattern: every {name} index must lie in [0, {size}) for shape "
                    f"{(m, n)}; got {bad}."
                )
        small = max(m, n, row.size) < np.iinfo(np.int32).max
        dtype = np.int32 if small else np.int64
        self._setup(_frozen(row, dtype), _frozen(col, dtype), (m, n))

    def _setup(self, row: np.ndarray, col: np.ndarray, shape: tuple[int, int]) -> None:
        self.row, self.col, self.shape = row, col, shape
        self.lock = threading.RLock()
        self.cache: dict[Any, Any] = {}
        self._canonical: tuple[np.ndarray, ...] | None = None
        self._transpose: tuple[np.ndarray, ...] | None = None
        self._digest: bytes | None = None
        self._tensors: dict[Any, Tensor] = {}
        self.handle = next(_counter)
        self.name = str(self.handle)  # which torch.compile never takes for a variable
        _by_handle[self.handle] = self

    @classmethod
    def from_csr(cls, indptr: Any, indices: Any, shape: tuple[int, int]) -> SparsityPattern:
        """Make the pattern of a CSR matrix, its entries in CSR order.

        Parameters
        ----------
        indptr : integer array, shape (m + 1,)
            Start of each row among the entries.
        indices : integer array, shape (nnz,)
            Column of each entry.
        shape : tuple of int
            ``(m, n)``.
        """
        m, _ = _check_shape(shape)
        indptr = _index_array(indptr, "indptr")
        counts = np.diff(indptr.astype(np.int64))  # unsigned ones would wrap
        if indptr.size != m + 1 or indptr[0] != 0 or (counts < 0).any():
            raise ValueError(
                f"SparsityPattern.from_csr: indptr must rise from 0 over {m + 1} entries for "
                f"{m} rows; got {indptr.size} entries."
            )
        return cls(np.repeat(np.arange(m), counts), indices, shape)

    @property
    def nnz(self) -> int:
        """Number of stored entries, repeated ones counted each."""
        return int(self.row.size)

    @property
    def digest(self) -> bytes:
        """A hash of the content: equal for equal patterns, in every process."""
        if self._digest is None:
            h = hashlib.blake2b(repr((self.shape, self.row.dtype.str)).encode(), digest_size=16)
            h.update(self.row.data)
            h.update(self.col.data)
            self._digest = h.digest()
        return self._digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return self.shape == other.shape and self.nnz == other.nnz and self.digest == other.digest

    def __repr__(self) -> str:
        return f"SparsityPattern(shape={self.shape}, nnz={self.nnz})"

    def __reduce__(self) -> tuple[Any, ...]:
        return SparsityPattern, (self.row, self.col, self.shape)

    def __copy__(self) -> SparsityPattern:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityPattern:
        return self

    # The canonical CSR form: rows in order, columns rising within a row, repeats summed.

    def _canonicalise(self) -> tuple[np.ndarray, ...]:
        if self._canonical is None:
            with self.lock:
                if self._canonical is None:
                    self._canonical = _canonical_csr(self.row, self.col, self.shape)
        return self._canonical

    @property
    def indptr(self) -> np.ndarray:
        """Row starts of the canonical CSR form."""
        return _read_only(self._canonicalise()[0])

    @property
    def indices(self) -> np.ndarray:
        """Columns of the canonical CSR form."""
        return _read_only(self._canonicalise()[1])

    @property
    def order(self) -> np.ndarray | None:
        """Entry order that sorts the entries into CSR order; None if they are in it already."""
        order = self._canonicalise()[2]
        return None if order is None else _read_only(order)

    @property
    def slot(self) -> np.ndarray | None:
        """CSR slot of each *sorted* entry; None if no entry repeats."""
        slot = self._canonicalise()[3]
        return None if slot is None else _read_only(slot)

    @property
    def nnz_unique(self) -> int:
        """Number of distinct positions."""
        return int(self.indices.size)

    def _transposed(self) -> tuple[np.ndarray, ...]:
        if self._transpose is None:
            with self.lock:
                if self._transpose is None:
                    self._transpose = _transpose_csr(self.indptr, self.indices, self.shape)
        return self._transpose

    @property
    def t_indptr(self) -> np.ndarray:
        """Row starts of the CSR form of A^T."""
        return _read_only(self._transposed()[0])

    @property
    def t_indices(self) -> np.ndarray:
        """Columns (rows of A) of the CSR form of A^T."""
        return _read_only(self._transposed()[1])

    @property
    def t_perm(self) -> np.ndarray:
        """Permutation from the CSR values of A to those of A^T."""
        return _read_only(self._transposed()[2])

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Return an index array as a tensor on ``device`` (raw kernels only; kept)."""
        key = (name, device)
        found = self._tensors.get(key)
        if found is None:
            array = getattr(self, name)
            if not array.flags.writeable:  # torch warns of read-only memory; nobody writes here
                array = array.view()
                array.setflags(write=True)
            found = self._tensors[key] = torch.from_numpy(array).to(device)
        return found

    def permutation(self, name: str, device: torch.device) -> Tensor | None:
        """Return one of order, slot and inverse_order as :meth:`tensor` does; None if trivial."""
        key = (name, device)
        if key in self._tensors:
            return self._tensors[key]
        return None if getattr(self, name) is None else self.tensor(name, device)

    @property
    def csr_rows(self) -> np.ndarray:
        """Row of each slot of the canonical CSR form."""
        rows = np.arange(self.shape[0], dtype=self.indices.dtype)
        return np.repeat(rows, np.diff(self.indptr))

    @property
    def place(self) -> np.ndarray:
        """Where each slot of the canonical CSR form lies in the matrix written out by rows."""
        return self.csr_rows.astype(np.int64) * self.shape[1] + self.indices

    @property
    def inverse_order(self) -> np.ndarray | None:
        """CSR slot of each entry as the user numbered it; None if entry e is slot e."""
        if self.order is None:
            return self.slot
        out = np.empty(self.nnz, dtype=np.int64)
        out[self.order] = np.arange(self.nnz) if self.slot is None else self.slot
        return out

    def repeated(self, copies: int) -> SparsityPattern:
        """Return the block-diagonal pattern of ``copies`` canonical CSR blocks, one by one."""
        key = ("repeated", copies)
        with self.lock:
            found = self.cache.pop(key, None)
            if found is None:
                m, n = self.shape
                block = np.arange(copies, dtype=np.int64)[:, None]
                found = SparsityPattern(
                    (block * m + self.csr_rows).reshape(-1),
                    (block * n + self.indices).reshape(-1),
                    (copies * m, copies * n),
                )
                kept = [k for k in list(self.cache) if isinstance(k, tuple) and k[0] == "repeated"]
                for old in kept[: max(0, len(kept) - _MAX_BATCHED + 1)]:
                    del self.cache[old]
            self.cache[key] = found
        return found

    @property
    def T(self) -> SparsityPattern:
        """The pattern of the transpose; entries keep their order."""
        with self.lock:
            found = self.cache.get("T")
            if found is None:
                found = SparsityPattern(self.col, self.row, self.shape[::-1])
                self.cache["T"] = found
        return found


def pattern_of_handle(handle: int) -> SparsityPattern:
    """Return the live pattern with this handle."""
    return _by_handle[int(handle)]


def _frozen(array: np.ndarray, dtype: Any) -> np.ndarray:
    out = np.array(array, dtype=dtype, order="C", copy=True)
    out.setflags(write=False)
    return out


def _read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that cannot be written through: plans and tensors are made of what is kept."""
    view = array.view()
    view.setflags(write=False)
    return view


def _check_shape(shape: Any) -> tuple[int, int]:
    try:
        m, n = (int(s) for s in shape)
    except (TypeError, ValueError):
        raise ValueError(f"SparsityPattern: shape must be a pair (m, n); got {shape!r}.") from None
    if m < 0 or n < 0:
        raise ValueError(f"SparsityPattern: shape must not be negative; got {(m, n)}.")
    return m, n


def _index_array(index: Any, name: str) -> np.ndarray:
    """Bring indices of any library to a 1-D NumPy integer array on the host."""
    if isinstance(index, Tensor):
        refusal = TypeError(
            f"SparsityPattern: {name} is batched by vmap; a pattern is static. Make it outside "
            "vmap."
        )
        index = beneath(index, refusal)
        with outside_transforms():
            index = index.detach().cpu().numpy()
    array = np.asarray(index)
    if array.size == 0 and array.dtype == np.float64:
        array = array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"SparsityPattern: {name} must hold integers; got dtype {array.dtype}. Convert it "
            "with .astype(int) or .long()."
        )
    if array.ndim != 1:
        raise ValueError(f"SparsityPattern: {name} must be 1-D; got shape {array.shape}.")
    return array


def _canonical_csr(row, col, shape):
    """Sort entries by (row, column) and number the distinct positions.

    Returns (indptr, indices, order or None, slot or None).
    """
    m, n = shape
    dtype = row.dtype
    key = row.astype(np.int64) * max(n, 1) + col
    order = None
    if key.size > 1 and not (key[1:] >= key[:-1]).all():
        order = np.argsort(key, kind="stable")
        key = key[order]
    slot = None
    if key.size > 1:
        new = np.empty(key.size, dtype=bool)
        new[0] = True
        np.not_equal(key[1:], key[:-1], out=new[1:])
        if not new.all():
            slot = np.cumsum(new, dtype=np.int64) - 1
            key = key[new]
    indices = (key % max(n, 1)).astype(dtype)
    counts = np.bincount(key // max(n, 1), minlength=m)[:m]
    indptr = np.zeros(m + 1, dtype=dtype)
    np.cumsum(counts, out=indptr[1:])
    return indptr, indices, order, slot


def _transpose_csr(indptr, indices, shape):
    """Transpose a CSR structure; returns (indptr, indices, permutation of the values)."""
    number = np.arange(indices.size, dtype=indices.dtype)
    csc = scipy.sparse.csr_array((number, indices, indptr), shape=shape).tocsc()
    return (
        csc.indptr.astype(indptr.dtype, copy=False),
        csc.indices.astype(indices.dtype, copy=False),
        csc.data,
    )
