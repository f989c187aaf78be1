"""The types that public signatures are written in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, Protocol

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Inexact, Int, Key, Num, Shaped

Axes = int | Sequence[int]
AxisName = Hashable | Sequence[Hashable]
AxisIndexGroups = Sequence[Sequence[int]]
RunningVar = Literal["biased", "unbiased"]

Activations = Inexact[Array, "..."]
FeatureArray = Inexact[Array, "*features"]
Mask = Bool[Array, "..."]
Params = dict[str, FeatureArray]
BatchStats = dict[str, Num[Array, "..."]]
PRNGKey = Key[Array, ""] | Shaped[Array, "2"]


class Initializer(Protocol):
    """Makes an array from a key, a shape and a dtype, as those of `jax.nn.initializers` do."""

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
    "Int",
    "Mask",
    "PRNGKey",
    "Params",
    "RunningVar",
]
