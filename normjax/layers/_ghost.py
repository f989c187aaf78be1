"""Ghost batches: slices of the batch that are normalized each by statistics of their own (Hoffer et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from normjax import _checks
from normjax._typing import Params


def count_slices(function: str, x: Array, axes: tuple[int, ...], size: int | None) -> int:
    """Returns how many slices of `size` examples axis 0 has (None: one, of all); refuses a remainder."""
    if size is None:
        return 1
    examples, positive = x.shape[0], _checks.positive_int(size)
    if positive is None or examples % positive:
        _checks.raise_error(
            function,
            "the examples do not divide into ghost batches",
            expected="a positive virtual_batch_size that divides the number of examples",
            got=f"virtual_batch_size={size!r} and {examples} examples for x.shape={x.shape}",
            fix="Choose a divisor, or drop the last, smaller batch",
        )
    if 0 not in axes:
        _checks.raise_error(
            function,
            "virtual_batch_size cuts axis 0, which is a feature axis",
            expected="examples along axis 0",
            got=f"virtual_batch_size={size} and reduced axes {axes} for x.shape={x.shape}",
            fix="Move the examples to axis 0: jnp.moveaxis(x, batch_axis, 0)",
        )
    return examples // size


def cut(
    x: Array, mask: Array | None, params: Params, axes: tuple[int, ...], size: int
) -> tuple[Array, Array | None, Params, tuple[int, ...]]:
    """Cuts axis 0 into slices; a new axis 0, which acts as one more feature axis, counts them.

    Returns x, the mask, params (which have the rank of x) and the reduced axes, all with the new
    axis.
    """

    def slices(part: Array) -> Array:
        return part[None] if part.shape[0] == 1 else part.reshape(-1, size, *part.shape[1:])

    params = {leaf: slices(value) for leaf, value in params.items()}
    return (
        slices(x),
        None if mask is None else slices(mask),
        params,
        tuple(axis + 1 for axis in axes),
    )


def lies_on_explicit_axes(x: Array) -> bool:
    """Whether the type of x tells how it is sharded."""
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def laid_out_by_the_compiler(
    step: Callable[..., Any], outputs: PyTree[Array]
) -> Callable[..., Any]:
    """Returns a step that types its results as `outputs`, of which the first lies on Explicit axes, and nothing within.

    JAX's types cannot say how slices that span devices, or parts of them, are sharded. The compiler
    knows.
    """
    mesh = jax.typeof(jax.tree.leaves(outputs)[0]).sharding.mesh
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), outputs
    )
    return jax.sharding.auto_axes(step, out_sharding=shardings)
