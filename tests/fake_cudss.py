"""The binding ``nvmath.bindings.cudss``, as far as the backend uses it, in NumPy on host memory.

It takes addresses as the real one does, checks the order of calls and the life of every object, and
keeps a log. It says nothing about cuDSS itself: names and arguments are those of nvmath-python 1.0.
"""

from __future__ import annotations

import ctypes
import enum
import itertools

import numpy as np

__all__ = ["DTYPES", "Binding"]

DTYPES = {1: np.float64, 2: np.complex128, 3: np.int32}


def _memory(address, count, dtype):
    """An array over memory that belongs to somebody else."""
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


class Binding:
    """One library: ``execute`` and the rest, and what is alive in it."""

    DataType = enum.IntEnum("DataType", {"R_64F": 1, "C_64F": 2, "R_32I": 3})
    MatrixType = enum.IntEnum("MatrixType", {"SPD": 3, "HPD": 4})
    MatrixViewType = enum.IntEnum("MatrixViewType", {"FULL": 0, "LOWER": 1, "UPPER": 2})
    IndexBase = enum.IntEnum("IndexBase", {"ZERO": 0, "ONE": 1})
    Layout = enum.IntEnum("Layout", {"COL_MAJOR": 0, "ROW_MAJOR": 1})
    Phase = enum.IntEnum("Phase", {"ANALYSIS": 3, "FACTORIZATION": 4, "SOLVE": 1008})
    ConfigParam = enum.IntEnum("ConfigParam", {"PIVOT_EPSILON": 9})
    DataParam = enum.IntEnum("DataParam", {"INFO": 0, "LU_NNZ": 1, "NPIVOTS": 2})

    def __init__(self):
        self.alive, self.log, self.replaced = {}, [], 0
        self._numbers = itertools.count(1000)

    def _new(self, kind, **what):
        number = next(self._numbers)
        self.alive[number] = (kind, what)
        return number

    def _get(self, kind, number):
        found, what = self.alive[number]
        assert found == kind, (found, kind)
        return what

    def _end(self, kind, number):
        self._get(kind, number)
        del self.alive[number]

    def create(self):
        return self._new("handle", stream=None)

    def set_stream(self, handle, stream):
        self._get("handle", handle)["stream"] = stream

    def config_create(self):
        return self._new("config")

    def config_set(self, config, param, value, size_in_bytes):
        assert size_in_bytes == 8
        self._get("config", config)[self.ConfigParam(param).name] = _memory(value, 1, float)[0]

    def config_destroy(self, solver_config):
        self._end("config", solver_config)

    def data_create(self, handle):
        self._get("handle", handle)
        return self._new("data", analysed=None, L=None)

    def data_destroy(self, handle, solver_data):
        self._get("handle", handle)
        self._end("data", solver_data)

    def data_get(self, handle, data, param, value, size_in_bytes, size_written):
        self._get("handle", handle)
        L, dtype = self._get("data", data)["L"], np.int64 if param == 1 else np.int32
        assert size_in_bytes == np.dtype(dtype).itemsize
        known = {0: int(L is None), 1: 0 if L is None else np.count_nonzero(L), 2: self.replaced}
        _memory(value, 1, dtype)[0] = known[int(param)]
        _memory(size_written, 1, np.uint64)[0] = size_in_bytes

    def matrix_create_csr(
        self,
        nrows,
        ncols,
        nnz,
        row_start,
        row_end,
        col_indices,
        values,
        offset_type,
        index_type,
        value_type,
        mtype,
        mview,
        index_base,
    ):
        assert nrows == ncols and row_end == 0 and offset_type == index_type == 3
        assert (value_type, mtype) in ((1, 3), (2, 4)) and mview == 2 and index_base == 0
        return self._new(
            "csr", n=nrows, nnz=nnz, at=(row_start, col_indices, values), type=value_type
        )

    def matrix_create_dn(self, nrows, ncols, ld, values, value_type, layout):
        assert ld == nrows and layout == 0
        return self._new("dense", shape=(nrows, ncols), at=values, type=value_type)

    def matrix_destroy(self, matrix):
        del self.alive[matrix]

    def execute(self, handle, phase, solver_config, solver_data, input_matrix, solution, rhs):
        assert self._get("handle", handle)["stream"] is not None
        assert self._get("config", solver_config)["PIVOT_EPSILON"] == 1e-300
        data, csr = self._get("data", solver_data), self._get("csr", input_matrix)
        phase = self.Phase(phase)
        self.log.append(phase.name)
        structure, N = self._dense(csr)
        if phase is self.Phase.ANALYSIS:
            data["analysed"] = structure
        elif phase is self.Phase.FACTORIZATION:
            assert data["analysed"] == structure, "factored before its pattern was analysed"
            try:
                data["L"] = np.linalg.cholesky(N)
            except np.linalg.LinAlgError:
                data["L"] = None
        else:
            x, b = (self._block(m) for m in (solution, rhs))
            L = data["L"]
            x[:] = np.linalg.solve(L.conj().T, np.linalg.solve(L, b))

    def _block(self, number):
        what = self._get("dense", number)
        n, k = what["shape"]
        return _memory(what["at"], n * k, DTYPES[what["type"]]).reshape(k, n).T

    def _dense(self, csr):
        n, nnz = csr["n"], csr["nnz"]
        starts, columns, values = csr["at"]
        starts, columns = _memory(starts, n + 1, np.int32), _memory(columns, nnz, np.int32)
        rows = np.repeat(np.arange(n), np.diff(starts))
        assert starts[-1] == nnz and (rows <= columns).all()  # nothing below the diagonal
        N = np.zeros((n, n), DTYPES[csr["type"]])
        N[rows, columns] = _memory(values, nnz, N.dtype)
        return (starts.tobytes(), columns.tobytes()), N + np.triu(N, 1).conj().T
