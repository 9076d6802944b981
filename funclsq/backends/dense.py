"""Dense Cholesky, one matrix or a batch, for normal matrices that are full or small."""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq.backends.registry import NotPositive

__all__ = ["NAME", "factor"]

NAME = "dense"


class _Factor:
    def __init__(self, L: Tensor) -> None:
        self._L = L
        self.nbytes = L.numel() * L.element_size()

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for blocks of columns, (..., n, k)."""
        return torch.cholesky_solve(rhs, self._L)

    def positive(self) -> bool:
        """Always: another matrix was refused."""
        return True


def factor(N: Tensor) -> _Factor:
    """Factor N, (..., n, n), whose lower triangle is read.

    Raises
    ------
    NotPositive
        If any member has a pivot that is not positive.
    """
    L, info = torch.linalg.cholesky_ex(N)
    if bool((info != 0).any()):
        raise NotPositive("a pivot is not positive")
    return _Factor(L)
