"""What XLA's CPU backend wants. Programs for other platforms are left as they are.

Measured by `python benchmarks/layers.py`; docs/pages/design.md, "What a CPU wants", tells the story.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax._typing import is_wide
from normjax.platforms import on_cpu


def separate_operands(x: Array, copies: int) -> tuple[Array, ...]:
    """Returns x several times, as arrays that the compiler takes for different ones.

    XLA's CPU reductions cast, subtract and multiply as they read, but only if no one else uses the
    result: a float32 view that two reductions share is written out first. With a copy each, batch
    norm reads bfloat16 as it is, and its forward pass is 2 to 4 times as fast.
    """

    def barriers(x: Array) -> tuple[Array, ...]:
        found = []
        for _ in range(copies):
            x = lax.optimization_barrier(x)
            found.append(x)
        return tuple(found)

    return on_cpu(barriers, lambda x: (x,) * copies, x)


def separate_if_narrow(x: Array, copies: int) -> tuple[Array, ...]:
    """Returns x several times; apart, if a reduction of it has to cast it first."""
    if is_wide(x):
        return (x,) * copies
    return separate_operands(x, copies)


def materialize(*arrays: Array) -> tuple[Array, ...]:
    """Returns small arrays, and their gradients, stored before x meets them.

    Otherwise XLA computes them again for each element of x, or makes one slow fusion of the
    reductions of x and their uses: instance norm's backward pass took twice as long. XLA does not
    fuse through a rounding, even one to the precision that the array has.
    """

    def rounded(array: Array) -> Array:
        if jnp.iscomplexobj(array):
            return array
        kind = jnp.finfo(array.dtype)
        return lax.reduce_precision(array, kind.nexp, kind.nmant)

    def stored(*arrays: Array) -> tuple[Array, ...]:
        return tuple(map(rounded, arrays))

    return on_cpu(stored, lambda *arrays: arrays, *arrays)


def without_unit_axes(step: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a step `(params, x, mask, spec)` that works on x without axes of size 1.

    XLA takes `(1, time, features)` for a batch of matrices, and sums over features of the
    derivative for products of matrices, which took 6 times as long. Other platforms do not mind.
    """

    def squeezed(params: Any, x: Array, mask: Array | None, spec: Any) -> Array:
        grouped = {spec.groups[0]} if spec.groups else set()
        ones = tuple(
            axis
            for axis, size in enumerate(x.shape)
            if size == 1 and axis not in {*spec.axes, *grouped}
        )
        if not ones:
            return step(params, x, mask, spec)
        operands = jax.tree.map(lambda operand: operand.squeeze(ones), (params, x, mask))
        return step(*operands, spec.without(ones)).reshape(x.shape)

    return squeezed
