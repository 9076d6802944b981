"""What the info table says of a solve that nobody looks at: a derivative may still need it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from funclsq.info import table
from funclsq.solution import Status

COND = 5


@pytest.mark.parametrize(
    "deficient",
    [True, False, None, torch.tensor(True), torch.tensor(False), torch.tensor([False, True])],
    ids=str,
)
@pytest.mark.parametrize("read", [True, False])
def test_the_condition_number_is_asked_for_by_a_reader_or_for_a_null_space(deficient, read):
    """It decides how a projection onto the null space is begun."""
    batched = isinstance(deficient, torch.Tensor) and deficient.ndim
    lead = (2,) if batched else ()
    asked = []

    class Prepared(SimpleNamespace):
        @property
        def cond(self):
            asked.append(1)
            return torch.full(lead, 7.0, dtype=torch.float64)

    status = torch.full((*lead, 1), int(Status.DIRECT))
    norms = (torch.zeros(*lead, 1),) * 2 if read else None
    x = torch.zeros(*lead, 3, 1, dtype=torch.float64)
    prepared = Prepared(rank=2, deficient=deficient, method=0)
    found = table(x, status, torch.zeros_like(status), norms, prepared, True)[..., COND]
    if read or batched or bool(deficient):
        assert found.unique().tolist() == [7.0] and len(asked) == 1
    else:
        assert math.isnan(float(found)) and not asked
