"""Phrases primitives for XLA's GPU backend, of CUDA and ROCm.

Read off compiled programs by `python benchmarks/gpu_static.py`; see "Programs for GPUs" in
docs/pages/design.md.
"""

from __future__ import annotations

import math

from jax import lax
from jaxtyping import Array

SAMPLED = 32  # at least one element in so many


def sample(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns a part of x: at least one element in 32 along the reduced axes, the first ones.

    They lie together in memory. The first reduced axis is cut only if there is no other: examples
    may be sharded, and devices would have to exchange the sample. Where sizes are unknown, it is x.
    """
    left, sizes = SAMPLED, list(x.shape)
    for axis in axes[1:] or axes:
        size = sizes[axis]
        if not isinstance(size, int):
            return x
        sizes[axis] = math.ceil(size / left)
        left = left * sizes[axis] // max(size, 1)
    return lax.slice(x, [0] * x.ndim, sizes)


def reduces_rows(x: Array, axes: tuple[int, ...]) -> bool:
    """Returns whether the last axes are reduced, and no others: XLA has kernels for these alone."""
    return axes == tuple(range(x.ndim - len(axes), x.ndim))
