"""On a device every step stays there and asks the host for nothing, shown without a device.

A fake tensor has a device and a shape and no numbers: an operation that mixes devices fails, and so
does one that reads a number. Without CUDA in torch some views of fake CUDA tensors fail as well,
among them those that damping takes; there tensors on the meta device stand in, which notice less.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from funclsq.methods._extended_cg import ExtendedCg
from funclsq.methods._scalars import TensorScalars, scalars_for
from funclsq.methods.lsmr import Lsmr
from funclsq.methods.lsqr import Lsqr
from funclsq.operators import DenseOp, StackedOp

M, N, K = 40, 20, 3


def _tensors(state, seen):
    """Each tensor that a state holds, in the objects that it holds too."""
    for value in vars(state).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            yield from _tensors(value, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (5,)])
@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("method", [Lsmr, Lsqr, ExtendedCg])
def test_steps_stay_on_the_device(method, preconditioned, damped, batch, dtype):
    device = "meta" if damped else "cuda"

    def some(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    with contextlib.nullcontext() if damped else FakeTensorMode():
        op, rows = DenseOp(some(*batch, M, N)), M
        if damped:
            op, rows = StackedOp(op, some(*batch, N, dtype=dtype.to_real())), M + N
        rhs = some(*batch, rows, K)
        scalars = scalars_for(rhs)
        assert isinstance(scalars, TensorScalars)
        state = method(op, rhs, scalars, (lambda q: 2 * q) if preconditioned else None)
        for _ in range(3):
            state.step()
        state.keep(some(2, dtype=torch.int64))
        scalars.active = scalars.active.narrow(-1, 0, 2)  # freeze tells what the host saw
        state.step()
        tensors = list(_tensors(state, set()))
    assert len(tensors) > 8
    assert {t.device.type for t in tensors} == {device}
    assert state.x.shape == (*batch, N, 2)


def test_what_would_fail():
    with FakeTensorMode():
        a = torch.empty((3, 2), device="cuda")
        for wrong in (lambda: a + torch.zeros(2), lambda: a @ torch.zeros(2, 2), a.sum().item):
            with pytest.raises(RuntimeError):
                wrong()
    b = torch.empty((3, 2), device="meta")
    for wrong in (lambda: b + torch.zeros(2), b.sum().item, b.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wrong()
