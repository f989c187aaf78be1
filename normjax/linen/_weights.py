"""Code that the linen wrappers share: calls of the wrapped layer with other weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax import _checks
from normjax._typing import Params


def with_weights(
    module: Any,
    normalized: Callable[[str, jax.Array], jax.Array],
    *args: Any,
    initialize_normalized: bool = True,
    **kwargs: Any,
) -> Any:
    """Calls the wrapped layer with `normalized(path, value)` in place of each of its parameters.

    The layer initializes its parameters itself. With `initialize_normalized`, the normalized values
    are stored at initialization, as Flax does.
    """
    if module.is_initializing() and not initialize_normalized:
        _initialize(module, *args, **kwargs)

    def replaced(path: tuple, value: Any) -> jax.Array:
        inside = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        return normalized(f"{module.layer_instance.name}/{inside}", jnp.asarray(value))

    return nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        "params",
        trans_in_fn=partial(jax.tree_util.tree_map_with_path, replaced),
        init=module.is_initializing() and initialize_normalized,
    )(module.layer_instance)


def _initialize(module: Any, *args: Any, **kwargs: Any) -> None:
    """Initializes the layer's variables with the keys that it would have without the wrapper."""
    outer, inner = module.scope, module.layer_instance.scope
    if inner.parent is outer:
        # Flax derives keys from paths, and a layer inside the wrapper has a longer path. The key
        # counters are also shared; otherwise a random gain would get the key of the kernel.
        inner.rngs, inner.rng_counters = outer.rngs, outer.rng_counters
    module.layer_instance(*args, **kwargs)


def chosen(module: Any, path: str) -> bool:
    """Returns whether the filter of the module selects this parameter."""
    return not module.variable_filter or any(name in path for name in module.variable_filter)


def scales(module: Any, path: str, kernel: jax.Array) -> tuple[tuple[int, ...], Params]:
    """Returns the feature axes of a kernel, and the variable of its scale."""
    axes = () if module.feature_axes is None else module.feature_axes
    kept = _checks.axes(type(module).__name__, "feature_axes", axes, kernel.shape)
    if not module.use_scale:
        return kept, {}
    features = tuple(kernel.shape[axis] for axis in kept)
    return kept, {
        "scale": jnp.asarray(
            module.param(f"{path}/scale", module.scale_init, features, module.param_dtype)
        )
    }
