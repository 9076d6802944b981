"""lstsq passes through every transform of torch, and every nesting of them, unchanged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from cases import LAYOUTS, SOLVERS, function, leaves, operands, problem
from oracle import bases, check, loss, minimiser, reference
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import funclsq as fl
from funclsq.forward_mode import unrecorded
from funclsq.raw import clear_cache, solver_calls

F64 = torch.float64


# ---------------------------------------------------------------------------------------------
# A family of problems in few parameters, which enter every operand; the same for the oracle.


class Family:
    """x(p) for p (2,): A = B(p) C of constant rank, b, damp, weights and x0 all depend on p."""

    def __init__(self, kind: str, dtype: torch.dtype = F64) -> None:
        generator = torch.Generator().manual_seed(21)
        m, n, rank = {"tall": (4, 2, 2), "wide": (2, 3, 2), "deficient": (4, 3, 2)}[kind]
        self.damped = kind == "tall"
        self.rank = rank

        def make(*shape):
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.B, self.C = 0.3 * make(3, m, rank), make(rank, n)
        self.B[0, :rank] += torch.eye(rank, dtype=dtype)
        self.C[:, :rank] += 2 * torch.eye(rank, dtype=dtype)
        self.b, self.x0, self.w = make(3, m), make(3, n), make(m).real.abs() + 0.5
        self.R = bases({"A": self.B[0] @ self.C}, rank)

    def left(self, p):
        return self.B[0] + p[0] * self.B[1] + p[1].sin() * self.B[2]

    def operands(self, p):
        out = {
            "A": self.left(p) @ self.C,
            "b": self.b[0] + p[1] * self.b[1] + p[0] ** 2 * self.b[2],
        }
        out["x0"] = self.x0[0] * p[0].exp()
        out["weights"] = self.w * (1 + 0.3 * p[1].real).exp()
        if self.damped:
            out["damp"] = 0.4 + 0.1 * p[0].real ** 2
        return out

    def x(self, p):
        q = self.operands(p)
        A, b = q.pop("A"), q.pop("b")
        return fl.lstsq(A, b, **q)

    def sparse_x(self, p):
        q = self.operands(p)
        A, b = q.pop("A"), q.pop("b")
        row, col = np.divmod(np.arange(A.numel()), A.shape[1])
        return fl.lstsq(fl.Sparse(_pattern(A.shape, row, col), A.flatten()), b, **q)

    def exact(self, p):
        q = self.operands(p)
        if self.damped:
            return minimiser(q, self.R)
        # by the factors of A = F C: of a basis for A^H W A second derivatives lose ten digits
        F, C = self.left(p), self.C
        WF = q["weights"][:, None] * F
        inv = torch.linalg.inv  # torch.linalg.solve is wrong where forward mode is nested
        y = inv(F.mH @ WF) @ (WF.mH @ (q["b"] - q["A"] @ q["x0"]))
        return q["x0"] + C.mH @ (inv(C @ C.mH) @ y)


_patterns: dict[tuple[int, int], fl.SparsityPattern] = {}


def _pattern(shape, row, col):
    key = tuple(shape)
    if key not in _patterns:
        _patterns[key] = fl.SparsityPattern(row, col, key)
    return _patterns[key]


def _jvp(f):
    return lambda p: jvp(f, (p,), (torch.tensor([0.3, -0.7], dtype=p.dtype),))[1]


def _vjp(f):
    return lambda p: vjp(lambda q: f(q).sum(0).sin(), p)[1](torch.ones_like(f(p).sum(0)))[0]


def _grad(f):
    return grad(lambda p: f(p).square().sum())


def _over_points(f):
    shifts = torch.tensor([[0.0, 0.0], [0.1, -0.2]], dtype=F64)
    return lambda p: vmap(lambda s: f(p + s))(shifts).sum(0)


def _linear(f):
    return lambda p: linearize(f, p)[1](torch.tensor([0.3, -0.7], dtype=p.dtype))


TRANSFORMS = {
    "jacfwd": jacfwd,
    "jacrev": jacrev,
    "hessian": hessian,
    "jvp": _jvp,
    "vjp": _vjp,
    "grad": _grad,
    "vmap": _over_points,
}
POINT = torch.tensor([0.2, -0.1], dtype=F64)


def _compare(f, exact, names, rtol):
    for name in reversed(names):
        f, exact = TRANSFORMS[name](f), TRANSFORMS[name](exact)
    want = exact(POINT)
    torch.testing.assert_close(f(POINT), want, rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize("kind", ["tall", "wide", "deficient"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transform(name, kind):
    family = Family(kind)
    _compare(family.x, family.exact, (name,), 1e-12)
    _compare(family.sparse_x, family.exact, (name,), 1e-12)


PAIRS = list(itertools.product([n for n in TRANSFORMS if n != "hessian"], repeat=2))


@pytest.mark.parametrize("kind", ["tall", "deficient"])
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_each_pair_of_transforms(names, kind):
    family = Family(kind)
    _compare(family.x if kind == "tall" else family.sparse_x, family.exact, names, 1e-11)


TRIPLES = [
    *itertools.product(("jacfwd", "jacrev"), repeat=3),
    *itertools.permutations(("vmap", "jvp", "grad")),
    ("vmap", "vmap", "vmap"),
    ("vmap", "hessian", "vmap"),
    ("jvp", "jvp", "jvp"),
    ("grad", "grad", "grad"),
    ("jvp", "vjp", "jvp"),
]


@pytest.mark.parametrize("kind", ["tall", "deficient"])
@pytest.mark.parametrize("names", TRIPLES, ids="-".join)
def test_triples_of_transforms(names, kind):
    family = Family(kind)
    _compare(family.x if kind == "deficient" else family.sparse_x, family.exact, names, 1e-11)


# ---------------------------------------------------------------------------------------------
# linearize: on new tangents, by every solver.

_LINEARIZE = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own


@_LINEARIZE
@pytest.mark.parametrize(
    ("name", "layout", "solver"),
    [
        *(("deficient_tall", "sparse", solver) for solver in SOLVERS),
        ("deficient_tall", "dense", "auto"),
        ("deficient_tall", "matrix_free", "auto"),
        ("everything", "sparse", "auto"),
    ],
)
def test_linearize_serves_new_tangents(name, layout, solver):
    ref = reference(name, F64)
    f = function(ref.problem, layout, solver=solver)
    p = operands(ref.problem, F64, layout)
    x, push = linearize(f, *p)
    check(x, ref.x, "x")
    for direction in (ref.other, ref.along):  # the last is the one of the reference
        tangent = push(*leaves(ref.problem, direction, layout))
    check(tangent, ref.jvp, "tangent")


@_LINEARIZE
def test_linearize_of_a_gradient():
    ref = reference("wide", F64)
    p = operands(ref.problem, F64)
    gradient = grad(lambda *q: loss(function(ref.problem)(*q), ref.cotangent), argnums=(0, 1))
    _, push = linearize(gradient, *p)
    push(*leaves(ref.problem, ref.other))
    A_bar, b_bar = push(*leaves(ref.problem, ref.along))
    check(A_bar, ref.hvp["A"], "hvp", lambda t: LAYOUTS["sparse"].pull(t, ref.problem.stored))
    check(b_bar, ref.hvp["b"], "hvp")


# ---------------------------------------------------------------------------------------------
# vmap: what is batched becomes one call of the solver.


def _calls(f, *args):
    clear_cache()
    before = solver_calls()
    out = f(*args)
    return out, solver_calls() - before


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything"])
def test_vmap_over_16_right_hand_sides_is_one_call_of_the_solver(name, solver):
    p = problem(name)
    A, b, *rest = operands(p, F64)
    many = torch.randn(16, *b.shape, dtype=F64)
    f = function(p, solver=solver)
    in_dims = (None, 0, *(None for _ in rest))
    x, calls = _calls(vmap(f, in_dims), A, many, *rest)
    assert calls == 1
    want = torch.stack([f(A, bi, *rest) for bi in many])
    torch.testing.assert_close(x, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["dense", "sparse", "matrix_free"])
@pytest.mark.parametrize("name", ["tall", "damped"])
def test_vmap_of_grad_is_one_call_beyond_the_forward_one(name, layout):
    p = problem(name)
    A, b, *rest = operands(p, F64, layout)
    many = torch.randn(16, *b.shape, dtype=F64)
    c = torch.randn(p.A.shape[1], 2, dtype=F64)
    # Products alone do not tell the rank: there it takes the user's word.
    f = function(p, layout, rank="full" if layout == "matrix_free" else "auto")
    gradient = grad(lambda A, b: (c * f(A, b, *rest)).sum(), argnums=(0, 1))
    bars, calls = _calls(vmap(gradient, (None, 0)), A, many)
    assert calls == 2  # one forward, one backward
    alone = [gradient(A, bi) for bi in many]
    for got, want in zip(bars, zip(*alone)):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-11, atol=1e-12)


def test_a_deficient_matrix_adds_a_fixed_number_of_calls():
    p = problem("deficient_tall")
    A, b = operands(p, F64)
    c = torch.randn(5, 2, dtype=F64)
    gradient = grad(lambda A, b: (c * function(p)(A, b)).sum(), argnums=(0, 1))
    _, one = _calls(gradient, A, b)
    _, many = _calls(vmap(gradient, (None, 0)), A, torch.randn(16, *b.shape, dtype=F64))
    # forward, adjoint, G^+ x for the third term, and the second projection on the null space
    assert one == many == 4


@pytest.mark.parametrize("solver", ["auto", "cholesky", "lsmr"])
def test_vmap_over_values_is_one_batch(solver):
    p = problem("tall")
    A, b = operands(p, F64)
    many = A * torch.linspace(0.5, 2, 5, dtype=F64)[:, None]
    f = function(p, solver=solver)
    x, calls = _calls(vmap(f, (0, None)), many, b)
    assert calls == 1
    torch.testing.assert_close(x, torch.stack([f(v, b) for v in many]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["dense", "sparse", "matrix_free"])
@pytest.mark.parametrize("name", ["wide", "deficient_tall", "everything"])
def test_vmap_over_any_choice_of_operands_in_any_dimension(name, layout):
    p = problem(name)
    q = operands(p, F64, layout)
    f = function(p, layout)
    scale = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    for batched in itertools.chain(
        itertools.combinations(range(len(q)), 1), [tuple(range(len(q)))], [(0, 1)]
    ):
        for at_end in (False, True):
            args, dims = [], []
            for i, t in enumerate(q):
                if i in batched:
                    args.append(torch.stack([s * t for s in scale], -1 if at_end else 0))
                    dims.append(args[-1].ndim - 1 if at_end else 0)
                else:
                    args.append(t)
                    dims.append(None)
            got = vmap(f, tuple(dims), out_dims=-1)(*args)
            want = [f(*(s * t if i in batched else t for i, t in enumerate(q))) for s in scale]
            torch.testing.assert_close(got, torch.stack(want, -1), rtol=1e-10, atol=1e-11)


def test_nested_vmap_over_values_and_right_hand_sides():
    p = problem("tall")
    A, b = operands(p, F64)
    values = torch.stack((A, 2 * A, -A))
    many = torch.randn(4, *b.shape, dtype=F64)
    f = function(p)
    over_both = vmap(vmap(f, (None, 0)), (0, None))
    got, calls = _calls(over_both, values, many)
    assert calls == 1
    want = torch.stack([torch.stack([f(v, c) for c in many]) for v in values])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    swapped = vmap(vmap(f, (0, None)), (None, 0))(values, many)
    torch.testing.assert_close(swapped, want.transpose(0, 1), rtol=1e-11, atol=1e-12)


def test_vmap_of_members_of_unequal_rank():
    p = problem("deficient_tall")
    low = torch.from_numpy(p.A)
    A = torch.stack((low, low + torch.rand_like(low), 0 * low))
    b, c = torch.randn(8, 2, dtype=F64), torch.randn(5, 2, dtype=F64)
    gradient = grad(lambda A, b: (c * fl.lstsq(A, b)).sum(), argnums=(0, 1))
    got = vmap(gradient, (0, None))(A, b)
    for i in range(3):
        for bars, want in zip(got, gradient(A[i], b)):
            torch.testing.assert_close(bars[i], want, rtol=1e-10, atol=1e-11)


def test_vmap_in_chunks_and_of_a_solution():
    p = problem("tall")
    A, b = (t for t in operands(p, F64, "dense"))
    many = torch.randn(5, *b.shape, dtype=F64)
    whole = vmap(fl.solve, (None, 0))(A, many)
    assert whole.x.shape == (5, 4, 2)
    assert whole.status.shape == whole.iterations.shape == whole.residual_norm.shape == (5, 2)
    assert bool(whole.converged.all())
    torch.testing.assert_close(vmap(fl.lstsq, (None, 0), chunk_size=2)(A, many), whole.x)


def test_a_pattern_and_its_values_pass_through_as_a_pytree():
    p = problem("tall")
    A, b = operands(p, F64)
    wrapped = LAYOUTS["sparse"].wrap(A, p.stored)
    bars = grad(lambda S: fl.lstsq(S, b).square().sum())(wrapped)
    assert isinstance(bars, fl.Sparse)
    assert bars.pattern is wrapped.pattern
    want = grad(lambda v: fl.lstsq(fl.Sparse(wrapped.pattern, v), b).square().sum())(A)
    torch.testing.assert_close(bars.values, want)


# ---------------------------------------------------------------------------------------------
# The rest of torch.


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything_deficient"])
def test_dual_numbers_pass_through_a_backward_pass(name, create_graph):
    ref = reference(name, F64)
    p = [t.requires_grad_() for t in operands(ref.problem, F64)]
    with fwAD.dual_level():
        dual = [fwAD.make_dual(t, v) for t, v in zip(p, leaves(ref.problem, ref.along))]
        x = function(ref.problem)(*dual)
        check(fwAD.unpack_dual(x).tangent.detach(), ref.jvp, "tangent")
        bars = torch.autograd.grad(loss(x, ref.cotangent), dual, create_graph=create_graph)
        for name, bar in zip(ref.problem.names, bars):
            pull = (
                (lambda t: LAYOUTS["sparse"].pull(t, ref.problem.stored)) if name == "A" else None
            )
            check(fwAD.unpack_dual(bar).tangent.detach(), ref.hvp[name], f"hvp of {name}", pull)


@pytest.mark.parametrize("name", ["wide", "deficient_tall"])
def test_a_pull_back_without_recording_still_carries_tangents(name):
    ref = reference(name, F64)

    def pulled(*q):
        _, pull = vjp(lambda *r: loss(function(ref.problem)(*r), ref.cotangent), *q)
        with torch.no_grad():
            return pull(torch.ones((), dtype=F64))

    p = operands(ref.problem, F64)
    _, hvp = jvp(pulled, p, leaves(ref.problem, ref.along))
    for name, bar in zip(ref.problem.names, hvp):
        pull = (lambda t: LAYOUTS["sparse"].pull(t, ref.problem.stored)) if name == "A" else None
        check(bar, ref.hvp[name], f"hvp of {name}", pull)


@pytest.mark.parametrize("layout", ["coo", "coo_uncoalesced", "csr", "csc", "bsr"])
def test_a_gradient_penalty_through_a_sparse_tensor(layout):
    """Double backward: the penalty ||dL/dA||^2 + ||dL/db||^2, differentiated."""
    ref = reference("tall", F64)
    p = ref.problem
    chosen = LAYOUTS[layout]

    def penalised(leaf, b, wrap):
        value = fl.lstsq(wrap(leaf), b).square().sum()
        bars = torch.autograd.grad(value, (leaf, b), create_graph=True)
        first = bars[0] if bars[0].layout == torch.strided else fl.Sparse.from_torch(bars[0]).values
        return value + first.square().sum() + bars[1].square().sum()

    data = {n: t.clone() for n, t in ref.data.items()}
    leaf = chosen.leaf(data["A"], p.stored).requires_grad_()
    b = data["b"].clone().requires_grad_()
    got = torch.autograd.grad(penalised(leaf, b, lambda t: t), (leaf, b))
    assert got[0].layout == leaf.layout
    values = fl.Sparse.from_torch(leaf.detach())
    flat = values.values.clone().requires_grad_()
    c = data["b"].clone().requires_grad_()
    want = torch.autograd.grad(
        penalised(flat, c, lambda v: fl.Sparse(values.pattern, v)), (flat, c)
    )
    torch.testing.assert_close(fl.Sparse.from_torch(got[0]).values, want[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got[1], want[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["tall", "deficient_tall", "everything"])
@pytest.mark.parametrize("layout", ["sparse", "csr", "matrix_free"])
def test_saved_tensor_hooks_see_what_is_saved_and_may_replace_it(name, layout):
    ref = reference(name, F64)
    p = [t.requires_grad_() for t in operands(ref.problem, F64, layout)]
    packed = []

    def pack(t):
        packed.append(t)
        return t.detach().clone().numpy() if t.layout == torch.strided else t

    def unpack(t):
        return torch.from_numpy(t) if isinstance(t, np.ndarray) else t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = loss(function(ref.problem, layout)(*p), ref.cotangent)
    bars = torch.autograd.grad(value, p)
    assert packed
    check(bars[1], ref.grad["b"], "gradient of b")
    want = LAYOUTS[layout].pull(ref.grad["A"].value, ref.problem.stored)
    error = torch.linalg.vector_norm(bars[0].to_dense() - want.to_dense())
    assert error <= ref.grad["A"].tolerance


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", ["dense", "sparse", "matrix_free"])
def test_checkpointing_recomputes_the_same_gradient(layout, reentrant):
    ref = reference("deficient_tall", F64)
    p = [t.requires_grad_() for t in operands(ref.problem, F64, layout)]

    def value(*q):
        return loss(function(ref.problem, layout)(*q), ref.cotangent)

    out = torch.utils.checkpoint.checkpoint(value, *p, use_reentrant=reentrant)
    out.backward()
    check(p[1].grad, ref.grad["b"], "gradient of b")
    pull = lambda t: LAYOUTS[layout].pull(t, ref.problem.stored)  # noqa: E731
    check(p[0].grad, ref.grad["A"], "gradient of A", pull)


def test_inference_and_no_grad_modes():
    ref = reference("everything", F64)
    p = operands(ref.problem, F64)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            x = function(ref.problem)(*[t.clone() for t in p])
            check(x, ref.x, "x")
            assert not x.requires_grad


def test_a_module_with_a_least_squares_layer_is_functional():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.A = torch.nn.Parameter(problem("tall").tensors(F64)["A"])

        def forward(self, b):
            return fl.lstsq(self.A, b)

    layer, b = Layer(), problem("tall").tensors(F64)["b"]
    weights = dict(layer.named_parameters())
    bars = grad(lambda w: functional_call(layer, w, (b,)).square().sum())(weights)
    layer(b).square().sum().backward()
    torch.testing.assert_close(bars["A"], layer.A.grad)
    ensemble = {"A": torch.stack((layer.A.detach(), 2 * layer.A.detach()))}
    x = vmap(lambda w: functional_call(layer, w, (b,)))(ensemble)
    torch.testing.assert_close(x[1], x[0] / 2)


def test_batched_cotangents_of_autograd_itself():
    ref = reference("deficient_tall", F64)
    p = [t.requires_grad_() for t in operands(ref.problem, F64)]
    x = function(ref.problem)(*p)
    cotangents = torch.randn(3, *x.shape, dtype=F64)
    got = torch.autograd.grad(x, p, cotangents, is_grads_batched=True, retain_graph=True)
    for i, c in enumerate(cotangents):
        for bars, want in zip(got, torch.autograd.grad(x, p, c, retain_graph=True)):
            torch.testing.assert_close(bars[i], want, rtol=1e-11, atol=1e-12)


def test_jacobians_of_torch_autograd_functional():
    ref = reference("tall_vector", F64)
    A, b = operands(ref.problem, F64, "dense")
    f = function(ref.problem, "dense")
    for vectorize, strategy in (
        (False, "reverse-mode"),
        (True, "reverse-mode"),
        (True, "forward-mode"),
    ):
        J = torch.autograd.functional.jacobian(
            lambda b: f(A, b), b, vectorize=vectorize, strategy=strategy
        )
        torch.testing.assert_close(J, torch.linalg.pinv(A), rtol=1e-10, atol=1e-12)


def test_rules_are_left_out_only_where_nothing_could_use_them():
    seen = []

    def f(t):
        seen.append(unrecorded())
        return t * t

    t = torch.ones(2, dtype=F64)
    f(t)
    grad(lambda t: f(t).sum())(t)
    vmap(f)(t)
    jvp(f, (t,), (t,))
    with fwAD.dual_level():
        f(t)
    with torch.no_grad():
        vmap(f)(t)
        jvp(f, (t,), (t,))
        with fwAD.dual_level():
            f(t)
    assert not any(seen)
    with torch.no_grad():
        f(t)
    assert seen[-1]


def test_a_trace_without_gradients_records_calls():
    """Not what they did with the numbers at hand."""
    S = fl.SparsityPattern([0, 1, 2, 2], [0, 1, 0, 1], (3, 2))
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    b = torch.tensor([1.0, -1.0, 2.0], dtype=F64)

    def f(values, b):
        with torch.no_grad():
            x = fl.lstsq(fl.Sparse(S, values), b)
            return x, fl.Sparse(S, values) @ x

    traced = make_fx(f)(values, b)
    for args in ((values, b), (values.flip(0), b + 1)):
        for got, want in zip(traced(*args), f(*args)):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    names = {str(node.target) for node in traced.graph.nodes}
    assert {"funclsq.solve.default", "funclsq.spmm.default"} <= names
