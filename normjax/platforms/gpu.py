"""Phrases primitives for XLA's GPU backend, of CUDA and ROCm.

Read off compiled programs by `python benchmarks/gpu_static.py`; see "What a GPU wants" in
docs/pages/design.md.
"""

from __future__ import annotations

from jax import lax
from jaxtyping import Array

SAMPLED = 16  # at least one element in so many


def sample(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns a part of x: at least one element in 16 along the reduced axes, evenly spaced.

    It is cut out of the last axes, and out of the first one only if there is no other: examples may
    be sharded, and devices would have to exchange the sample. Where sizes are not known, it is x.
    """
    left, strides = SAMPLED, [1] * x.ndim
    for axis in reversed(axes[1:] or axes):
        size = x.shape[axis]
        if not isinstance(size, int):
            return x
        strides[axis] = max(1, min(size, left))
        left //= strides[axis]
    return lax.slice(x, [0] * x.ndim, x.shape, strides)


def reduces_rows(x: Array, axes: tuple[int, ...]) -> bool:
    """Returns whether the last axes are reduced, and no others: XLA has kernels for these alone."""
    return axes == tuple(range(x.ndim - len(axes), x.ndim))
