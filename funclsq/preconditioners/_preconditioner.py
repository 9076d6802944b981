"""What every preconditioner is: N^-1 for an N near A^H W A + D^2, ready to be applied."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor, dtype

__all__ = ["Preconditioner"]


class Inverse(Protocol):
    """N^-1 on blocks of columns; can be pickled."""

    @property
    def nbytes(self) -> int:
        """Memory held."""
        ...

    def apply(self, v: Tensor) -> Tensor:
        """N^-1 v for v (n, k) or (B, n, k), in memory of its own."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Preconditioner:
    """N^-1 for a positive definite N near A^H W A + D^2; made by the functions beside it.

    Immutable, without a gradient, shared freely between threads; a copy can be pickled. Where the
    entries of A leave the range in which squares are safe, N is meant up to a power of four.

    Attributes
    ----------
    shape : tuple of int
        (m, n) of A.
    dtype : torch.dtype
        Dtype of A and of the vectors that N^-1 is applied to.
    """

    shape: tuple[int, int]
    dtype: dtype
    _name: str
    _detail: str
    _inverse: Inverse

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self._inverse.nbytes

    def solve_normal(self, v: Tensor) -> Tensor:
        """Apply N^-1 to v (n,) or (..., n, k), a plain tensor on the CPU; nothing is recorded.

        Raises
        ------
        ValueError
            If v does not have n rows.
        TypeError
            If its dtype is not that of A.
        """
        block = v.unsqueeze(-1) if v.ndim == 1 else v
        if v.ndim == 0 or block.shape[-2] != self.shape[1]:
            raise ValueError(
                f"{self._name}: solve_normal needs {self.shape[1]} rows, one per column of A "
                f"{self.shape}; got shape {tuple(v.shape)}. Make the preconditioner from a matrix "
                "with as many columns."
            )
        if v.dtype != self.dtype:
            raise TypeError(
                f"{self._name}: solve_normal needs dtype {self.dtype}, that of A; got {v.dtype}. "
                "Make the preconditioner from a matrix of that dtype."
            )
        block = block.detach()
        lead = block.shape[:-2]
        if len(lead) > 1:
            block = block.flatten(0, -3)
        return self._inverse.apply(block).reshape(v.shape)

    def __repr__(self) -> str:
        return f"{self._name}(shape={self.shape}, {self._detail}, dtype={self.dtype})"
