"""Platform-specific forms of operations, which XLA compiles to faster programs.

Mathematically, every function here is the identity. The form depends on the platform for which a
program is lowered, not on the one that traces it. So exported and ahead-of-time compiled programs
get the form of the platform that they run on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from normjax._typing import is_wide
from normjax.platforms.plain import PLAIN

SMALL = 2**15  # elements

Phrasing = Callable[..., Any]


def by_platform(
    elsewhere: Phrasing, *operands: Any, cpu: Phrasing | None = None, gpu: Phrasing | None = None
) -> Any:
    """Returns `cpu(*operands)` or `gpu(*operands)` (CUDA, ROCm) in programs for these platforms.

    On all other platforms, or if a function is missing, it returns `elsewhere(*operands)`.
    """
    if PLAIN.value:
        return elsewhere(*operands)
    phrasings = {"cpu": cpu, "cuda": gpu, "rocm": gpu}
    given = {platform: each for platform, each in phrasings.items() if each is not None}
    return lax.platform_dependent(*operands, default=elsewhere, **given)


def rounded(x: Array) -> Array:
    """Rounds x to its own precision. This does nothing, but XLA moves no arithmetic across it."""
    if jnp.iscomplexobj(x):
        return lax.complex(rounded(x.real), rounded(x.imag))
    kind = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


def one_device() -> bool:
    """Returns whether JAX has a single device, so that no array can be sharded.

    Otherwise a branch may need communication: its predicate reads values of all examples, which is
    an all-reduce if examples are sharded.
    """
    return jax.device_count() == 1


@custom_vmap
def all_true(values: Array) -> Array:
    """Returns whether all are True; under vmap, a single result for all examples together.

    With a predicate per example, `lax.cond` would become a `select`, which runs both branches.
    """
    return jnp.all(values)


@all_true.def_vmap
def _all_true_of_all(axis_size: int, in_batched: list[bool], values: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return all_true(values), False


def unless_mapped(function: Phrasing, mapped: Phrasing) -> Phrasing:
    """Returns `function`, but under vmap the vmap of `mapped`, which computes the same values."""
    chosen = custom_vmap(function)

    @chosen.def_vmap
    def over_examples(axis_size: int, in_batched: Any, *operands: Any) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
        results = jax.vmap(mapped, axes, axis_size=axis_size)(*operands)
        return results, jax.tree.map(lambda _: True, results)

    return chosen


def is_small(x: Array) -> bool:
    """Returns whether a branch costs more time than the pass it saves, on a single device.

    Branches also take half of the compilation time of a batch norm.
    """
    size = x.size
    return one_device() and is_wide(x) and isinstance(size, int) and size <= SMALL
