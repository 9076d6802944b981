"""cuDSS through nvmath-python: sparse Cholesky of a matrix whose values lie on a CUDA device.

A cuDSS data object holds an analysis and one factor on it. So each factor has one of its own, and
that of a factor which nobody holds any more, with its analysis, serves the next values: one of
them for each of the last few patterns. The others are destroyed at once, and all by
``clear_cache``. Calls take one lock: a handle is bound to one stream at a time, and cuDSS is not
thread-safe.

What is factored is as it is given: no pivot is replaced by a larger one, and one that is not
positive is told. The binding is that of nvmath-python 1.0 (cuDSS 0.8).

References
----------
NVIDIA, cuDSS documentation, https://docs.nvidia.com/cuda/cudss/.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch
from nvmath.bindings import cudss
from torch import Tensor

from funclsq import spare
from funclsq.backends.registry import NotPositive

__all__ = ["NAME", "analyze"]

NAME = "cudss"

_TYPES = {
    torch.float64: (cudss.DataType.R_64F, cudss.MatrixType.SPD),
    torch.complex128: (cudss.DataType.C_64F, cudss.MatrixType.HPD),
}
_INDEX = cudss.DataType.R_32I
_SMALLEST = 1e-300  # pivots below which one is replaced: none that is of use
_lock = threading.RLock()  # a finalizer may run while another factor is at work
_handles: dict[torch.device, Any] = {}
_IDLE = 4  # patterns of which the memory of a factor that is gone is kept
_idle: list[tuple[torch.device, list[Any]]] = []  # theirs, the oldest first


def _handle(device: torch.device) -> Any:
    """The device's handle, bound to the current stream; under the lock."""
    if device not in _handles:
        _handles[device] = cudss.create()
    cudss.set_stream(_handles[device], torch.cuda.current_stream(device).cuda_stream)
    return _handles[device]


class _Symbolic:
    """The analysis of one pattern on one device, for matrices of one dtype.

    Parameters
    ----------
    indptr, indices : int32 array
        Upper triangle of one matrix as CSR.
    batch : int or None
        Number of matrices whose values come together; they are factored as one.
    """

    def __init__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        batch: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        n, nnz, count = indptr.size - 1, indices.size, batch or 1
        if max(count * n, count * nnz) >= 2**31:
            raise ValueError(
                f"cholesky: cuDSS counts in 32 bits; got {count * nnz} entries in the normal "
                "matrices. Use solver='lsmr', or a smaller batch."
            )
        shift = np.arange(count, dtype=np.int64)[:, None]
        starts = np.append((indptr[:-1] + shift * nnz).reshape(-1), count * nnz)
        columns = (indices + shift * n).reshape(-1)
        self.n, self.dtype, self.device = count * n, dtype, device
        self._arrays = tuple(
            torch.from_numpy(a.astype(np.int32)).to(device) for a in (starts, columns)
        )
        self._free: list[Any] = []  # (data object with an analysis, event): the factor is gone
        with _lock:
            self._config = cudss.config_create()
            least = np.array(_SMALLEST)
            cudss.config_set(
                self._config, cudss.ConfigParam.PIVOT_EPSILON, least.ctypes.data, least.nbytes
            )
        weakref.finalize(self, _destroy, device, self._config, self._free).atexit = False

    def matrix(self, values: Tensor) -> Any:
        """The descriptor of N with these values, (nnz,), which it does not copy."""
        value_type, kind = _TYPES[self.dtype]
        starts, columns = self._arrays
        return cudss.matrix_create_csr(
            self.n,
            self.n,
            columns.numel(),
            starts.data_ptr(),
            0,  # the ends of rows are the next ones' starts
            columns.data_ptr(),
            values.data_ptr(),
            _INDEX,
            _INDEX,
            value_type,
            kind,
            cudss.MatrixViewType.UPPER,
            cudss.IndexBase.ZERO,
        )

    def block(self, columns: Tensor) -> Any:
        """The descriptor of a block of columns, (k, n) in memory."""
        k, n = columns.shape
        value_type = _TYPES[self.dtype][0]
        return cudss.matrix_create_dn(
            n, k, n, columns.data_ptr(), value_type, cudss.Layout.COL_MAJOR
        )

    def factor(self, values: Tensor) -> _Factor:
        """Factor values, those of one matrix after those of the other."""
        values = values.reshape(-1).contiguous()
        with _lock, torch.cuda.device(self.device):
            handle = _handle(self.device)
            matrix = self.matrix(values)
            nothing = self.block(values.new_zeros((1, self.n)))
            old = _popped(self._free)
            if old is None:
                data = cudss.data_create(handle)
            else:
                data, last = old
                torch.cuda.current_stream(self.device).wait_event(last)
            first = (cudss.Phase.ANALYSIS,) if old is None else ()
            try:
                for phase in (*first, cudss.Phase.FACTORIZATION):
                    cudss.execute(handle, phase, self._config, data, matrix, nothing, nothing)
                failed = _number(handle, data, cudss.DataParam.INFO, np.int32)
                size = _number(handle, data, cudss.DataParam.LU_NNZ, np.int64)
            except BaseException:
                cudss.data_destroy(handle, data)
                cudss.matrix_destroy(matrix)
                raise
            finally:
                cudss.matrix_destroy(nothing)
            found = _Factor(self, values, matrix, data, size)
            found.used()
        if failed:
            raise NotPositive(f"cuDSS stopped at pivot {failed}")
        return found


