"""Blocks of vectors with a coefficient for each column, against the plain operations."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES

from funclsq.methods import _columns

ROWS = _columns._LEAST


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(0, 2), (ROWS - 1, 2), (ROWS, 1), (ROWS, 2), (ROWS + 7, 3), (ROWS, 20), (3, ROWS + 1, 2)],
)
def test_operations_by_column(dtype, by_columns, shape):
    seed = torch.Generator().manual_seed(1)
    x, y = (torch.randn(shape, generator=seed, dtype=dtype) for _ in range(2))
    if by_columns:
        x = x.mT.contiguous().mT
    a = torch.randn((*shape[:-2], 1, shape[-1]), generator=seed, dtype=dtype)
    exact = {"axpy": y + a * x, "xpay": x + a * y, "scale": a * y}
    for name, arguments in (("axpy", (a, x)), ("xpay", (x, a)), ("scale", (a,))):
        kept, found = [t.clone() for t in arguments], y.clone()
        getattr(_columns, name)(found, *arguments)
        torch.testing.assert_close(found, exact[name])
        assert all(map(torch.equal, kept, arguments))


def test_few_columns_go_many_rows_at_a_time(monkeypatch):
    widths, plain = [], torch.Tensor.mul_

    def mul_(self, other):
        widths.append(self.shape[-1])
        return plain(self, other)

    monkeypatch.setattr(torch.Tensor, "mul_", mul_)
    for rows, k in ((ROWS + 1, 2), (ROWS, 2), (ROWS - 1, 2), (ROWS, 8)):
        _columns.scale(torch.ones(rows, k, dtype=torch.float64), torch.ones(1, k).double())
    assert widths == [64, 2, 64, 2, 8]
