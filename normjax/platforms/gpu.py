"""Forms of operations for XLA's GPU backends, CUDA and ROCm.

They were derived from compiled programs by `python benchmarks/gpu_static.py`; see "Programs
for GPUs" in docs/pages/design.md.
"""

from __future__ import annotations

import math

from jax import lax
from jaxtyping import Array

SAMPLED = 32  # at least one of this many elements is sampled


def sample(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns the first part of x along the reduced axes, at least one element of 32.

    The elements are contiguous in memory. The first reduced axis is sliced only if there is no
    other one, since examples may be sharded, and devices would have to exchange the sample. If
    sizes are symbolic, the sample is x.
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
    """Returns whether exactly the last axes are reduced, for which XLA has special kernels."""
    return axes == tuple(range(x.ndim - len(axes), x.ndim))
