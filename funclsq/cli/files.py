"""Matrix Market files in and out, and words for everything that can be wrong with them."""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import scipy.sparse

__all__ = ["UserError", "read_matrix", "read_rhs", "require_writable", "write_array"]

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
_NUMERIC = b"0123456789+-.eEdDiInNfFaAtTyY \t\r\n"  # with inf, infinity and nan
_REPLACED = bytes(c if c in _NUMERIC else ord("?") for c in range(256))
_PART = 1 << 20
_EXPANSION = {".gz": 1100, ".bz2": 10**6}  # at most, by the format


class UserError(Exception):
    """The input cannot be used; the message says what was required, what came, what to do."""


def read_matrix(path: str) -> Any:
    """Read A: a COO array or a 2-D array, float64 or complex128, all entries finite.

    Coordinate and array files, of real, integer, complex and pattern (all ones) fields, general
    or symmetric, plain or compressed (``.gz``, ``.bz2``).

    Raises
    ------
    UserError
        If there is no such file, it is not a Matrix Market file, or an entry is not finite.
    """
    A = _read(path)
    if scipy.sparse.issparse(A):
        A = scipy.sparse.coo_array(A)
        entries = A.data
    else:
        entries = A
    bad = np.argwhere(~np.isfinite(entries))
    if len(bad):
        i, j = (A.row[bad[0, 0]], A.col[bad[0, 0]]) if scipy.sparse.issparse(A) else bad[0]
        raise UserError(
            f"{path}: entries must be finite; got {entries[tuple(bad[0])]} in row {i + 1}, column "
            f"{j + 1} ({_many(len(bad), 'such entry', 'such entries')}). Remove or replace them."
        )
    return A


def read_rhs(path: str, rows: int, matrix: str) -> np.ndarray:
    """Read b as (m,), or (m, k) where the file holds several columns.

    Parameters
    ----------
    path : str
        A Matrix Market file.
    rows : int
        What b must have, one per row of A.
    matrix : str
        Path of A, for the message.

    Raises
    ------
    UserError
        As :func:`read_matrix`, and if b has the wrong number of rows.
    """
    b = read_matrix(path)
    if b.shape[0] != rows:
        hint = " It has the shape of a row: transpose it." if b.shape == (1, rows) else ""
        raise UserError(
            f"{path}: b must have {rows} rows, one per row of {matrix}; got {b.shape[0]} x "
            f"{b.shape[1]}.{hint or ' Pass the right-hand side that belongs to this matrix.'}"
        )
    b = b.toarray() if scipy.sparse.issparse(b) else b
    return b[:, 0] if b.shape[1] == 1 else b


def require_writable(path: str) -> None:
    """Find out before long work whether a file can be written.

    Raises
    ------
    UserError
        If its folder does not exist or may not be written to, or the path is a folder.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {str(folder)!r}. Create it, or change -o.")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; -o needs the path of a file.")
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise UserError(f"{path} may not be written to. Change -o.")


def write_array(path: str, x: np.ndarray, comment: str) -> None:
    """Write x as a Matrix Market array with every digit; compressed where path ends in ``.gz``."""
    opener: Any = gzip.open if path.endswith(".gz") else open
    with opener(path, "wb") as file:
        scipy.io.mmwrite(file, x[:, None] if x.ndim == 1 else x, comment=comment)


def _read(path: str) -> Any:
    if not Path(path).exists():
        raise UserError(f"{path}: there is no such file. Pass the path of a Matrix Market file.")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder. Pass the path of a Matrix Market file.")
    try:
        shape, numbers = _check_claims(path)
        if numbers == 0 and 0 in shape:  # SciPy 1.17 divides by these sizes
            return np.zeros(shape)
        with _OPENERS.get(Path(path).suffix, open)(path, "rb") as file:
            body = _Body(file)
            A = scipy.io.mmread(body)
        if body.strange:
            raise ValueError(f"{body.strange!r} is no part of a number")
        if body.count != numbers:
            raise ValueError(f"its header promises {numbers} numbers; it holds {body.count}")
    except PermissionError:
        raise UserError(f"{path} may not be read. Change its permissions.") from None
    except MemoryError as error:
        raise UserError(f"{path} does not fit into memory: {error}.") from None
    except (ValueError, OverflowError, OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a Matrix Market file that can be read: {str(error).rstrip('.')}. It "
            "must begin with a line such as '%%MatrixMarket matrix coordinate real general'; "
            "scipy.io.mmwrite makes such files."
        ) from None
    return A.astype(np.complex128 if np.iscomplexobj(A) else np.float64)


class _Body:
    """A Matrix Market file as SciPy 1.17 can safely read it, with what it overlooks noted.

    It crashes on a NUL behind a number and on a last line without its end, and reads 1 from
    "1x" and from "1 x". So the numbers are counted here, what is part of none is replaced, and
    the file ends with a line's end. The size line is the first that is no comment.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._space, self._ended = file, True, False
        self.strange: bytes = b""  # what is no part of a number
        self.count = 0  # of numbers
        head, line = b"", b"%"
        while line.startswith(b"%") or (line and not line.strip()):
            line = file.readline()
            head += line
        self._ready = io.BytesIO(head)

    def read(self, size: int = -1) -> bytes:
        """Bytes of the file, never more than to the end of a part."""
        data = self._ready.read(size)
        if not data and not self._ended:
            self._ready = io.BytesIO(self._part())
            data = self._ready.read(size)
        return data

    def _part(self) -> bytes:
        data = self._file.read(_PART)
        if not data:
            self._ended = True
            return b"\n"
        self.strange = self.strange or data.translate(None, _NUMERIC)[:1]
        space = np.frombuffer(data, np.uint8) <= ord(" ")
        starts = space[:-1] & ~space[1:]
        self.count += int(np.count_nonzero(starts)) + int(self._space and not space[0])
        self._space = bool(space[-1])
        return data.translate(_REPLACED)


def _check_claims(path: str) -> tuple[tuple[int, int], int]:
    """Hold what the header says against the size of the file and of the memory.

    Returns the shape, and how many numbers follow the header.

    Raises
    ------
    UserError
        Before anything of the size that a damaged header claims is allocated.
    """
    rows, columns, entries, layout, field, symmetry = scipy.io.mminfo(path)
    if min(rows, columns, entries) < 0:
        raise ValueError(f"sizes must not be negative; got {rows} x {columns}, {entries} entries")
    parts = {"complex": 2, "pattern": 0}.get(field, 1)
    if layout == "array":
        stored = rows * columns
        if symmetry != "general":
            stored = rows * (rows + (-1 if symmetry == "skew-symmetric" else 1)) // 2
        numbers, needed = stored * parts, rows * columns * 8 * parts
    else:
        numbers = entries * (2 + parts)
        needed = 2 * entries * (16 + 8 * parts)  # indices and values, and the solver's copies
        needed += 10 * 8 * (rows + columns)  # vectors of both lengths
    memory = math.inf
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise MemoryError(
            f"its header says {rows} x {columns} with {entries} entries, which takes about "
            f"{needed / 2**30:.3g} GiB of the {memory / 2**30:.3g} GiB there are"
        )
    size = Path(path).stat().st_size * _EXPANSION.get(Path(path).suffix, 1)
    if 2 * numbers > size + 2:  # a digit and a separator each
        raise ValueError(
            f"Truncated file: its header says {rows} x {columns} with {entries} entries, more "
            "than a file of its length can hold"
        )
    return (rows, columns), numbers


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
