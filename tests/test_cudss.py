"""The cuDSS backend over a binding made of NumPy: what it is given, and when; the whole solver."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import sys
import types

import numpy as np
import pytest
import torch
from fake_cudss import Binding
from torch.utils._python_dispatch import TorchDispatchMode

import funclsq as fl
from funclsq import kept, raw
from funclsq.backends import NotPositive, registry
from funclsq.entries import entries_to_csr
from funclsq.methods import _device_gram, _normal
from funclsq.methods._device_gram import Full, Upper, sums_of


class _Event:
    """In the place of an event of a stream: who recorded it last."""

    def record(self, stream):
        self.by = stream


class _Stream:
    cuda_stream = 17

    def __init__(self):
        self.waited = []

    def wait_event(self, event):
        self.waited.append(event.by)


@pytest.fixture
def cudss(monkeypatch):
    """The backend's module, over a binding of its own, for tensors on the CPU."""
    binding, stream = Binding(), _Stream()
    bindings = types.ModuleType("nvmath.bindings")
    bindings.cudss = binding
    monkeypatch.setitem(sys.modules, "nvmath", types.ModuleType("nvmath"))
    monkeypatch.setitem(sys.modules, "nvmath.bindings", bindings)
    monkeypatch.delitem(sys.modules, "funclsq.backends.cudss", raising=False)
    module = importlib.import_module("funclsq.backends.cudss")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    module.binding, module.stream, module.kept = binding, stream, ()
    yield module
    raw.clear_cache()
    gc.collect()
    left = {kind for kind, _ in binding.alive.values()}
    sys.modules.pop("funclsq.backends.cudss", None)
    assert left <= {"handle", *module.kept}, left  # whatever was made was given back


