"""torch.compile of forward and backward, in one graph, gives what eager gives; or says no."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import LAYOUTS, operands, problem
from oracle import check, loss, reference

import funclsq as fl

F64 = torch.float64
# Dynamo itself instantiates a Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(f, backend="aot_eager"):
    return torch.compile(f, fullgraph=True, backend=backend)


def _wrapped(p, layout):
    """x as a function of leaf and operands; the pattern is made outside what is compiled."""
    pattern = LAYOUTS["sparse"].wrap(operands(p, F64)[0], p.stored).pattern

    def f(leaf, b, *rest):
        A = leaf if layout == "dense" else fl.Sparse(pattern, leaf)
        return fl.lstsq(A, b, **dict(zip(p.names[2:], rest)))

    return f


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything", "tall_vector"])
def test_forward_and_backward_in_one_graph(name, layout):
    ref = reference(name, F64)
    p = [t.requires_grad_() for t in operands(ref.problem, F64, layout)]
    f = _wrapped(ref.problem, layout)
    x = _compile(f)(*p)
    check(x.detach(), ref.x, "x")
    bars = torch.autograd.grad(loss(x, ref.cotangent), p)
    for n, bar in zip(ref.problem.names, bars):
        pull = (lambda t: LAYOUTS[layout].pull(t, ref.problem.stored)) if n == "A" else None
        check(bar, ref.grad[n], n, pull)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_the_default_compiler(layout):
    ref = reference("deficient_tall", F64)
    p = [t.requires_grad_() for t in operands(ref.problem, F64, layout)]

    f = _wrapped(ref.problem, layout)

    def value(A, b):
        return loss(2 * f(A, b).sin(), ref.cotangent)

    got = torch.autograd.grad(_compile(value, "inductor")(*p), p)
    for bar, want in zip(got, torch.autograd.grad(value(*p), p)):
        torch.testing.assert_close(bar, want, rtol=1e-11, atol=1e-12)


def test_a_loss_around_a_solution_compiles_and_new_values_are_seen():
    ref = reference("tall", F64)
    pattern = LAYOUTS["sparse"].wrap(operands(ref.problem, F64)[0], ref.problem.stored).pattern

    def value(v, b):
        return fl.solve(fl.Sparse(pattern, v), b).x.square().sum()

    compiled = _compile(value)
    v, b = operands(ref.problem, F64)
    for scale in (1.0, 2.0, -0.5):
        q = (scale * v).requires_grad_()
        (got,) = torch.autograd.grad(compiled(q, b), q)
        (want,) = torch.autograd.grad(value(q, b), q)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_settings_and_several_solvers_compile():
    ref = reference("damped", F64)
    v, b, damp = operands(ref.problem, F64)
    pattern = LAYOUTS["sparse"].wrap(v, ref.problem.stored).pattern
    for solver in ("qr", "svd", "cholesky", "lsmr"):

        def f(v, b, damp, solver=solver):
            return fl.lstsq(fl.Sparse(pattern, v), b, damp=damp, solver=solver, atol=0.0)

        check(_compile(f)(v, b, damp), ref.x, solver)
        constant = _compile(lambda v, b, f=f: f(v, b, 0.75))
        check(constant(v, b), ref.x, solver)


def test_bad_input_is_still_refused_while_compiling():
    A, b = operands(problem("tall"), F64, "dense")
    with pytest.raises(Exception, match="b must have 7 rows"):
        _compile(fl.lstsq)(A, b[:3])
    with pytest.raises(Exception, match="b must be finite"):
        _compile(fl.lstsq)(A, b * float("nan"))


def test_a_batch_compiles():
    A, b = operands(problem("tall"), F64, "dense")
    A = torch.stack((A, 2 * A)).requires_grad_()
    x = _compile(fl.lstsq)(A, b)
    torch.testing.assert_close(x, fl.lstsq(A, b))
    (got,) = torch.autograd.grad(x.square().sum(), A)
    (want,) = torch.autograd.grad(fl.lstsq(A, b).square().sum(), A)
    torch.testing.assert_close(got, want)


def test_forward_mode_is_never_silently_dropped():
    """A compiled tangent is refused: torch drops a Function's jvp without a word."""
    ref = reference("tall", F64)
    f = _wrapped(ref.problem, "dense")
    p = operands(ref.problem, F64, "dense")
    along = (ref.along["A"], ref.along["b"])
    push = torch.compile(lambda *q: torch.func.jvp(f, q, along)[1], backend="aot_eager")
    with pytest.raises(Exception, match="drops forward-mode rules"):
        push(*p)


def test_reverse_mode_inside_a_compiled_function():
    """torch.func.grad inside torch.compile."""
    A, b = operands(problem("tall"), F64, "dense")

    def gradient(A, b):
        return torch.func.grad(lambda A: fl.lstsq(A, b).pow(3).sum())(A)

    got = torch.compile(gradient, backend="aot_eager")(A, b)
    torch.testing.assert_close(got, gradient(A, b), rtol=1e-12, atol=1e-13)


def test_one_graph_for_several_patterns_and_sizes():
    f = _compile(lambda S, v, b: fl.lstsq(fl.Sparse(S, v), b))
    for seed, (m, n) in enumerate(((20, 8), (20, 8), (26, 8), (20, 8))):
        A = torch.rand(m, n, dtype=torch.float64) + 2 * torch.eye(m, n, dtype=torch.float64)
        stored = torch.rand(m, n) < (0.5 + 0.1 * seed)
        stored |= torch.eye(m, n, dtype=torch.bool)
        pattern = fl.SparsityPattern(*stored.nonzero().T, (m, n))
        values, b = A[stored].requires_grad_(), torch.rand(m, dtype=torch.float64)
        outs = [g(pattern, values, b) for g in (f, lambda S, v, b: fl.lstsq(fl.Sparse(S, v), b))]
        bars = [torch.autograd.grad(x.square().sum(), values)[0] for x in outs]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*bars)


def test_an_exported_program_does_not_run_elsewhere(tmp_path):
    """Its solve is a number of a plan in this process; no other may have one of that number."""

    class Module(torch.nn.Module):
        def forward(self, A, b):
            return fl.lstsq(A, b, rank=1)

    A, b = torch.rand(8, 3, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    program = torch.export.export(Module(), (A, b))
    torch.testing.assert_close(program.module()(A, b), fl.lstsq(A, b, rank=1))
    torch.export.save(program, tmp_path / "p.pt2")
    code = (
        "import torch, funclsq as fl\n"
        "A, b = torch.rand(8, 3, dtype=torch.float64), torch.rand(8, dtype=torch.float64)\n"
        "for rank in ('auto', 'full', 1, 2, 3): fl.lstsq(A, b, rank=rank)\n"
        f"program = torch.export.load({str(tmp_path / 'p.pt2')!r})\n"
        "try: program.module()(A, b)\n"
        "except RuntimeError as error: assert 'torch.export' in str(error), error\n"
        "else: raise SystemExit('it ran')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
