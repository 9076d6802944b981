"""to_torch and from_torch: shared where possible, exact about dtype."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
import torch

import funclsq.jax as flj

NAMES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128"
DTYPES = [getattr(torch, name) for name in NAMES.split()]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(x64, dtype, shape):
    t = torch.arange(12)[: int(np.prod(shape, dtype=int))].reshape(shape).to(dtype)
    a = flj.from_torch(t)
    assert a.shape == shape
    assert str(a.dtype) == str(dtype).removeprefix("torch.")
    back = flj.to_torch(a)
    assert back.dtype == dtype
    assert torch.equal(back, t)


def test_memory_is_shared_on_request_and_not_otherwise(x64):
    a = jnp.arange(1000.0)
    assert flj.to_torch(a).data_ptr() == a.unsafe_buffer_pointer()
    assert flj.to_torch(a, copy=True).data_ptr() != a.unsafe_buffer_pointer()
    t = torch.arange(1000.0, dtype=torch.float64)
    assert flj.from_torch(t, copy=True).unsafe_buffer_pointer() != t.data_ptr()
    if t.data_ptr() % 64 == 0:
        assert flj.from_torch(t).unsafe_buffer_pointer() == t.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12.0).reshape(3, 4).T,
        lambda: torch.arange(24.0)[::2],
        lambda: torch.arange(13.0)[1:],
        lambda: torch.arange(5.0, requires_grad=True),
        lambda: torch.arange(3.0).expand(4, 3),
        lambda: (
            torch.view_as_real(torch.ones(3, dtype=torch.complex64)).imag
            if False
            else torch.ones(3, dtype=torch.complex64).conj()
        ),
        lambda: torch.from_numpy(np.arange(4.0, dtype=np.float32)),
    ],
    ids=["transposed", "strided", "unaligned", "requires grad", "expanded", "conjugated", "numpy"],
)
def test_awkward_tensors(make):
    t = make()
    assert np.array_equal(np.asarray(flj.from_torch(t)), t.detach().resolve_conj().numpy())


def test_a_conversion_that_would_lose_bits_raises():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        for dtype in (torch.float64, torch.int64, torch.complex128):
            with pytest.raises(TypeError, match="jax_enable_x64 is off"):
                flj.from_torch(torch.ones(2, dtype=dtype))
        a = flj.from_torch(torch.ones(2, dtype=torch.float64), dtype=jnp.float32)
        assert a.dtype == jnp.float32
    finally:
        jax.config.update("jax_enable_x64", before)


def test_what_cannot_be_converted_says_why():
    with pytest.raises(TypeError, match="torch tensor"):
        flj.from_torch(np.ones(2))
    with pytest.raises(TypeError, match="dense"):
        flj.from_torch(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda a: flj.to_torch(a))(jnp.ones(2))
    with pytest.raises(TypeError, match="JAX array"):
        flj.to_torch([1.0])