class _Factor:
    """A factor; it holds the values, whose memory cuDSS reads."""

    single = False

    def __init__(self, symbolic: _Symbolic, values: Tensor, matrix: Any, data: Any, size: int):
        self._symbolic, self._values, self._matrix, self._data = symbolic, values, matrix, data
        self.nbytes = size * values.element_size() + values.nbytes
        self._last = torch.cuda.Event()  # of its use, on whatever stream
        place = symbolic.device, symbolic._free
        weakref.finalize(self, _give_back, *place, matrix, data, self._last).atexit = False

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for blocks of columns, (n, k) or (b, n, k)."""
        made, k = self._symbolic, rhs.shape[-1]
        columns = rhs.movedim(-1, 0).reshape(k, made.n).contiguous()
        out = torch.empty_like(columns)
        with _lock, torch.cuda.device(made.device):
            handle = _handle(made.device)
            b, x = made.block(columns), made.block(out)
            torch.cuda.current_stream(made.device).wait_event(self._last)
            try:
                phase = cudss.Phase.SOLVE
                cudss.execute(handle, phase, made._config, self._data, self._matrix, x, b)
            finally:
                cudss.matrix_destroy(b)
                cudss.matrix_destroy(x)
            self.used()
        return out.view(k, *rhs.shape[:-1]).movedim(0, -1).contiguous()

    def used(self) -> None:
        """Let whoever is next wait for what has just been started."""
        self._last.record(torch.cuda.current_stream(self._symbolic.device))

    def positive(self) -> bool:
        """Whether no pivot was replaced."""
        with _lock, torch.cuda.device(self._symbolic.device):
            handle = _handle(self._symbolic.device)
            return _number(handle, self._data, cudss.DataParam.NPIVOTS, np.int32) == 0


def _number(handle: Any, data: Any, what: Any, dtype: Any) -> int:
    """One number that cuDSS tells of a factor."""
    value, written = np.array([0], dtype), np.array([0], np.uint64)
    cudss.data_get(handle, data, what, value.ctypes.data, value.nbytes, written.ctypes.data)
    return int(value[0])


def _give_back(
    device: torch.device, free: list[Any], matrix: Any, data: Any, last: torch.cuda.Event
) -> None:
    with _lock:
        cudss.matrix_destroy(matrix)
        _let_go(device, free)
        free.append((data, last))
        _idle[:] = [place for place in _idle if place[1] is not free] + [(device, free)]
        while len(_idle) > _IDLE:
            _let_go(*_idle.pop(0))


def _let_go(device: torch.device, free: list[Any]) -> None:
    """Destroy what is free, with the memory that its factor takes; under the lock."""
    while (old := _popped(free)) is not None:
        cudss.data_destroy(_handles[device], old[0])


def _popped(free: list[Any]) -> Any:
    """The last one; None if there is none, whatever a finalizer does in the meantime."""
    try:
        return free.pop()
    except IndexError:
        return None


def _destroy(device: torch.device, config: Any, free: list[Any]) -> None:
    with _lock:
        _let_go(device, free)
        cudss.config_destroy(config)


def _clear() -> None:
    with _lock:
        while (place := _popped(_idle)) is not None:
            _let_go(*place)


spare.also_clear(_clear)


def analyze(
    indptr: np.ndarray,
    indices: np.ndarray,
    batch: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> _Symbolic:
    """Take the upper triangle of a pattern as CSR; it is analysed with the first values."""
    return _Symbolic(indptr, indices, batch, dtype, device)
