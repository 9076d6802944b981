"""Patterns, sparse matrices and their products: right, converted without loss, and shared."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import DTYPES, LAYOUTS, problem

import funclsq as fl
from funclsq import kept, raw
from funclsq.entries import sddmm
from funclsq.matrix import matmul, outer, rmatmul
from funclsq.operators import DenseStructure, SparseStructure
from funclsq.products import FEW_PARTS, FEW_TERMS
from funclsq.shapes import broadcast_shapes

F64 = torch.float64


def _random(m, n, nnz, repeat=True, seed=0):
    """Unsorted entries, some of them repeated; with an empty row and column."""
    rng = np.random.default_rng(seed)
    row, col = rng.integers(1, m, nnz), rng.integers(0, n - 1, nnz)
    if not repeat:
        flat = rng.permutation(np.unique(row * n + col))
        row, col = flat // n, flat % n
    return row, col


def _dense(row, col, values, shape):
    out = torch.zeros((*values.shape[:-1], shape[0] * shape[1]), dtype=values.dtype)
    flat = torch.from_numpy(np.asarray(row, np.int64) * shape[1] + np.asarray(col, np.int64))
    return out.index_add(-1, flat, values).unflatten(-1, shape)


# ---------------------------------------------------------------------------------------------
# Patterns.


def test_equal_content_is_an_equal_pattern():
    S = fl.SparsityPattern([0, 1, 2], [1, 0, 1], (3, 2))
    for same in (
        fl.SparsityPattern(np.array([0, 1, 2], np.uint8), np.array([1, 0, 1], np.int64), (3, 2)),
        fl.SparsityPattern(torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1]).int(), (3, 2)),
        fl.SparsityPattern.from_csr([0, 1, 2, 3], [1, 0, 1], (3, 2)),
        pickle.loads(pickle.dumps(S)),
        copy.deepcopy(S),
        copy.copy(S),
    ):
        assert same == S
        assert hash(same) == hash(S)
        assert same.digest == S.digest
    for other in (
        fl.SparsityPattern([0, 1, 2], [1, 0, 1], (3, 3)),
        fl.SparsityPattern([0, 1, 2], [1, 0, 0], (3, 2)),
        fl.SparsityPattern([1, 0, 2], [0, 1, 1], (3, 2)),
        fl.SparsityPattern([0, 1], [1, 0], (3, 2)),
    ):
        assert other != S
    assert S != "pattern"
    assert repr(S) == "SparsityPattern(shape=(3, 2), nnz=3)"


def test_a_pattern_takes_jax_arrays():
    jnp = pytest.importorskip("jax.numpy")
    S = fl.SparsityPattern(jnp.array([0, 1, 2]), jnp.array([1, 0, 1]), (3, 2))
    assert fl.SparsityPattern([0, 1, 2], [1, 0, 1], (3, 2)) == S


def test_a_pattern_is_not_changed_by_what_it_was_made_from():
    row, col = np.array([0, 1]), np.array([1, 0])
    S = fl.SparsityPattern(row, col, (2, 2))
    row[:] = 0
    assert S.row.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        S.row[0] = 1


def test_what_a_pattern_shows_cannot_be_written():
    S = fl.SparsityPattern([2, 0, 1, 0, 2], [0, 1, 0, 1, 1], (3, 2))
    names = ("row", "col", "indptr", "indices", "order", "slot", "t_indptr", "t_indices", "t_perm")
    for name in names:
        with pytest.raises(ValueError, match="read-only"):
            getattr(S, name)[0] = 1
        if name not in ("row", "col"):
            tensor = S.tensor(name, torch.device("cpu"))
            np.testing.assert_array_equal(tensor.numpy(), getattr(S, name))


def test_row_starts_must_rise_whatever_their_type():
    with pytest.raises(ValueError, match="indptr must rise"):
        fl.SparsityPattern.from_csr(np.array([0, 2, 1], np.uint64), np.array([0]), (2, 2))


def test_indices_are_32_bit_where_they_fit():
    assert fl.SparsityPattern([0], [0], (3, 3)).row.dtype == np.int32
    S = fl.SparsityPattern([2**33], [5], (2**34, 7))
    assert S.row.dtype == np.int64
    assert S.T.col.tolist() == [2**33]


@pytest.mark.parametrize("repeat", [False, True])
def test_canonical_form_is_scipys(repeat):
    m, n = 9, 6
    row, col = _random(m, n, 40, repeat)
    S = fl.SparsityPattern(row, col, (m, n))
    values = np.random.default_rng(1).standard_normal(row.size)
    want = scipy.sparse.coo_array((values, (row, col)), shape=(m, n)).tocsr()
    want.sum_duplicates()
    np.testing.assert_array_equal(S.indptr, want.indptr)
    np.testing.assert_array_equal(S.indices, want.indices)
    assert S.nnz == row.size
    assert S.nnz_unique == want.nnz
    op = SparseStructure(S).bind((torch.from_numpy(values),))
    np.testing.assert_allclose(op.csr_values.numpy(), want.data, rtol=1e-14, atol=1e-14)
    T = want.T.tocsr()
    np.testing.assert_array_equal(S.t_indptr, T.indptr)
    np.testing.assert_array_equal(S.t_indices, T.indices)
    np.testing.assert_allclose(op.csr_values.numpy()[S.t_perm], T.data, rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(S.T.row, col)
    assert S.T.shape == (n, m)
    assert S.T.T == S


def test_sorted_unique_entries_need_no_permutation():
    S = fl.SparsityPattern([0, 0, 1], [0, 2, 1], (2, 3))
    assert S.order is None
    assert S.slot is None
    assert S.inverse_order is None


def test_one_pattern_serves_many_threads():
    p = problem("tall")
    chosen = LAYOUTS["sparse"]
    values = chosen.leaf(torch.from_numpy(p.A), p.stored)
    b = torch.from_numpy(p.b)
    row, col = np.nonzero(p.stored)
    S = fl.SparsityPattern(row[::-1], col[::-1], p.stored.shape)
    values = torch.from_numpy(p.A)[row[::-1].copy(), col[::-1].copy()]
    want = fl.lstsq(torch.from_numpy(p.A), b)
    found, failures = {}, []

    def work(i):
        try:
            for solver in ("lsmr", "cholesky", "qr"):
                v = (values * (1 + i)).requires_grad_()
                x = fl.lstsq(fl.Sparse(S, v), b, solver=solver)
                x.sum().backward()
                found[i, solver] = x.detach() * (1 + i)
        except Exception as error:  # told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert len(found) == 18
    for x in found.values():
        torch.testing.assert_close(x, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("row", "col", "named"), [([0, 7, -2], [0, 0, 0], 7), ([0, 1], [-3, 9], -3)]
)
def test_the_first_index_out_of_bounds_is_named(row, col, named):
    with pytest.raises(ValueError, match=f"got {named}\\."):
        fl.SparsityPattern(row, col, (3, 2))


def test_four_replicas_of_a_pattern_are_kept_the_latest_ones():
    S = fl.SparsityPattern([0, 2, 2], [1, 0, 1], (3, 2))
    made = {copies: S.repeated(copies) for copies in (1, 2, 3, 4)}
    for copies, found in made.items():
        assert found.shape == (3 * copies, 2 * copies)
        A = np.zeros((3, 2))
        A[S.row, S.col] = 1
        B = np.zeros(found.shape)
        B[found.row, found.col] = 1
        np.testing.assert_array_equal(B, np.kron(np.eye(copies), A))
    assert all(S.repeated(copies) is found for copies, found in made.items())
    S.repeated(1)  # used again, so that 2 is the oldest
    S.repeated(5)
    assert S.repeated(1) is made[1] and S.repeated(3) is made[3] and S.repeated(4) is made[4]
    assert sorted(k[1] for k in S.cache if k[0] == "repeated") == [1, 3, 4, 5]


# ---------------------------------------------------------------------------------------------
# Products.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("k", [None, 0, 1, 5])
def test_products_are_those_of_the_dense_matrix(k, batch, dtype):
    m, n = 9, 6
    row, col = _random(m, n, 40)
    lead = () if batch is None else (batch,)
    values = torch.randn(*lead, row.size, dtype=DTYPES[dtype])
    A = fl.Sparse(fl.SparsityPattern(row, col, (m, n)), values)
    D = _dense(row, col, values, (m, n))
    assert A.shape == (*lead, m, n)
    assert A.dtype == DTYPES[dtype]
    torch.testing.assert_close(A.to_dense(), D)
    v = torch.randn((n,) if k is None else (n, k), dtype=DTYPES[dtype])
    u = torch.randn(m, *v.shape[1:], dtype=DTYPES[dtype])
    torch.testing.assert_close(A @ v, D @ v)
    torch.testing.assert_close(A.T @ u, D.mT @ u)
    torch.testing.assert_close(A.H @ u, D.mH @ u)
    if k is not None:
        many = torch.randn(3, n, k, dtype=DTYPES[dtype])
        torch.testing.assert_close(A @ many, D @ many)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_the_three_products_are_each_others_derivatives(batched, complex_):
    dtype = torch.complex128 if complex_ else F64
    m, n, k = 4, 3, 2
    row, col = _random(m, n, 6)
    structure = SparseStructure(fl.SparsityPattern(row, col, (m, n)))
    lead = (2,) if batched else ()
    values = torch.randn(*lead, row.size, dtype=dtype, requires_grad=True)
    v = torch.randn(n, k, dtype=dtype, requires_grad=True)
    u = torch.randn(m, k, dtype=dtype, requires_grad=True)
    both = torch.randn(2, m, k, dtype=dtype, requires_grad=True)
    for f, inputs in (
        (lambda a, v: matmul(structure, (a,), v), (values, v)),
        (lambda a, u: rmatmul(structure, (a,), u), (values, u)),
        (lambda u, v: outer(structure, (values.detach(),), u, v)[0], (both if batched else u, v)),
    ):
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)
    if not batched:
        many = torch.randn(3, n, k, dtype=dtype)
        got = torch.vmap(lambda v: matmul(structure, (values,), v))(many)
        torch.testing.assert_close(
            got, torch.stack([matmul(structure, (values,), v) for v in many])
        )


def test_the_sampled_outer_product_is_the_outer_product_at_the_entries():
    m, n, k = 300, 200, 11  # more columns than one block of the kernel
    row, col = _random(m, n, 30_000)
    pattern = fl.SparsityPattern(row, col, (m, n))
    structure = SparseStructure(pattern)
    values = torch.randn(row.size, dtype=F64)
    U, V = torch.randn(m, k, dtype=F64), torch.randn(n, k, dtype=F64)
    got = outer(structure, (values,), U, V)[0]
    torch.testing.assert_close(got, (U @ V.mT)[row, col])
    D = _dense(row, col, values, (m, n))
    torch.testing.assert_close(matmul(structure, (values,), V), D @ V)
    torch.testing.assert_close(rmatmul(structure, (values,), U), D.mT @ U)
    many = torch.randn(2, row.size, dtype=F64)
    U2 = torch.randn(2, m, k, dtype=F64)
    torch.testing.assert_close(
        outer(structure, (many,), U2, V)[0], (U2 @ V.mT)[:, row, col], rtol=1e-12, atol=1e-12
    )
    shared = outer(structure, (values,), U2, V)[0]
    torch.testing.assert_close(shared, (U2 @ V.mT).sum(0)[row, col], rtol=1e-12, atol=1e-12)
    dense = outer(DenseStructure(m, n), (D,), U2, V)[0]
    torch.testing.assert_close(dense, (U2 @ V.mT).sum(0))


# ---------------------------------------------------------------------------------------------
# Conversions.


@pytest.mark.parametrize("layout", ["coo", "coo_uncoalesced", "csr", "csc", "bsr", "bsc", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_from_torch_takes_every_layout_and_hands_gradients_back_in_it(layout, dtype):
    p = problem("tall", DTYPES[dtype].is_complex)
    A = torch.from_numpy(p.A).to(DTYPES[dtype])
    leaf = LAYOUTS[layout].leaf(A, p.stored).requires_grad_()
    converted = fl.Sparse.from_torch(leaf)
    torch.testing.assert_close(converted.to_dense().detach(), A)
    v = torch.randn(4, 2, dtype=DTYPES[dtype])
    c = torch.randn(7, 2, dtype=DTYPES[dtype])
    (bar,) = torch.autograd.grad((c.conj() * (converted @ v)).real.sum(), leaf)
    assert bar.layout == leaf.layout
    want = LAYOUTS[layout].pull(c @ v.mH, p.stored)
    torch.testing.assert_close(fl.Sparse.from_torch(bar).values, fl.Sparse.from_torch(want).values)


def test_equal_sparse_tensors_share_one_pattern():
    p = problem("tall")
    A = torch.from_numpy(p.A)
    first, second = (fl.Sparse.from_torch(s * A.to_sparse_csr()) for s in (1.0, 2.0))
    assert first.pattern is second.pattern


@pytest.mark.parametrize(
    "layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.strided]
)
def test_to_torch_and_back(layout):
    m, n = 9, 6
    row, col = _random(m, n, 40)
    values = torch.randn(row.size, dtype=F64, requires_grad=True)
    A = fl.Sparse(fl.SparsityPattern(row, col, (m, n)), values)
    T = A.to_torch(layout)
    assert T.layout == layout
    D = _dense(row, col, values, (m, n))
    torch.testing.assert_close(T.to_dense().detach(), D.detach())
    c = torch.randn(m, n, dtype=F64)
    (bar,) = torch.autograd.grad((c * T.to_dense()).sum(), values)
    torch.testing.assert_close(bar, c[row, col])


def test_scipy_and_back():
    rng = np.random.default_rng(3)
    given = scipy.sparse.random_array((8, 5), density=0.4, rng=rng, format="csc")
    for fmt in ("coo", "csr", "csc", "bsr", "lil", "dok", "dia"):
        A = fl.Sparse.from_scipy(given.asformat(fmt))
        np.testing.assert_array_equal(A.to_dense().numpy(), given.toarray())
        np.testing.assert_array_equal(A.to_scipy().toarray(), given.toarray())
    integers = scipy.sparse.csr_matrix(np.array([[1, 0], [0, 2]]))
    assert fl.Sparse.from_scipy(integers).dtype == F64
    assert fl.Sparse.from_scipy(integers, torch.complex64).dtype == torch.complex64
    x = fl.lstsq(integers, torch.tensor([1.0, 4.0], dtype=F64))
    torch.testing.assert_close(x, torch.tensor([1.0, 2.0], dtype=F64))


def test_a_sparse_matrix_can_be_copied_and_pickled():
    p = problem("tall")
    A = LAYOUTS["sparse"].wrap(LAYOUTS["sparse"].leaf(torch.from_numpy(p.A), p.stored), p.stored)
    for again in (pickle.loads(pickle.dumps(A)), copy.deepcopy(A)):
        assert again.pattern == A.pattern
        torch.testing.assert_close(again.values, A.values, rtol=0, atol=0)
    assert repr(A) == f"Sparse(shape=(7, 4), nnz={A.pattern.nnz}, dtype=torch.float64)"
    solution = pickle.loads(pickle.dumps(fl.solve(A, torch.from_numpy(p.b))))
    assert bool(solution.converged.all())


def test_a_pattern_made_inside_a_transform_serves_outside_it():
    """Index tensors made while a level is active must not be kept wrapped."""
    made = []

    def f(values):
        S = fl.SparsityPattern(torch.arange(3), torch.tensor([0, 1, 1]), (3, 2))
        made.append(S)
        return fl.lstsq(fl.Sparse(S, values), torch.ones(3, dtype=F64)).square().sum()

    values = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    torch.func.grad(f)(values)
    torch.func.jvp(f, (values,), (values,))
    torch.func.hessian(f)(values)
    for S in made:
        x = fl.lstsq(fl.Sparse(S, values), torch.ones(3, dtype=F64))
        torch.testing.assert_close(x, torch.tensor([1.0, 5 / 13], dtype=F64))
        assert made[0] == S


# ---------------------------------------------------------------------------------------------
# What is kept between solves.


@pytest.mark.parametrize("layout", ["coo", "coo_uncoalesced", "csr", "csc", "bsr", "scipy"])
def test_a_constant_sparse_matrix_may_stand_inside_any_transform(layout):
    p = problem("tall_vector")
    A, b = torch.from_numpy(p.A), torch.from_numpy(p.b)
    given = LAYOUTS[layout].wrap(LAYOUTS[layout].leaf(A, p.stored), p.stored)
    inverse = torch.linalg.pinv(A)
    c = torch.randn(4, dtype=F64)

    def f(b):
        return fl.lstsq(given, b)

    torch.testing.assert_close(torch.func.grad(lambda b: c @ f(b))(b), inverse.mT @ c)
    torch.testing.assert_close(torch.func.jvp(f, (b,), (b,))[1], inverse @ b)
    torch.testing.assert_close(torch.func.jacrev(f)(b), inverse)
    twice = torch.func.jacfwd(torch.func.jacfwd(lambda b: c @ f(b) ** 2))(b)
    torch.testing.assert_close(twice, 2 * inverse.mT @ (c[:, None] * inverse))
    many = torch.stack((b, 2 * b))
    torch.testing.assert_close(torch.vmap(f)(many), many @ inverse.mT)
    if layout != "scipy":  # and plain autograd around the transform reaches it
        given.requires_grad_()
        (bar,) = torch.autograd.grad(torch.func.grad(lambda b: c @ f(b))(b).square().sum(), given)
        dense = A.clone().requires_grad_()
        outer_bar = torch.autograd.grad((torch.linalg.pinv(dense).mT @ c).square().sum(), dense)[0]
        want = fl.Sparse.from_torch(LAYOUTS[layout].pull(outer_bar, p.stored))
        torch.testing.assert_close(fl.Sparse.from_torch(bar).values, want.values)


def _prepared(monkeypatch):
    counted = []
    original = raw.registry.prepare

    def prepare(*args):
        counted.append(args)
        return original(*args)

    raw.clear_cache()
    monkeypatch.setattr(raw.registry, "prepare", prepare)
    return counted


@pytest.mark.parametrize("solver", ["qr", "cholesky", "lsmr"])
def test_solve_and_derivatives_share_one_preparation(solver, monkeypatch):
    p = problem("tall")
    leaf = LAYOUTS["csr"].leaf(torch.from_numpy(p.A), p.stored).requires_grad_()
    b = torch.from_numpy(p.b)
    counted = _prepared(monkeypatch)
    for _ in range(2):
        x = fl.lstsq(leaf, b, solver=solver)
        torch.autograd.grad(x.square().sum(), leaf)
    fl.lstsq(leaf.detach().clone(), 2 * b, solver=solver)  # equal values, another tensor
    assert len(counted) == 1


def test_a_value_changed_in_place_is_seen(monkeypatch):
    A, b = (torch.from_numpy(t).clone() for t in (problem("tall").A, problem("tall").b))
    counted = _prepared(monkeypatch)
    first = fl.lstsq(A, b)
    A[0, 0] += 1.0
    second = fl.lstsq(A, b)
    assert len(counted) == 2
    torch.testing.assert_close(second, torch.linalg.lstsq(A, b).solution)
    assert not torch.allclose(first, second)


def test_what_is_kept_is_bounded_and_can_be_forgotten():
    raw.clear_cache()
    b = torch.ones(3, dtype=F64)
    for i in range(40):
        fl.lstsq((1.0 + i) * torch.eye(3, dtype=F64), b)
    assert len(kept._recent) <= 16
    raw.clear_cache()
    assert not kept._recent


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-200, 1e200])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_column_norms_hold_out_to_the_ends_of_the_range(size, batch, zero):
    row, col = np.array([0, 1, 2, 0, 2, 1]), np.array([0, 0, 0, 2, 2, 3])  # column 1 is empty
    g = torch.Generator().manual_seed(8)
    values = torch.randn((*batch, 6), generator=g, dtype=torch.float64)
    if zero:
        values[..., 5] = 0.0  # and column 3 stores a zero
    S = fl.SparsityPattern(row, col, (3, 4))
    norms = SparseStructure(S).bind((values * size,)).column_norms()
    want = torch.linalg.vector_norm(_dense(row, col, values, (3, 4)), dim=-2)
    torch.testing.assert_close(norms / size, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [0, 1, 2, 3, FEW_TERMS, FEW_TERMS + 1, 8, FEW_PARTS, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_sampled_outer_product_of_few_and_of_many_columns(k, dtype, batch):
    g = torch.Generator().manual_seed(k)
    row, col = np.array([2, 0, 1, 2, 2, 4]), np.array([1, 3, 0, 1, 2, 3])  # (2, 1) is there twice
    S = fl.SparsityPattern(row, col, (5, 4))
    U = torch.randn((*batch, 5, k), generator=g, dtype=dtype)
    V = torch.randn((*batch, 4, k), generator=g, dtype=dtype)
    found = sddmm(S, U, V, batched=bool(batch))
    want = (U @ V.mH)[..., torch.from_numpy(row), torch.from_numpy(col)]
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    "shapes", [(), ((),), ((3, 1), (), (4,)), ((2, 1, 5), (7, 1)), ((0,), (1,)), ((1, 0), (6, 1))]
)
def test_shapes_broadcast_as_in_torch(shapes):
    assert broadcast_shapes(*shapes) == tuple(torch.broadcast_shapes(*shapes))


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (2,)), ((2, 3), (2, 1), (4, 1))])
def test_shapes_that_do_not_broadcast(shapes):
    with pytest.raises(RuntimeError):
        torch.broadcast_shapes(*shapes)
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast_shapes(*shapes)
