"""A wrong derivative rule does not pass: every mutant of the rules is found.

The judge shares nothing with the rules: first derivatives are held against central differences
of the solution, second ones against central differences of first ones.
"""

import pytest
import torch
from mutants import mutants, plant
from torch.func import jvp, vjp

import funclsq as fl

REAL, COMPLEX = torch.float64, torch.complex128
STEP, TOLERANCE = 1e-4, 2e-4
# Mistakes that cannot be seen, and why.
EQUIVALENT = {
    ": 5 + len(params)": "a count of None, not algebra",
    ": -1": "the last dimension is also dimension 1 where nothing is batched",
    ": ax_dot + matmul(structure, params, null_term)": "A (I - P) is zero",
    ": v - rmatmul(plan.structure, params, _rows(w, az))": "the second projection does it all",
    "weights dropped: _rows(w, az)": "the second projection does it all",
    ": out - d2.unsqueeze(-1) * z": "the second projection does it all",
    ": out - solve(plan, w, d2, image": "the first projection does it to eps cond^2",
}


def _randn(g, *shape, dtype=REAL):
    return torch.randn(shape, generator=g, dtype=dtype)


def _sparse(dtype, m, n):
    g = torch.Generator().manual_seed(m)
    keep = torch.rand(m, n, generator=g) < 0.8
    pattern = fl.SparsityPattern(*keep.nonzero().T, (m, n))
    args = [
        _randn(g, pattern.nnz, dtype=dtype),
        _randn(g, m, 2, dtype=dtype),
        torch.rand(m, generator=g, dtype=REAL) + 0.5,
        torch.tensor(0.7, dtype=REAL),
        _randn(g, n, 2, dtype=dtype),
    ]

    def f(values, b, w, damp, x0):
        return fl.lstsq(fl.Sparse(pattern, values), b, weights=w, damp=damp, x0=x0, solver="svd")

    return f, args


def _deficient(dtype):
    g = torch.Generator().manual_seed(5)
    m, n, rank = 6, 4, 2
    args = [
        _randn(g, m, rank, dtype=dtype),
        _randn(g, rank, n, dtype=dtype),
        _randn(g, m, 1, dtype=dtype),
        torch.rand(m, generator=g, dtype=REAL) + 0.5,
    ]
    pattern = fl.SparsityPattern(*torch.ones(m, n).nonzero().T, (m, n))

    def f(left, right, b, w):
        A = fl.Sparse(pattern, (left @ right).flatten())
        return fl.lstsq(A, b, weights=w, solver="svd")

    return f, args


def _cases():
    yield _sparse(COMPLEX, 6, 3)
    yield _deficient(REAL)
    yield _deficient(COMPLEX)


def _inner(a, b):
    return sum((x.conj() * y).real.sum() for x, y in zip(a, b, strict=True))


def _close(got, want):
    assert (got - want).abs() <= TOLERANCE * (want.abs() + 0.1), (got, want)


def judge():
    """Hold first and second derivatives against differences."""
    for f, args in _cases():
        g = torch.Generator().manual_seed(11)
        k = _randn(g, *f(*args).shape, dtype=f(*args).dtype)
        for slot in range(len(args)):
            along = [torch.zeros_like(a) for a in args]
            along[slot] = _randn(g, *args[slot].shape, dtype=args[slot].dtype)
            ahead, behind = ([a + sign * STEP * t for a, t in zip(args, along)] for sign in (1, -1))
            slope = (f(*ahead) - f(*behind)) / (2 * STEP)
            x_dot = jvp(f, tuple(args), tuple(along))[1]
            _close(_inner([k], [x_dot]), _inner([k], [slope]))
            _close(x_dot.abs().sum(), slope.abs().sum())

            def pulled(*a, f=f, k=k):
                return vjp(f, *a)[1](k)

            bars = pulled(*args)
            _close(_inner(bars, along), _inner([k], [slope]))
            differences = [
                (p - q) / (2 * STEP) for p, q in zip(pulled(*ahead), pulled(*behind), strict=True)
            ]
            probe = [_randn(g, *a.shape, dtype=a.dtype) for a in args]
            want = _inner(probe, differences)
            _close(_inner(probe, jvp(pulled, tuple(args), tuple(along))[1]), want)
            turned = vjp(pulled, *args)[1](tuple(probe))
            _close(_inner(turned, along), want)

            def pushed(*a, f=f, along=along):
                return jvp(f, a, tuple(along))[1]

            bend = (pushed(*ahead) - pushed(*behind)) / (2 * STEP)
            twice = jvp(pushed, tuple(args), tuple(along))[1]
            _close(_inner([k], [twice]), _inner([k], [bend]))


def test_the_judge_accepts_the_rules():
    judge()


@pytest.mark.slow
def test_every_mutant_is_killed(capsys):
    survivors, total = [], 0
    for module, description, source in mutants():
        total += 1
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, module, source)
            try:
                judge()
            except Exception:
                continue
        survivors.append(description)
    with capsys.disabled():
        print(f"\nmutants of the derivative rules: {total - len(survivors)} of {total} killed")
    unexplained = [s for s in survivors if not any(e in s for e in EQUIVALENT)]
    assert not unexplained, "\n".join(unexplained)
