"""Value and derivatives of a JAX function, in every nesting of two modes, in torch's convention.

JAX's cotangents are the conjugates of torch's: the seeds are conjugated on the way in, the
gradients on the way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from funclsq.jax.convert import from_torch

__all__ = ["jax_answers", "x64"]

Arrays = dict[str, np.ndarray]
Function = Callable[[dict[str, Any]], Any]


def x64(on: bool) -> Any:
    """Return a context in which 64-bit numbers are on or off.

    No configuration is changed, but in JAX before 0.8: there it is that of the process for as long,
    as the context of these versions is one thread's own, and callbacks run in others.
    """
    make: Any = getattr(jax, "enable_x64", None)
    return make(on) if callable(make) else _x64_everywhere(on)


@contextlib.contextmanager
def _x64_everywhere(on: bool) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def jax_answers(
    fn: Function, only: tuple[str, ...] = ()
) -> Callable[[Arrays, Arrays, np.ndarray], dict[str, Any]]:
    """Return ``answers(inputs, tangents, cotangent)`` for ``fn``, a function of a dict of arrays.

    Arguments, result and names are those of ``_torch_side.torch_answers``; each derivative is
    compiled once. Where the data are 64-bit and ``jax_enable_x64`` is off, it is on inside the
    call only. ``only`` names the kinds wanted ("value", "vjp", ...); all unless given.
    """

    def gradient(p: dict[str, Any], x_bar: Any) -> dict[str, Any]:
        return _conj(jax.vjp(fn, p)[1](x_bar.conj())[0])

    def slope(p: dict[str, Any], along: dict[str, Any]) -> Any:
        return jax.jvp(fn, (p,), (along,))[1]

    def slopes(p: dict[str, Any], along: dict[str, Any], x_bar: Any) -> dict[str, Any]:
        zero = {key: jnp.zeros_like(t) for key, t in along.items()}
        return {key: slope(p, {**zero, key: along[key]}) for key in along}

    def hvp(p: dict[str, Any], along: dict[str, Any], x_bar: Any) -> dict[str, Any]:
        return jax.jvp(lambda q: gradient(q, x_bar), (p,), (along,))[1]

    def hvp_rr(p: dict[str, Any], along: dict[str, Any], x_bar: Any) -> dict[str, Any]:
        return _conj(jax.vjp(lambda q: gradient(q, x_bar), p)[1](_conj(along))[0])

    def hvp_rf(p: dict[str, Any], along: dict[str, Any], x_bar: Any) -> dict[str, Any]:
        return _conj(jax.vjp(lambda q: slope(q, along), p)[1](x_bar.conj())[0])

    def twice(p: dict[str, Any], along: dict[str, Any], x_bar: Any) -> Any:
        second = jax.jvp(lambda q: slope(q, along), (p,), (along,))[1]
        return {"": jnp.vdot(x_bar, second).real}

    programs = {
        "value{}": jax.jit(lambda p, along, x_bar: {"": fn(p)}),
        "jvp {}": jax.jit(slopes),
        "vjp {}": jax.jit(lambda p, along, x_bar: gradient(p, x_bar)),
        "hvp {}": jax.jit(hvp),
        "hvp {} (r/r)": jax.jit(hvp_rr),
        "hvp {} (r/f)": jax.jit(hvp_rf),
        "jvp of jvp{}": jax.jit(twice),
    }

    if only:
        programs = {form: f for form, f in programs.items() if form.strip(" {}") in only}

    def answers(inputs: Arrays, tangents: Arrays, cotangent: np.ndarray) -> dict[str, Any]:
        wide = any(a.dtype in (np.float64, np.complex128) for a in inputs.values())
        with x64(wide or jax.config.jax_enable_x64):
            p = {key: _carried(a) for key, a in inputs.items()}
            along = {key: _carried(a) for key, a in tangents.items()}
            x_bar = _carried(cotangent)
            out: dict[str, Any] = {}
            for form, program in programs.items():
                keys = list(inputs) if " {}" in form else [""]
                try:
                    found = program(p, along, x_bar)
                    out.update({form.format(key): np.asarray(found[key]) for key in keys})
                except Exception as error:  # what a candidate raises is a finding
                    out.update({form.format(key): error for key in keys})
        return out

    return answers


def _carried(a: np.ndarray) -> Any:
    return from_torch(torch.tensor(a))


def _conj(p: dict[str, Any]) -> dict[str, Any]:
    return {key: a.conj() for key, a in p.items()}