def hermitian(n, dtype, seed=0):
    """A positive definite matrix with gaps, and the upper triangle of its CSR."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=g, dtype=dtype)
    A = torch.where(torch.rand(n, n, generator=g) < 0.2, A, 0)
    N = A @ A.mH + torch.eye(n, dtype=dtype)
    rows, columns = np.nonzero(np.triu(N.numpy()))
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=n)))).astype(np.int32)
    return N, indptr, columns.astype(np.int32), N[rows, columns]


DTYPES = [torch.float64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_factor_and_solve(cudss, dtype):
    N, indptr, indices, values = hermitian(12, dtype)
    symbolic = cudss.analyze(indptr, indices, None, dtype, values.device)
    factor = symbolic.factor(values)
    size = values.element_size()
    assert factor.positive() and factor.nbytes >= (12 + values.numel()) * size
    for k in (1, 4):
        b = torch.randn(12, k, dtype=dtype)
        x = factor.solve(b.mT.contiguous().mT)  # however it lies in memory
        torch.testing.assert_close(N @ x, b)
        assert x.is_contiguous()
    assert cudss.binding.log == ["ANALYSIS", "FACTORIZATION", "SOLVE", "SOLVE"]
    assert cudss.stream.waited == [cudss.stream] * 2  # for what was started before
    del factor
    assert symbolic.factor(values).positive()
    assert cudss.stream.waited == [cudss.stream] * 3  # its memory, used before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_is_factored_as_one(cudss, dtype):
    N, indptr, indices, values = hermitian(7, dtype)
    scales = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    symbolic = cudss.analyze(indptr, indices, 3, dtype, values.device)
    factor = symbolic.factor(scales.unsqueeze(-1) * values)
    b = torch.randn(3, 7, 2, dtype=dtype)
    torch.testing.assert_close(scales.view(3, 1, 1) * (N @ factor.solve(b)), b)


def test_an_analysis_serves_again_when_its_factor_is_gone(cudss):
    _, indptr, indices, values = hermitian(9, torch.float64)
    symbolic = cudss.analyze(indptr, indices, None, values.dtype, values.device)
    first = symbolic.factor(values)
    second = symbolic.factor(2 * values)
    assert cudss.binding.log.count("ANALYSIS") == 2  # a factor each
    b = torch.ones(9, 1, dtype=torch.float64)
    torch.testing.assert_close(first.solve(b), 2 * second.solve(b))
    del first
    third = symbolic.factor(4 * values)
    assert cudss.binding.log.count("ANALYSIS") == 2
    torch.testing.assert_close(third.solve(b), second.solve(b) / 2)


def test_what_is_not_positive_is_told(cudss):
    _, indptr, indices, values = hermitian(9, torch.float64)
    symbolic = cudss.analyze(indptr, indices, None, values.dtype, values.device)
    with pytest.raises(NotPositive):
        symbolic.factor(-values)
    assert symbolic.factor(values).positive()  # the analysis was not lost
    assert cudss.binding.log.count("ANALYSIS") == 1
    cudss.binding.replaced = 1
    assert not symbolic.factor(values).positive()


def test_an_error_gives_everything_back(cudss, monkeypatch):
    _, indptr, indices, values = hermitian(9, torch.float64)
    symbolic = cudss.analyze(indptr, indices, None, values.dtype, values.device)

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cudss.binding, "execute", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            symbolic.factor(values)
    left = sorted(kind for kind, _ in cudss.binding.alive.values())
    assert left == ["config", "handle"]


def test_more_than_32_bits_count_is_refused(cudss):
    indptr, indices = np.array([0, 1, 3], np.int32), np.array([0, 1, 1], np.int32)
    with pytest.raises(ValueError, match=r"32 bits.*lsmr"):
        cudss.analyze(indptr, indices, 2**30, torch.float64, torch.device("cpu"))


def sparse_problem(kind, dtype, lead=(), n=30):
    """Entries on a few diagonals; more rows than columns, dependent columns, or fewer rows."""
    g = torch.Generator().manual_seed(3)
    m = {"tall": n + 6, "wide": n - 8, "dependent": n + 6}[kind]
    A = sum(torch.eye(m, n, dtype=torch.float64).roll(k, 0) for k in (0, 1, 5))
    row, col = A.nonzero().T
    values = torch.randn(*lead, row.numel(), generator=g, dtype=dtype)
    if kind == "dependent":
        values[..., col == 3] = values[..., col == 4] = 0
    b = torch.randn(*lead, m, 2, generator=g, dtype=dtype)
    return fl.SparsityPattern(row, col, (m, n)), values, b


@pytest.fixture
def elsewhere(cudss, monkeypatch):
    """Matrices on the CPU are treated as if they lay on a device that has cuDSS."""
    made = {}  # analyses go with the binding, where patterns may outlive it

    def fresh(kind, pattern, device):
        key = kind, pattern.shape, pattern.nnz
        if key not in made:
            made[key] = kind(pattern, device)
        return made[key]

    cudss.kept = ("config", "data")
    monkeypatch.setattr(_normal, "sums_of", fresh)
    monkeypatch.setattr(_normal, "_elsewhere", lambda op: True)
    monkeypatch.setattr(registry, "_cudss", lambda device: cudss)
    monkeypatch.setattr(_normal, "DENSE_FILL", 0.9)
    monkeypatch.setattr(_normal, "SMALL_ORDER", 4)
    return cudss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["tall", "wide", "dependent"])
def test_the_solver_over_this_backend(kind, damp, lead, dtype, elsewhere):
    pattern, values, b = sparse_problem(kind, dtype, lead)

    def answers(solver):
        raw.clear_cache()
        leaves = [t.clone().requires_grad_() for t in (values, b)]
        sol = fl.solve(fl.Sparse(pattern, leaves[0]), leaves[1], damp=damp, solver=solver)
        weight = torch.linspace(1, 2, sol.x.numel(), dtype=torch.float64).view(sol.x.shape)
        bars = torch.autograd.grad((sol.x * weight).abs().square().sum(), leaves)
        return [sol.x.detach(), *bars], sol.rank

    (mine, rank), (theirs, other) = answers("cholesky"), answers("qr")
    assert "SOLVE" in elsewhere.binding.log
    assert torch.equal(rank, other)
    if kind == "dependent" and damp == 0:
        mine, theirs = ([x, b_bar] for x, _, b_bar in (mine, theirs))  # QR sees a zero column
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def _data(cudss):
    """How many data objects there are: an analysis and memory for a factor each."""
    return sum(kind == "data" for kind, _ in cudss.binding.alive.values())


def test_new_values_keep_the_analysis(elsewhere, monkeypatch):
    raw.clear_cache()
    monkeypatch.setattr(kept, "_ENTRIES", 1)
    pattern, values, b = sparse_problem("tall", torch.float64)
    for size in range(1, 6):
        fl.lstsq(fl.Sparse(pattern, size * values), b, solver="cholesky", backend="cudss")
    assert elsewhere.binding.log.count("ANALYSIS") == 2  # a new factor is made beside the old one
    assert elsewhere.binding.log.count("FACTORIZATION") == 5
    assert _data(elsewhere) == 2


def test_memory_of_factors_that_are_gone_is_bounded_and_can_be_cleared(elsewhere):
    raw.clear_cache()
    assert _data(elsewhere) == 0
    pattern, values, b = sparse_problem("tall", torch.float64)
    held = [fl.factorize(fl.Sparse(pattern, i * values), solver="cholesky") for i in range(1, 6)]
    assert _data(elsewhere) == 5
    del held
    kept._recent.clear()
    kept._index.clear()
    assert _data(elsewhere) == 1
    raw.clear_cache()
    assert _data(elsewhere) == 0
    fl.lstsq(fl.Sparse(pattern, 7 * values), b, solver="cholesky")
    assert elsewhere.binding.log.count("ANALYSIS") == 6


def test_memory_is_kept_for_a_few_patterns_only(elsewhere, monkeypatch):
    raw.clear_cache()
    monkeypatch.setattr(kept, "_ENTRIES", 1)
    for n in range(30, 42):
        pattern, values, b = sparse_problem("tall", torch.float64, n=n)
        fl.lstsq(fl.Sparse(pattern, values), b, solver="cholesky")
    assert _data(elsewhere) == 1 + 4  # one in use
    assert elsewhere.binding.log.count("ANALYSIS") == 12
    fl.lstsq(fl.Sparse(pattern, 2 * values), b, solver="cholesky")
    fl.lstsq(fl.Sparse(pattern, 3 * values), b, solver="cholesky")
    assert elsewhere.binding.log.count("ANALYSIS") == 13  # the last pattern's memory was kept
    assert _data(elsewhere) == 1 + 4
    raw.clear_cache()
    assert _data(elsewhere) == 0


def test_the_last_four_analyses_are_kept(cudss, monkeypatch):
    monkeypatch.setattr(registry, "_cudss", lambda device: cudss)
    pattern, values, _ = sparse_problem("tall", torch.float64)
    upper = Upper(pattern, torch.device("cpu"))
    v = entries_to_csr(pattern, values)

    def factor(count):
        many = upper.triangle(v.expand(count, -1), torch.ones(30, dtype=torch.float64))
        return upper.factored(many, 0.5)._symbolic

    made = [factor(count) for count in (1, 2, 3, 4)]
    assert factor(1) is made[0]
    factor(5)  # in the place of that for 2
    assert [factor(count) is made[count - 1] for count in (1, 3, 4)] == [True] * 3
    assert len(upper._analyses) == 4
    assert factor(2) is not made[1]


def test_written_out_where_it_is_dense_or_small(elsewhere, monkeypatch):
    pattern, values, b = sparse_problem("tall", torch.float64)
    monkeypatch.setattr(_normal, "DENSE_FILL", 0.0)
    fl.lstsq(fl.Sparse(pattern, values), b, solver="cholesky")
    monkeypatch.setattr(_normal, "DENSE_FILL", 0.9)
    monkeypatch.setattr(_normal, "SMALL_ORDER", 30)
    many = torch.stack((values, 2 * values))
    fl.lstsq(fl.Sparse(pattern, many), torch.stack((b, b)), solver="cholesky")
    assert not elsewhere.binding.log


def test_on_the_cpu_it_is_refused():
    pattern, values, b = sparse_problem("tall", torch.float64, n=300)
    with pytest.raises(ValueError, match=r"'cudss' is for matrices on a CUDA device.*CPU"):
        fl.lstsq(fl.Sparse(pattern, values), b, solver="cholesky", backend="cudss")


class _Additions(TorchDispatchMode):
    """How many products each addition of products has, of one member."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname == "index_add_":
            self.sizes.append(args[2].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("at_once", [1, 7, 1 << 24])
def test_sums_of_pairs(at_once, lead, dtype, monkeypatch):
    monkeypatch.setattr(_device_gram, "_AT_ONCE", at_once)
    n = 220
    pattern, values, _ = sparse_problem("tall", dtype, lead, n)
    B = fl.Sparse(pattern, values).to_dense()
    N, cpu = B.mH @ B, torch.device("cpu")
    full = sums_of(Full, pattern, cpu)
    assert sums_of(Full, pattern, cpu) is full
    v = entries_to_csr(pattern, values)
    with _Additions() as seen:
        written = full.matrix(v)
    assert seen.sizes[0] == min(max(1, at_once // (3 if lead else 1)), sum(seen.sizes))
    assert written.stride(-2) == 1
    torch.testing.assert_close(torch.tril(written), torch.tril(N))
    upper = sums_of(Upper, pattern, cpu)
    assert upper is not full
    extra = torch.arange(n, dtype=torch.float64).to(dtype)
    triangle = upper.triangle(v, extra)
    rows = np.repeat(np.arange(n), np.diff(upper.indptr))
    rebuilt = torch.zeros_like(N)
    rebuilt[..., rows, upper.indices] = triangle
    torch.testing.assert_close(rebuilt, torch.triu(N + torch.diag(extra)))
    assert upper.indptr.dtype == upper.indices.dtype == np.int32


def test_columns_without_entries_have_a_diagonal():
    pattern = fl.SparsityPattern([0, 1, 1], [0, 0, 2], (3, 4))
    upper = sums_of(Upper, pattern, torch.device("cpu"))
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    triangle = upper.triangle(v, torch.ones(4, dtype=torch.float64))
    assert upper.indptr.tolist() == [0, 2, 3, 4, 5]
    assert upper.indices.tolist() == [0, 2, 1, 2, 3]
    assert triangle.tolist() == [6.0, 6.0, 1.0, 10.0, 1.0]


def test_the_stand_in_has_the_signatures_of_the_binding():
    real = pytest.importorskip("nvmath.bindings.cudss")
    for name, function in vars(Binding).items():
        if name.startswith("_") or not callable(function) or isinstance(function, type):
            continue
        told = getattr(real, name).__doc__.splitlines()[0]  # name(type argument, ...) -> type
        inside = told[told.index("(") + 1 : told.index(")")]
        theirs = [part.split()[-1] for part in inside.split(", ") if part]
        assert list(inspect.signature(function).parameters)[1:] == theirs, told
    for name in ("MatrixType", "MatrixViewType", "IndexBase", "Layout", "Phase", "DataParam"):
        for member in getattr(Binding, name):
            assert int(getattr(real, name)[member.name]) == int(member), member
    for name in ("R_64F", "C_64F", "R_32I"):
        assert name in real.DataType.__members__
    assert real.get_config_param_dtype(real.ConfigParam.PIVOT_EPSILON) is np.float64
    assert real.get_data_param_dtype(real.DataParam.INFO) is np.int32
    assert real.get_data_param_dtype(real.DataParam.LU_NNZ) is np.int64
