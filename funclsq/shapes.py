"""Broadcasting of shapes.

``torch.broadcast_shapes`` does the same, but imports sympy on its first call: 0.8 s of a program
that may need nothing else of it.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["broadcast_shapes"]


def broadcast_shapes(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that all of these broadcast to.

    Raises
    ------
    ValueError
        If they do not.

    Examples
    --------
    >>> broadcast_shapes((3, 1), (), (4,))
    (3, 4)
    """
    ndim = max([len(shape) for shape in shapes] or [0])
    out = [1] * ndim
    for shape in shapes:
        first = ndim - len(shape)
        for i, size in enumerate(shape):
            if size != 1 and out[first + i] != size:
                if out[first + i] != 1:
                    raise ValueError(f"the shapes {', '.join(map(str, shapes))} do not broadcast")
                out[first + i] = size
    return tuple(out)
