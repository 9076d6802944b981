"""to_torch and from_torch: shared where possible, exact about dtype."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
import torch

import funclsq.jax as flj

NAMES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 "
    "float16 bfloat16 float32 float64 complex64 complex128"
)
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
        lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
        lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        lambda: torch.from_numpy(np.arange(4.0, dtype=np.float32)),
        lambda: torch.arange(9.0)[4],
        lambda: torch.tensor([True, False, True, True])[::2],
        lambda: torch.ones(3, 0, 2).transpose(0, 2),
        lambda: torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)).T,
    ],
    ids=[
        "transposed", "strided", "unaligned", "requires grad", "expanded", "conjugated", "negated",
        "numpy", "unaligned 0-d", "strided bool", "empty", "strided parameter",
    ],
)  # fmt: skip
@pytest.mark.parametrize("copy", [False, True])
def test_awkward_tensors(make, copy):
    t = make()
    a = flj.from_torch(t, copy=copy)
    assert np.array_equal(np.asarray(a), t.detach().resolve_conj().resolve_neg().numpy())
    assert a.shape == tuple(t.shape)


def test_what_is_read_only_is_read_and_a_copy_may_be_written_to(x64):
    fixed = np.arange(4.0)
    fixed.flags.writeable = False
    for source in (fixed, jnp.asarray(fixed)):
        shared, own = flj.to_torch(source), flj.to_torch(source, copy=True)
        assert torch.equal(shared, torch.arange(4.0, dtype=torch.float64))
        own += 1
        assert fixed[0] == 0
        assert float(source[0]) == 0
    t = torch.arange(4.0, dtype=torch.float64)
    a = flj.from_torch(t, copy=True)
    t += 1
    assert float(a[0]) == 0


def test_integers_do_not_wrap(x64):
    t = torch.tensor([2**62 + 1, -(2**62)])
    assert np.array_equal(np.asarray(flj.from_torch(t)), t.numpy())
    assert torch.equal(flj.to_torch(flj.from_torch(t)), t)


def test_a_conversion_that_would_lose_bits_raises():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        for dtype in (torch.float64, torch.int64, torch.uint64, torch.complex128):
            with pytest.raises(TypeError, match="jax_enable_x64 is off"):
                flj.from_torch(torch.ones(2, dtype=dtype))
        a = flj.from_torch(torch.ones(2, dtype=torch.float64), dtype=jnp.float32)
        assert a.dtype == jnp.float32
    finally:
        jax.config.update("jax_enable_x64", before)


def test_what_cannot_be_converted_says_why():
    with pytest.raises(TypeError, match="torch tensor"):
        flj.from_torch(np.ones(2))
    with pytest.raises(TypeError, match="no dtype"):
        flj.from_torch(torch.ones(2), dtype=jnp.float8_e4m3fn)
    with pytest.raises(TypeError, match="no dtype"):
        flj.to_torch(jnp.ones(2, jnp.float8_e4m3fn))
    with pytest.raises(TypeError, match="dense"):
        flj.from_torch(torch.eye(2).to_sparse())
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda a: flj.to_torch(a))(jnp.ones(2))
    with pytest.raises(TypeError, match="JAX array"):
        flj.to_torch([1.0])
