"""Types of public signatures, and the promotion of dtypes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import reduce
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Key, Num, Shaped

Axes = int | Sequence[int]
AxisName = Hashable | Sequence[Hashable]
AxisIndexGroups = Sequence[Sequence[int]]
RunningVar = Literal["biased", "unbiased"]

Activations = Inexact[Array, "..."]
Kernel = Inexact[Array, "..."]
FeatureArray = Inexact[Array, "*features"]
Mask = Bool[Array, "..."] | Float[Array, "..."]
Params = dict[str, Inexact[Array, "..."]]
BatchStats = dict[str, Num[Array, "..."]]
WIDE = frozenset(map(np.dtype, ("float32", "float64", "complex64", "complex128")))
PRNGKey = Key[Array, ""] | Shaped[Array, "2"]


def promote(*dtypes: DTypeLike) -> np.dtype:
    """Returns the promoted dtype, also under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        try:
            return reduce(jnp.promote_types, dtypes, jnp.dtype(dtypes[0]))
        except jax.dtypes.TypePromotionError:  # JAX does not promote floats of 8 bits or fewer
            wider = [_at_least_16_bits(dtype) for dtype in dtypes]
            return reduce(jnp.promote_types, wider, wider[0])


def _at_least_16_bits(dtype: DTypeLike) -> np.dtype:
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16
    return jnp.dtype(jnp.bfloat16 if narrow else dtype)


def admissible(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns x in a dtype that the functions accept: integers as floats; complex if y is."""
    wanted = jnp.complexfloating if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.inexact
    return x if jnp.issubdtype(x.dtype, wanted) else x.astype(promote(dtype, jnp.float32))


def widen(x: jax.Array) -> jax.Array:
    """Casts to the precision of statistics, which is at least float32."""
    return x if x.dtype in WIDE else x.astype(jnp.float32)


def is_weight(mask: jax.Array | None) -> TypeGuard[jax.Array]:
    """Returns whether the mask contains real weights instead of bools."""
    return mask is not None and jnp.issubdtype(mask.dtype, jnp.floating)


def as_mask(mask: Any) -> Any:
    """Returns a mask of bools or real weights; the adapters accept integers, as Flax does."""
    if mask is None or jnp.issubdtype(jnp.result_type(mask), jnp.floating):
        return mask
    return jnp.asarray(mask, bool)


def is_wide(x: jax.Array) -> bool:
    """Returns whether x has at least the precision of float32."""
    return x.dtype in WIDE


@runtime_checkable
class Initializer(Protocol):
    """A function from a key, a shape and a dtype to an array, as in `jax.nn.initializers`."""

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Array: ...


__all__ = [
    "Activations",
    "Array",
    "Axes",
    "AxisIndexGroups",
    "AxisName",
    "BatchStats",
    "DTypeLike",
    "FeatureArray",
    "Initializer",
    "Kernel",
    "Mask",
    "PRNGKey",
    "Params",
    "RunningVar",
    "admissible",
    "as_mask",
    "is_weight",
    "is_wide",
    "promote",
    "widen",
]
