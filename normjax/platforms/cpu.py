"""Forms of operations for XLA's CPU backend. Programs for other platforms do not change.

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
    """Returns copies of x behind an optimization barrier, one for each reduction.

    XLA's CPU backend fuses casts, subtractions and products into a reduction, but only if nothing
    else uses the result: a float32 view that two reductions share is written to memory first. With
    a copy for each reduction, batch norm reads bfloat16 directly, and its forward pass is 2 to 4
    times as fast.
    """

    def barriers(x: Array) -> tuple[Array, ...]:
        found = []
        for _ in range(copies):
            x = lax.optimization_barrier(x)
            found.append(x)
        return tuple(found)

    return by_platform(lambda x: (x,) * copies, x, cpu=barriers)


def separate_if_narrow(x: Array, copies: int) -> tuple[Array, ...]:
    """Returns x several times; as separate copies if a reduction has to cast it first."""
    if is_wide(x):
        return (x,) * copies
    return separate_operands(x, copies)


def materialize(*arrays: Array) -> tuple[Array, ...]:
    """Materializes small arrays and their gradients before they are broadcast to x's size.

    Otherwise, XLA recomputes them for each element of x, or fuses the reductions of x with their
    uses into one slow loop: the backward pass of instance norm took twice as long. XLA does not
    fuse through the rounding used here.
    """

    def stored(*arrays: Array) -> tuple[Array, ...]:
        return tuple(map(rounded, arrays))

    return by_platform(lambda *arrays: arrays, *arrays, cpu=stored)


def without_unit_axes(step: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a step `(params, x, mask, spec)` that removes axes of size 1 from x.

    XLA treats `(1, time, features)` as a batch of matrices, and converts the sums over features in
    the derivative to matrix products, which took 6 times as long. Other platforms do not do so.
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
