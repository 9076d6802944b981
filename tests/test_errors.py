"""Bad input is refused at once, by a message that says what is required, what came, what to do."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch

import funclsq as fl
from funclsq import plan
from funclsq.backends import registry
from funclsq.methods._protocol import Options
from funclsq.raw import solver_calls
from funclsq.settings import settings

F32, F64, C128 = torch.float32, torch.float64, torch.complex128
A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
B = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
ROW, COL = np.nonzero(A.numpy())
S = fl.SparsityPattern(ROW, COL, (4, 3))
VALUES = A[ROW, COL]
nan, inf = float("nan"), float("inf")


def _with(t, value, at=0):
    t = t.clone()
    t.view(-1)[at] = value
    return t


def _lstsq(*args, **kwargs):
    return lambda: fl.lstsq(*args, **kwargs)


# Each: the call, the exception, and a regex for what was required, what came, and what to do.
# What can be told from shapes, dtypes and devices:
BEFORE_ANY_WORK = {
    "rows of b": (_lstsq(A, B[:3]), ValueError, r"b must have 4 rows.*got shape \(3,\).*Pass b"),
    "rows of b, block": (
        _lstsq(A, torch.ones(3, 2, dtype=F64)),
        ValueError,
        r"b must have 4 rows.*A \(4, 3\).*got shape \(3, 2\).*\(4, k\)",
    ),
    "scalar b": (_lstsq(A, B[0]), ValueError, r"b must have shape \(4,\).*got a scalar"),
    "vector A": (
        _lstsq(A[0], B),
        ValueError,
        r"A must be a matrix \(\.\.\., m, n\); got shape \(3,\).*A\[:, None\]",
    ),
    "integer A": (
        _lstsq(A.long(), B),
        TypeError,
        r"A must be floating point or complex; got torch\.int64.*A\.to\(",
    ),
    "integer b": (
        _lstsq(A, B.int()),
        TypeError,
        r"b must be floating point or complex; got torch\.int32.*b\.to\(",
    ),
    "boolean sparse A": (
        _lstsq(A.bool().to_sparse_csr(), B),
        TypeError,
        r"A must be floating point.*got torch\.bool.*Convert",
    ),
    "integer values": (
        _lstsq(fl.Sparse(S, VALUES.long()), B),
        TypeError,
        r"A must be floating point.*got torch\.int64.*Convert",
    ),
    "half precision": (
        _lstsq(A.half(), B.half()),
        TypeError,
        r"must be float32, float64, complex64 or complex128; got torch\.float16.*\.float\(\)",
    ),
    "mixed dtypes": (
        _lstsq(A, B.float()),
        TypeError,
        r"A and b must have one dtype; got torch\.float64 and torch\.float32.*Convert",
    ),
    "real A, complex b": (
        _lstsq(A, B.to(C128)),
        TypeError,
        r"one dtype; got torch\.float64 and torch\.complex128.*Convert",
    ),
    "mixed devices": (
        _lstsq(A, B.to("meta")),
        ValueError,
        r"A and b must be on one device; got cpu and meta.*Move",
    ),
    "weights on another device": (
        _lstsq(A, B, weights=torch.ones(4, dtype=F64, device="meta")),
        ValueError,
        r"weights and b must be on one device; got meta and cpu.*Move",
    ),
    "sparse b": (
        _lstsq(A, B[:, None].to_sparse()),
        TypeError,
        r"b must be dense; got layout torch\.sparse_coo.*to_dense",
    ),
    "list as b": (_lstsq(A, [1.0, 2.0]), TypeError, r"b must be a torch tensor; got list.*funclsq"),
    "list as A": (_lstsq([[1.0]], B), TypeError, r"A must be a torch tensor.*LinearOperator; got"),
    "batch of sparse tensors": (
        _lstsq(torch.stack((A, A)).to_sparse_csr(), B),
        ValueError,
        r"needs one pattern; got a sparse tensor of shape \(2, 4, 3\).*Pass funclsq\.Sparse",
    ),
    "hybrid COO": (
        _lstsq(A.to_sparse(1), B),
        ValueError,
        r"needs 2 sparse dimensions; got 1.*Make it",
    ),
    "batches that differ": (
        _lstsq(torch.stack((A, A)), torch.ones(3, 4, 2, dtype=F64)),
        ValueError,
        r"batch.*must broadcast.*\(2,\).*\(3,\)",
    ),
    "length of damp": (
        _lstsq(A, B, damp=torch.ones(2, dtype=F64)),
        ValueError,
        r"damp must be a scalar or have shape \(3,\).*got \(2,\)",
    ),
    "complex damp": (_lstsq(A, B, damp=1j), TypeError, r"damp must be a real number.*got 1j"),
    "complex damp tensor": (
        _lstsq(A, B, damp=torch.ones(3, dtype=C128)),
        TypeError,
        r"damp must be real; got torch\.complex128",
    ),
    "dtype of damp": (
        _lstsq(A, B, damp=torch.ones(3)),
        TypeError,
        r"damp must have dtype torch\.float64.*got torch\.float32.*Convert",
    ),
    "integer damp": (
        _lstsq(A, B, damp=torch.tensor(1)),
        TypeError,
        r"damp must be floating point.*got torch\.int64.*Convert",
    ),
    "text as damp": (_lstsq(A, B, damp="1"), TypeError, r"damp must be a real number.*got str"),
    "negative damp": (_lstsq(A, B, damp=-0.5), ValueError, r"damp must be finite and >= 0; got -0"),
    "infinite damp": (_lstsq(A, B, damp=inf), ValueError, r"damp must be finite and >= 0; got inf"),
    "shape of weights": (
        _lstsq(A, B, weights=torch.ones(3, dtype=F64)),
        ValueError,
        r"weights must have shape \(4,\), one per row; got \(3,\)",
    ),
    "shape of weights by column": (
        _lstsq(A, torch.ones(4, 2, dtype=F64), weights=torch.ones(4, 3, dtype=F64)),
        ValueError,
        r"weights must have shape \(4,\).*\(\.\.\., 4, 2\).*got \(4, 3\)",
    ),
    "complex weights": (
        _lstsq(A.to(C128), B.to(C128), weights=torch.ones(4, dtype=C128)),
        TypeError,
        r"weights must be real; got torch\.complex128",
    ),
    "dtype of weights": (
        _lstsq(A, B, weights=torch.ones(4)),
        TypeError,
        r"weights must have dtype torch\.float64.*got torch\.float32.*Convert",
    ),
    "shape of x0": (
        _lstsq(A, B, x0=torch.ones(4, dtype=F64)),
        ValueError,
        r"x0 must have shape \(3,\), one per column of A; got \(4,\)",
    ),
    "shape of x0, block": (
        _lstsq(A, torch.ones(4, 2, dtype=F64), x0=torch.ones(3, 5, dtype=F64)),
        ValueError,
        r"x0 must have shape \(3,\) or \(\.\.\., 3, 2\); got \(3, 5\)",
    ),
    "dtype of x0": (
        _lstsq(A, B, x0=torch.ones(3)),
        TypeError,
        r"x0 and b must have one dtype; got torch\.float32 and torch\.float64.*Convert",
    ),
    "unknown solver": (
        _lstsq(A, B, solver="magic"),
        ValueError,
        r"solver must be one of auto, lsmr.*or a function.*got 'magic'",
    ),
    "number as solver": (_lstsq(A, B, solver=3), TypeError, r"solver must be a name.*got int"),
    "positional partial": (
        _lstsq(A, B, solver=functools.partial(fl.solvers.lsmr, A)),
        TypeError,
        r"may fix keyword arguments only",
    ),
    "unknown setting": (
        _lstsq(A, B, tolerance=1e-3),
        TypeError,
        r"unknown setting 'tolerance'; the settings are .*atol",
    ),
    "negative tolerance": (_lstsq(A, B, atol=-1.0), ValueError, r"atol must be .* >= 0.*got -1"),
    "text as tolerance": (_lstsq(A, B, rcond="0"), ValueError, r"rcond must be a number.*got '0'"),
    "fractional maxiter": (_lstsq(A, B, maxiter=1.5), ValueError, r"maxiter must be an int.*1\.5"),
    "unknown rank": (_lstsq(A, B, rank="most"), ValueError, r"rank must be 'auto', 'full' or an"),
    "too large a rank": (_lstsq(A, B, rank=4), ValueError, r"rank must be at most .* 3.*got 4"),
    "on_failure": (
        _lstsq(A, B, on_failure="stop"),
        ValueError,
        r"on_failure must be 'warn', 'raise' or 'ignore'; got 'stop'",
    ),
    "function without entries": (
        lambda: fl.SparsityPattern([0], [0], "ab"),
        ValueError,
        r"shape must be a pair \(m, n\); got 'ab'",
    ),
    "index out of bounds": (
        lambda: fl.SparsityPattern([0, 4], [0, 1], (4, 3)),
        ValueError,
        r"every row index must lie in \[0, 4\) for shape \(4, 3\); got 4",
    ),
    "negative index": (
        lambda: fl.SparsityPattern([0, 1], [0, -1], (4, 3)),
        ValueError,
        r"every col index must lie in \[0, 3\).*got -1",
    ),
    "fractional index": (
        lambda: fl.SparsityPattern([0.0, 1.0], [0, 1], (4, 3)),
        TypeError,
        r"row must hold integers; got dtype float64.*Convert",
    ),
    "lengths of indices": (
        lambda: fl.SparsityPattern([0, 1], [0], (4, 3)),
        ValueError,
        r"row and col must have the same length; got 2 and 1.*Pass",
    ),
    "indices in two dimensions": (
        lambda: fl.SparsityPattern([[0]], [[0]], (4, 3)),
        ValueError,
        r"row must be 1-D; got shape \(1, 1\)",
    ),
    "negative shape": (
        lambda: fl.SparsityPattern([], [], (-1, 3)),
        ValueError,
        r"shape must not be negative; got \(-1, 3\)",
    ),
    "row starts": (
        lambda: fl.SparsityPattern.from_csr([0, 2, 1], [0], (2, 3)),
        ValueError,
        r"indptr must rise from 0 over 3 entries.*got 3",
    ),
    "number of values": (
        lambda: fl.Sparse(S, VALUES[:2]),
        ValueError,
        r"values must have shape \(\.\.\., 6\), one per stored entry; got \(2,\)",
    ),
    "pattern": (
        lambda: fl.Sparse((ROW, COL), VALUES),
        TypeError,
        r"pattern must be a SparsityPattern; got tuple",
    ),
    "rows of v": (
        lambda: fl.Sparse(S, VALUES) @ B,
        ValueError,
        r"needs 3 rows in v, one per column of A; got \(4,\)",
    ),
    "batch to scipy": (
        lambda: fl.Sparse(S, VALUES.expand(2, -1)).to_scipy(),
        ValueError,
        r"needs an unbatched matrix; got shape \(2, 4, 3\)",
    ),
    "batch to torch": (
        lambda: fl.Sparse(S, VALUES.expand(2, -1)).to_torch(),
        ValueError,
        r"batch cannot be one sparse tensor; got values of shape \(2, 6\).*Convert",
    ),
    "block layout": (
        lambda: fl.Sparse(S, VALUES).to_torch(torch.sparse_bsr),
        ValueError,
        r"layout must be sparse_coo.*got torch\.sparse_bsr.*call \.to_sparse_bsr\(\)",
    ),
    "matvec": (
        lambda: fl.LinearOperator(A, (4, 3)),
        TypeError,
        r"matvec must be callable; got .*Tensor",
    ),
    "params": (
        lambda: fl.LinearOperator(lambda p, v: v, (4, 3), (1.0,)),
        TypeError,
        r"params must be tensors; got .*float.*Close over",
    ),
}


@pytest.mark.parametrize("name", BEFORE_ANY_WORK)
def test_what_shapes_and_dtypes_tell_is_refused_before_any_work(name):
    call, error, message = BEFORE_ANY_WORK[name]
    before = solver_calls()
    with pytest.raises(error, match=f"(?s){message}"):
        call()
    assert solver_calls() == before


def _wrong_shape(A, b):
    return b


def _wrong_type(A, b):
    return "x"


def _wrong_dtype(A, b):
    return torch.zeros(3, dtype=F32)


def _operator(f, rmatvec=None):
    return fl.LinearOperator(f, (4, 3), (A,), rmatvec=rmatvec)


VALUES_OR_RESULTS = {
    "NaN in A": (_lstsq(_with(A, nan), B), r"A must be finite; got 1 NaN or Inf entry\..*Drop"),
    "Inf in A": (_lstsq(_with(A, inf), B), r"A must be finite; got 1 NaN or Inf"),
    "NaN in sparse A": (
        _lstsq(A.to_sparse_csr() * nan, B),
        r"A must be finite; got 6 NaN or Inf entries",
    ),
    "NaN in scipy A": (
        _lstsq(scipy.sparse.csr_array(A.numpy() * nan), B),
        r"A must be finite; got \d+ NaN",
    ),
    "NaN in values": (_lstsq(fl.Sparse(S, _with(VALUES, nan)), B), r"A must be finite; got 1 NaN"),
    "NaN in b": (
        _lstsq(A, _with(B, nan)),
        r"b must be finite; got 1 NaN or Inf entry.*row weight 0",
    ),
    "-Inf in b": (_lstsq(A, _with(B, -inf)), r"b must be finite; got 1 NaN or Inf entry"),
    "complex NaN": (
        _lstsq(A.to(C128), _with(B.to(C128), complex(0, nan))),
        r"b must be finite; got 1 NaN",
    ),
    "NaN in x0": (
        _lstsq(A, B, x0=_with(B[:3], nan)),
        r"x0 must be finite; got NaN or Inf entries",
    ),
    "NaN in weights": (_lstsq(A, B, weights=_with(B, nan)), r"weights must be finite; got 1 NaN"),
    "NaN in damp": (_lstsq(A, B, damp=_with(B[:3], nan)), r"damp must be finite; got 1 NaN"),
    "NaN under vmap": (
        lambda: torch.vmap(fl.lstsq, (None, 0))(A, torch.stack((B, _with(B, nan)))),
        r"b must be finite; got 1 NaN",
    ),
    "NaN under grad": (
        lambda: torch.func.grad(lambda b: fl.lstsq(A, b).sum())(_with(B, nan)),
        r"b must be finite; got 1 NaN",
    ),
    "negative damp tensor": (
        _lstsq(A, B, damp=torch.tensor(-0.5, dtype=F64)),
        r"damp must not be negative; got a smallest entry of -0\.5.*Pass damp >= 0",
    ),
    "negative weights": (
        _lstsq(A, B, weights=_with(B, -2.0)),
        r"weights must not be negative; got a smallest entry of -2.*Pass weights >= 0",
    ),
    "negative weights under vmap": (
        lambda: torch.vmap(lambda w: fl.lstsq(A, B, weights=w))(torch.stack((B, -B))),
        r"weights must not be negative; got a smallest entry of -4",
    ),
    "negative damp under grad": (
        lambda: torch.func.grad(lambda d: fl.lstsq(A, B, damp=d).sum())(-B[0]),
        r"damp must not be negative",
    ),
    "foreign solver of a wrong shape": (
        _lstsq(A, B, solver=_wrong_shape),
        r"solver must return shape \(3,\) for b of shape \(4,\); got \(4,\).*Return a tensor",
    ),
    "foreign solver of a wrong type": (
        _lstsq(A, B, solver=_wrong_type),
        r"solver must return shape \(3,\).*got str.*Return a tensor",
    ),
    "foreign solver of a wrong dtype": (
        _lstsq(A, B, solver=_wrong_dtype),
        r"solver must return dtype torch\.float64; got torch\.float32",
    ),
    "foreign adjoint solver": (
        lambda: torch.func.grad(
            lambda A: fl.lstsq(
                A, B, solver=lambda A, b: torch.linalg.pinv(A) @ b, adjoint_solver=_wrong_shape
            ).sum()
        )(A),
        r"adjoint_solver must return shape \(4,\).*got \(3,\).*Return a tensor",
    ),
    "foreign solver of a sparse batch": (
        _lstsq(fl.Sparse(S, VALUES.expand(2, -1)), B, solver=_wrong_shape),
        r"one sparse matrix at a time; got a batch of 2.*Use a named solver",
    ),
    "dense solver of an operator": (
        _lstsq(_operator(lambda p, v: p[0] @ v), B, solver="qr"),
        r"needs the entries of A, and a LinearOperator has none.*Use solver='lsmr'",
    ),
    "cholesky of an operator": (
        _lstsq(_operator(lambda p, v: p[0] @ v), B, solver="cholesky"),
        r"needs the entries of A.*Use solver='lsmr'",
    ),
    "shape of a matvec": (
        _lstsq(_operator(lambda p, v: v), B),
        r"for an input of shape \(3,\) the function must return shape \(4,\); got \(3,\)",
    ),
    "a matvec that cannot be differentiated": (
        _lstsq(_operator(lambda p, v: (p[0] @ v).detach()), B),
        r"matvec cannot be differentiated by torch.*Pass rmatvec",
    ),
    "rmatvec that is no adjoint": (
        _lstsq(_operator(lambda p, v: p[0] @ v, lambda p, u: 2 * (p[0].mT @ u)), B),
        r"rmatvec must be the adjoint of matvec.*differ by.*Correct rmatvec",
    ),
    "unknown backend": (
        _lstsq(
            scipy.sparse.eye_array(200), torch.ones(200, dtype=F64), solver="cholesky", backend="x"
        ),
        r"backend must be one of .*got 'x'",
    ),
    "a batched pattern": (
        lambda: torch.vmap(lambda i: fl.SparsityPattern(i, i, (4, 3)).nnz)(torch.zeros(2, 2).int()),
        r"row is batched by vmap; a pattern is static.*outside vmap",
    ),
    "rows for a factorisation": (
        lambda: fl.factorize(A).solve(B[:3]),
        r"Factorization\.solve: needs 4 rows for A \(4, 3\); got shape \(3,\)",
    ),
    "rows for its adjoint": (
        lambda: fl.factorize(A).adjoint(B),
        r"Factorization\.adjoint: needs 3 rows.*got shape \(4,\)",
    ),
    "dtype for a factorisation": (
        lambda: fl.factorize(A).solve(B.float()),
        r"needs dtype torch\.float64; got torch\.float32",
    ),
    "a factorisation inside a transform": (
        lambda: torch.func.grad(lambda A: fl.factorize(A).solve(B).sum())(A),
        r"cannot run inside a torch\.func transform.*Factorise outside",
    ),
    "NaN to factorise": (lambda: fl.factorize(_with(A, nan)), r"A must be finite; got 1 NaN"),
    "covariance without full rank": (
        lambda: fl.covariance(fl.factorize(A * torch.tensor([1.0, 0.0, 1.0], dtype=F64))),
        r"needs full column rank.*Remove columns, or add damp",
    ),
}


@pytest.mark.parametrize("name", VALUES_OR_RESULTS)
def test_values_and_results_that_cannot_be_right_are_refused(name):
    call, message = VALUES_OR_RESULTS[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky", "lsmr", "lsqr", "cgls"])
def test_bad_values_are_refused_by_every_solver(solver):
    for given in (_with(A, nan), fl.Sparse(S, _with(VALUES, inf))):
        with pytest.raises(ValueError, match="A must be finite"):
            fl.lstsq(given, B, solver=solver)
    with pytest.raises(ValueError, match="b must be finite"):
        fl.lstsq(A, _with(B, nan), solver=solver)


def test_the_name_of_the_called_function_stands_in_front():
    for call, name in (
        (lambda: fl.lstsq(A, B[:3]), "lstsq"),
        (lambda: fl.solve(A, B[:3]), "solve"),
        (lambda: fl.factorize(A.long()), "factorize"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
            call()


def test_the_finiteness_check_can_be_switched_off():
    with pytest.warns(fl.ConvergenceWarning, match="NONFINITE"):
        x = fl.lstsq(A, _with(B, nan), solver="qr", check_finite=False)
    assert torch.isnan(x).any()


def test_a_pattern_that_was_freed_is_told():
    with pytest.raises(RuntimeError, match=r"no longer exists.*Keep the SparsityPattern"):
        plan.plan_of_handle(-1)


def test_jax_arrays_are_sent_to_the_jax_interface():
    class Array:  # stands for any array that torch does not know
        shape = (6,)

    with pytest.raises(TypeError, match=r"values of A must be a torch tensor.*funclsq\.jax"):
        fl.lstsq(fl.Sparse(S, Array()), B)


@pytest.mark.parametrize("value", [0, 0.0, 1e-3, 2, None])
@pytest.mark.parametrize("name", ["atol", "btol", "rcond", "conlim", "maxiter", "rank"])
def test_numbers_that_are_not_negative_are_taken(name, value):
    if name in ("maxiter", "rank") and isinstance(value, float):
        value = int(value)
    if not (name == "rank" and value is None):
        assert settings("lstsq", "lsmr", **{name: value}).options() == Options(
            "lsmr", **{name: value}
        )


def test_the_keywords_of_a_partial_solver_come_first_and_the_outer_ones_win():
    inner = functools.partial(fl.solvers.lsmr, atol=1e-3, btol=1e-4)
    outer = functools.partial(inner, atol=1e-5)
    found = settings("lstsq", outer, maxiter=7, btol=1.0).options()
    assert found == Options("lsmr", atol=1e-5, btol=1e-4, maxiter=7)

    def own(A, b, power=1):
        return fl.lstsq(A, b) ** power

    found = settings("lstsq", functools.partial(own, power=3)).solver
    assert (found.func, found.keywords) == (own, {"power": 3})


def test_importing_is_light():
    """No JAX, no matplotlib, no scipy.optimize; in a process of its own."""
    code = (
        "import sys, torch, time; start = time.perf_counter(); import funclsq; "
        "print(time.perf_counter() - start); "
        "print([m for m in ('jax', 'matplotlib', 'scipy.optimize') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    seconds, modules = out.stdout.splitlines()
    assert modules == "[]", out.stdout
    assert float(seconds) < 60  # a sanity bound; timing is measured in a benchmark


@pytest.mark.parametrize("broken", [True, False])
def test_a_backend_that_cannot_be_had_says_why(broken, monkeypatch):
    """Absent, or there but not to be imported (a shared library is missing, say)."""

    def find(name):
        return object() if broken else None

    def load(name):
        raise ImportError("libmissing.so.5: no such file")

    monkeypatch.setattr(registry.importlib.util, "find_spec", find)
    monkeypatch.setattr(registry.importlib, "import_module", load)
    registry._import.cache_clear()
    try:
        why = r"cannot be imported here \(libmissing.so.5.*\)" if broken else "is not installed"
        with pytest.raises(ValueError, match=f"the package 'pypardiso', which {why}") as caught:
            registry.backend("pardiso")
    finally:
        registry._import.cache_clear()
    assert isinstance(caught.value.__cause__, ImportError if broken else type(None))
