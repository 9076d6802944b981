"""A torch function against a JAX function that is believed to be equal, derivatives and all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from funclsq.validate._torch_side import torch_answers
from funclsq.validate.estimate import Estimate
from funclsq.validate.flattening import Arguments, Flat
from funclsq.validate.problem import Arrays
from funclsq.validate.report import Report, Row
from funclsq.validate.tolerances import Sensitivity

__all__ = ["compare"]

_PERTURBATIONS = 3
_SIZE = 1e-9  # of the perturbations in float64; float32 cannot resolve less than its roundoff


def compare(
    torch_fn: Callable[..., Any],
    jax_fn: Callable[..., Any],
    *args: Any,
    seed: int = 0,
    batch: int = 3,
    factor: float = 100.0,
) -> Report:
    """Check that f(*args) and g(*args) are the same function: one of torch, one of JAX.

    Returns a :class:`Report` with rows for the values, the directional derivative in every
    argument (jvp), the gradient for a random cotangent (vjp), Hessian-vector products in all
    nestings of forward and reverse mode, and values and gradients under ``vmap``.

    Parameters
    ----------
    torch_fn, jax_fn : callable
        Of the same arguments, to pytrees of arrays with the same structure.
    *args : pytrees of arrays
        torch tensors, JAX or NumPy arrays in tuples, lists and dicts. Each function gets arrays
        of its own library, carried over by DLPack. Floating-point and complex leaves are
        differentiated; integer arrays and everything else are passed on as they are.
    seed : int
        Of directions, cotangents and perturbations.
    batch : int
        Members under ``vmap``; 0 leaves it out.
    factor : float
        The two may differ by this multiple of what they move when the arguments move by their
        rounding (the smaller of the two movements counts), and of the unit roundoff.

    Returns
    -------
    Report
        True if everything agrees.

    Raises
    ------
    ImportError
        If JAX is not installed.
    ValueError
        If no argument can be differentiated.

    Notes
    -----
    Complex derivatives are compared in torch's convention; JAX's are conjugated. With 64-bit
    arguments ``jax_enable_x64`` is on while the JAX function runs, and only then. Cost: some
    dozens of evaluations of each function, and a few compilations.

    Examples
    --------
    >>> import jax.numpy as jnp, torch
    >>> from funclsq.validate import compare
    >>> t = torch.linspace(0.1, 1.0, 4, dtype=torch.float64)
    >>> bool(compare(torch.sin, jnp.sin, t))
    True
    >>> report = compare(torch.sin, lambda t: 1.01 * jnp.sin(t), t)
    >>> bool(report), sorted({row.quantity for row in report.failures})[:2]
    (False, ['hvp args[0]', 'hvp args[0] (r/f)'])
    """
    import jax

    from funclsq.validate._jax_side import jax_answers, x64

    rng = np.random.default_rng(seed)
    arguments = Arguments(args)
    inputs = arguments.inputs
    if not inputs:
        raise ValueError(
            "compare: no argument can be differentiated; pass at least one floating-point array."
        )
    f = Flat(torch_fn, arguments, pytree.tree_flatten_with_path, pytree.keystr, torch.as_tensor)
    g = Flat(
        jax_fn,
        arguments,
        jax.tree_util.tree_flatten_with_path,
        jax.tree_util.keystr,
        jax.numpy.asarray,
    )
    title = f"{_name(torch_fn)} (torch) against {_name(jax_fn)} (JAX)"
    found: dict[str, Any] = {}
    for name, flat in (("torch", f), ("jax", g)):
        try:
            with x64(arguments.wide or jax.config.jax_enable_x64):
                found[name] = flat.outputs(inputs)
        except Exception as error:
            reason = f"raised {type(error).__name__}: {str(error).strip()[:200]}"
            return Report(title, (Row("value", name, "none", float("inf"), 0.0, reason),))
    rows = _outputs_differ(found["torch"], found["jax"])
    if rows:
        return Report(title, tuple(rows))

    rows = _judge("", inputs, found["torch"], torch_answers, f, jax_answers(g), rng, factor)
    if batch:
        stack = {key: _members(a, batch, rng) for key, a in inputs.items()}
        kinds = ("value", "vjp")
        ask = functools.partial(torch_answers, only=kinds)
        batched = jax_answers(jax.vmap(g), kinds)
        outputs = {key: np.stack([a] * batch) for key, a in found["torch"].items()}
        rows += _judge("vmap ", stack, outputs, ask, torch.func.vmap(f), batched, rng, factor)
    note = (
        f"An error is held to {factor:g} times what the answer moves when the arguments move by "
        f"eps, relatively and at random, and to {factor:g} eps at least."
    )
    return Report(title, tuple(rows), (note,))


def _outputs_differ(first: Arrays, second: Arrays) -> list[Row]:
    """Return rows on outputs that no tolerance can reconcile."""
    rows = []

    def say(name: str, reason: str) -> None:
        rows.append(Row(f"value {name}".strip(), "torch", "jax", float("inf"), 0.0, reason))

    for name in sorted(first.keys() ^ second.keys()):
        say(name, f"returned by {'torch' if name in first else 'jax'} only")
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
            say(name, f"shape {a.shape} {a.dtype} in torch, {b.shape} {b.dtype} in JAX")
        elif a.dtype.kind not in "fc" and (a != b).any():
            say(name, f"{int((a != b).sum())} of {a.size} entries differ")
    return rows


def _judge(
    prefix: str,
    inputs: Arrays,
    outputs: Arrays,
    ask_torch: Callable[..., dict[str, Any]],
    f: Callable[..., Any],
    ask_jax: Callable[..., dict[str, Any]],
    rng: np.random.Generator,
    factor: float,
) -> list[Row]:
    """Return the rows of one pair of functions of a dict of arrays."""
    outputs = {key: a for key, a in outputs.items() if a.dtype.kind in "fc"}
    tangents = {key: _random(a, rng) for key, a in inputs.items()}
    lead = 1 if prefix else 0
    weights = [_random(a, rng, inverse=True) for a in outputs.values()]
    cotangent = np.concatenate([w.reshape(*w.shape[:lead], -1) for w in weights], axis=-1)
    eps = max(float(np.finfo(a.dtype).eps) for a in inputs.values())
    size = max(_SIZE, 16 * eps) if eps > 1e-12 else _SIZE
    asks: dict[str, Any] = {"torch": functools.partial(ask_torch, f), "jax": ask_jax}
    spans = _spans(outputs, lead)

    def answers(ask: Callable[..., dict[str, Any]], at: Arrays) -> dict[str, Any]:
        return _split(ask(at, tangents, cotangent), spans)

    base = {name: answers(ask, inputs) for name, ask in asks.items()}
    moved: dict[str, list[Any]] = {name: [] for name in asks}
    for _ in range(_PERTURBATIONS):
        at = {
            key: (a * (1 + size * rng.standard_normal(a.shape))).astype(a.dtype)
            for key, a in inputs.items()
        }
        for name, ask in asks.items():
            moved[name].append(answers(ask, at))
    rows = []
    for quantity in base["torch"]:
        a, b = base["torch"][quantity], base["jax"][quantity]
        error, tolerance, reason = float("inf"), 0.0, ""
        for name, found in (("torch", a), ("jax", b)):
            if isinstance(found, Exception):
                reason = f"{name} raised {type(found).__name__}: {str(found).strip()[:200]}"
            elif not np.isfinite(found).all():
                reason = reason or f"{name}: some entries are not finite"
        if not reason:
            allowed = []
            for name, found in base.items():
                least = {quantity: _floor(quantity, found, inputs, cotangent)}
                sense = Sensitivity(found, moved[name], size, eps, least)
                one = sense.allow(quantity, Estimate(found[quantity]), factor)
                allowed += [one] if one else []
            best = min(allowed, key=lambda one: one.tolerance * one.scale)
            error = float(np.linalg.norm(a - b)) / best.scale
            tolerance, reason = best.tolerance, best.reason.replace("the oracle's", "the")
        rows.append(Row(prefix + quantity, "torch", "jax", error, tolerance, reason))
    return rows


def _floor(quantity: str, found: Arrays, inputs: Arrays, cotangent: np.ndarray) -> float:
    """Return the natural size of a derivative: tangents are of the size of the arguments."""
    kind, _, rest = quantity.partition(" ")
    name, _, output = rest.partition(" of ")
    if kind == "value":
        return 0.0
    value = found.get(f"value of {output}" if output else "value")
    if value is None or isinstance(value, Exception):
        parts = [a for key, a in found.items() if key.startswith("value")]
        value = np.concatenate([np.ravel(a) for a in parts if not isinstance(a, Exception)])
    size = float(np.linalg.norm(value))
    if kind == "jvp" and name in inputs:
        return size
    size *= float(np.linalg.norm(cotangent))
    whole = inputs.get(name.partition(" (")[0])
    return size / (float(np.linalg.norm(whole)) or 1.0) if whole is not None else size


def _spans(outputs: Arrays, lead: int) -> dict[str, slice]:
    """Return where each output lies in the vector of all of them."""
    spans, start = {}, 0
    for key, a in outputs.items():
        size = int(np.prod(a.shape[lead:]))
        spans[key] = slice(start, start + size)
        start += size
    return spans


def _split(answers: dict[str, Any], spans: dict[str, slice]) -> dict[str, Any]:
    """Give each output its own quantity, so that a small one is not lost beside a large one."""
    out = {}
    for name, a in answers.items():
        whole = isinstance(a, Exception) or len(spans) == 1
        if whole or not (name == "value" or name.startswith("jvp args")):
            out[name] = a
            continue
        for key, span in spans.items():
            out[f"{name} of {key}"] = a[..., span]
    return out


def _random(a: np.ndarray, rng: np.random.Generator, *, inverse: bool = False) -> np.ndarray:
    """Return random numbers of the size of a, or of the size of 1 / a."""
    size = float(np.sqrt(np.mean(np.abs(a) ** 2))) if a.size else 1.0
    size = 1 / (size or 1.0) if inverse else size or 1.0
    z = rng.standard_normal(a.shape)
    if a.dtype.kind == "c":
        z = z + 1j * rng.standard_normal(a.shape)
    return (z * size).astype(a.dtype)


def _members(a: np.ndarray, batch: int, rng: np.random.Generator) -> np.ndarray:
    members = [a * (1 + 0.1 * rng.standard_normal(a.shape)) for _ in range(batch)]
    return np.stack(members).astype(a.dtype)


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
