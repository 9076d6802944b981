"""Matrix Market files in and out, and words for everything that can be wrong with them."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import scipy.sparse

__all__ = ["UserError", "read_matrix", "read_rhs", "require_writable", "write_array"]


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
        A = scipy.io.mmread(path)
    except PermissionError:
        raise UserError(f"{path} may not be read. Change its permissions.") from None
    except MemoryError as error:
        raise UserError(f"{path} does not fit into memory: {error}.") from None
    except (ValueError, OverflowError, OSError, EOFError, UnicodeError) as error:
        raise UserError(
            f"{path} is not a Matrix Market file that can be read: {str(error).rstrip('.')}. It "
            "must begin with a line such as '%%MatrixMarket matrix coordinate real general'; "
            "scipy.io.mmwrite makes such files."
        ) from None
    return A.astype(np.complex128 if np.iscomplexobj(A) else np.float64)


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"
