"""Norms of columns, against the same in long double."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES

from funclsq.norms import column_norms, column_sizes


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(
    "shape",
    [
        (0, 3),
        (0, 9),
        (5, 0),
        (2, 0, 16),
        (0, 5, 9),
        (5, 1),
        (300, 7),
        (1000, 8),
        (3, 513, 40),
        (5000, 12),
        (2, 70_001, 2),
        (3, 2000, 1),
    ],
)
def test_norms_of_columns(dtype, shape):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    exact = np.sqrt((np.abs(v.numpy().astype(np.clongdouble)) ** 2).sum(-2)).astype(float)
    eps = torch.finfo(dtype).eps
    found = column_norms(v)
    assert found.dtype == v.real.dtype
    np.testing.assert_allclose(found.double().numpy(), exact, rtol=8 * eps, atol=0)
    turned = column_norms(v.mT.contiguous().mT)  # by columns in memory
    np.testing.assert_allclose(turned.double().numpy(), exact, rtol=8 * eps, atol=0)
    if v.numel():
        assert torch.equal(column_sizes(v), torch.linalg.vector_norm(v, torch.inf, dim=-2))


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(k, bad):
    v = torch.ones(600, k)
    v[300, 1] = bad
    assert not bool(column_norms(v)[1].isfinite()) and bool(column_norms(v)[0].isfinite())
    assert not bool(column_sizes(v)[1].isfinite())
    alone = torch.ones(2, 5000, 1)
    alone[1, 300] = bad
    assert column_sizes(alone).isfinite().tolist() == [[True], [False]]


def test_many_rows_in_single_precision():
    """Added up in parts: from end to end the error here is 3e-5."""
    v = torch.randn((400_000, 16), generator=torch.Generator().manual_seed(2))
    error = column_norms(v).double() / torch.linalg.vector_norm(v.double(), dim=0) - 1
    assert float(error.abs().max()) < 2e-6


@pytest.mark.parametrize("norms", [column_norms, column_sizes])
def test_norms_on_another_device(norms):
    v = torch.empty((2, 5, 9), device="meta")  # computes shapes as any device does
    assert norms(v).shape == (2, 9) and norms(v).device.type == "meta"
