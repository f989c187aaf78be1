"""Phrases primitives for XLA's CPU backend. Programs for other platforms do not change.

Measured by `python benchmarks/layers.py`; see "Programs for CPUs" in docs/pages/design.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from normjax._typing import is_wide
from normjax.platforms import by_platform, rounded


def separate_operands(x: Array, copies: int) -> tuple[Array, ...]:
    """Returns copies of x behind an optimization barrier, so that reductions do not share them.

    XLA's CPU reductions cast, subtract and multiply as they read, but only if nothing else uses the
    result: a float32 view that two reductions share is written to memory first. With a copy for
    each, batch norm reads bfloat16 directly, and its forward pass is 2 to 4 times as fast.
    """

    def barriers(x: Array) -> tuple[Array, ...]:
        found = []
        for _ in range(copies):
            x = lax.optimization_barrier(x)
            found.append(x)
        return tuple(found)

    return by_platform(lambda x: (x,) * copies, x, cpu=barriers)


def separate_if_narrow(x: Array, copies: int) -> tuple[Array, ...]:
    """Returns x several times, as `separate_operands` if a reduction has to cast it first."""
    if is_wide(x):
        return (x,) * copies
    return separate_operands(x, copies)


def materialize(*arrays: Array) -> tuple[Array, ...]:
    """Stores small arrays, and their gradients, before they are broadcast to x's size.

    Otherwise XLA recomputes them for each element of x, or makes one slow fusion of the reductions
    of x and their uses: instance norm's backward pass took twice as long. XLA does not fuse through
    a rounding.
    """

    def stored(*arrays: Array) -> tuple[Array, ...]:
        return tuple(map(rounded, arrays))

    return by_platform(lambda *arrays: arrays, *arrays, cpu=stored)


def without_unit_axes(step: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a step `(params, x, mask, spec)` that works on x without axes of size 1.

    XLA takes `(1, time, features)` for a batch of matrices, and turns the derivative's sums over
    features into matrix products, which took 6 times as long. Other platforms do not.
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
