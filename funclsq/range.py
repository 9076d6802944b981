"""Powers of two that keep a solve inside the range of its dtype.

With A' = alpha A, D' = alpha D, c' = gamma c and g' = alpha gamma g,

    (A'^H A' + D'^2)^+ (A'^H c' + g') = (gamma / alpha) (A^H A + D^2)^+ (A^H c + g),

so that no solver has to guard its squares and products. Powers of two change no digit, and
nothing is done unless the data is extreme.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq.extent import extent, largest
from funclsq.norms import column_norms, column_sizes

__all__ = [
    "column_range",
    "exponent",
    "extreme",
    "power",
    "representable",
    "safe_norm",
    "scaled_norm",
    "shifted",
    "within",
]


def exponent(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """e with max |t| in [2^(e-1), 2^e) over these dimensions; 0 where that is 0 or not finite."""
    size = torch.view_as_real(t.resolve_conj()).abs().amax(-1) if t.is_complex() else t.abs()
    if any(size.shape[d] == 0 for d in dims):
        shape = [s for d, s in enumerate(size.shape) if d - size.ndim not in dims]
        return torch.zeros(shape, dtype=torch.int32, device=t.device)
    top = size.amax(dims)
    # frexp is wrong for subnormal numbers on some platforms
    tiny = torch.finfo(top.dtype).tiny
    small = top < tiny
    lift = -2 * round(torch.finfo(top.dtype).eps ** -0.5).bit_length()
    e = torch.frexp(torch.where(small, top * 2.0**-lift, top))[1] + torch.where(small, lift, 0)
    return torch.where((top > 0) & torch.isfinite(top), e, 0).to(torch.int32)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    """Exponents from which on squares are in danger, and the largest that is shifted by."""
    return (250, 1020) if torch.finfo(dtype).bits == 64 else (20, 126)


def extreme(e: Tensor, dtype: torch.dtype) -> bool:
    """Whether squares of such numbers, or of fractions of them, leave the range."""
    return bool((e.abs() > _limits(dtype)[0]).any())


def column_range(v: Tensor) -> tuple[float, float]:
    """Smallest and largest of the columns' largest |entries|, v (..., m, k); NaN if any is NaN."""
    if v.numel() == 0:
        return 1.0, 1.0
    if v.shape[-2] == v.numel():
        top = largest(v)
        return top, top
    return extent(column_sizes(v))


def within(sizes: tuple[float, float], dtype: torch.dtype) -> bool:
    """Whether sizes, from lowest to highest, are far from where squares leave the range."""
    bound = 2.0 ** _limits(dtype)[0]
    return sizes[0] > 1 / bound and sizes[1] < bound


def shifted(t: Tensor, e: Tensor) -> Tensor:
    """t 2^e, in two steps, since 2^e alone may overflow; e broadcasts against t."""
    dtype = t.real.dtype if t.is_complex() else t.dtype
    half = torch.div(e, 2, rounding_mode="floor")
    one = torch.ones_like(e, dtype=dtype)
    return t * torch.ldexp(one, half) * torch.ldexp(one, e - half)


def representable(e: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest exponent of which 2^e, the next to be multiplied by, is a normal number."""
    limit = _limits(dtype)[1]
    return e.clamp(-limit, limit)


def power(e: Tensor, dtype: torch.dtype) -> Tensor:
    """2^e."""
    return torch.ldexp(torch.ones_like(e, dtype=dtype), e)


def safe_norm(v: Tensor) -> Tensor:
    """||v|| over rows, (..., m, k) -> (..., k), right wherever it can be represented."""
    norm = column_norms(v)
    if norm.numel() == 0 or within(extent(norm), norm.dtype):  # then no square that matters is lost
        return norm
    return scaled_norm(v)


def scaled_norm(v: Tensor) -> Tensor:
    """The same by scaling whatever v is, without waiting for a device."""
    e = exponent(v, (-2,))
    return shifted(column_norms(shifted(v, -e.unsqueeze(-2))), e)
