"""The layers of the library, each described once for the tests that hold for all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import normjax as nj


class Layer(NamedTuple):
    """What the generic tests need to know of a layer.

    Attributes:
      name: as in `nj.<name>`.
      init: from the number of features to `(params, batch_stats)`.
      apply: `(params, batch_stats, x, train, **settings) -> (y, batch_stats)`.
      settings: keyword arguments to run every test with, by the name of the variant.
      has_statistics: whether there are batch statistics to update.
      safe_far_from_zero: whether y of `N(1e4, 1)` has a standard deviation of 1.
    """

    name: str
    init: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    apply: Callable[..., tuple[Any, dict[str, Any]]]
    settings: dict[str, dict[str, Any]]
    has_statistics: bool
    safe_far_from_zero: bool


LAYERS = [
    Layer(
        "batch_norm",
        nj.batch_norm_init,
        nj.batch_norm,
        {
            "plain": {},
            "masked": {"mask": np.array([True, True, False, True, True, True])[:, None, None]},
            "ghosts": {"virtual_batch_size": 3},
            "cumulative": {"momentum": None, "running_var": "unbiased"},
        },
        has_statistics=True,
        safe_far_from_zero=True,
    ),
]

FEATURES, SHAPE = 3, (6, 4, 3)


def arguments(layer, settings, rng, dtype=jnp.float32):
    """Parameters and statistics away from their start, and x of `SHAPE`, all of the dtype."""
    count = {"count": True} if settings.get("momentum", 0) is None else {}
    params, batch_stats = layer.init(FEATURES, param_dtype=dtype, **count)
    params = {leaf: value + jnp.asarray(rng.normal(size=value.shape), dtype) for leaf, value in params.items()}
    for leaf, value in batch_stats.items():
        if jnp.issubdtype(value.dtype, jnp.inexact):
            batch_stats[leaf] = value + jnp.asarray(rng.random(value.shape), value.dtype)
    return params, batch_stats, jnp.asarray(rng.normal(2, 1.5, SHAPE), dtype)
