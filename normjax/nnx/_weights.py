"""Code that the nnx wrappers share: calls of the wrapped layer with other weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype

from normjax import _checks
from normjax._typing import Params, admissible

Path = tuple[Any, ...]
KERNEL = nnx.PathContains("kernel")


def with_weights(
    layer: Any, normalized: Callable[[Path, nnx.Param], jax.Array | None], *args: Any, **kwargs: Any
) -> Any:
    """Calls a copy of the layer with `normalized(path, weight)` in place of each parameter.

    If `normalized` returns None, the parameter stays as it is. The copy shares all other variables
    with the layer, so running statistics are updated in both.
    """

    def replaced(path: Path, variable: Any) -> Any:
        value = normalized(path, variable) if isinstance(variable, nnx.Param) else None
        return variable if value is None else variable.copy(value=value)

    graphdef, state = nnx.split(layer)
    flat = [(path, replaced(path, variable)) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))(*args, **kwargs)


def features(norm: Any, kernel: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the feature axes of a kernel, and their sizes."""
    kept = _checks.axes(type(norm).__name__, "feature_axes", norm.feature_axes, kernel.shape)
    return kept, tuple(kernel.shape[axis] for axis in kept)


def scaled(norm: Any, path: Path, kernel: jax.Array) -> tuple[Params, jax.Array, Any]:
    """Returns the scale, the kernel in a dtype that the functions accept, and the dtype of w."""
    params = {"scale": known(norm, norm.scales, path)[...]} if norm.use_scale else {}
    dtype = canonicalize_dtype(kernel, *params.values(), dtype=norm.dtype)
    return params, admissible(kernel, dtype), dtype


def known(norm: Any, variables: Any, path: Path) -> nnx.Variable:
    """Returns the variable of a weight.

    Raises an error for a weight that the layer did not have when it was wrapped.
    """
    if path not in variables:
        _checks.raise_error(
            type(norm).__name__,
            "the wrapped layer has a parameter that it did not have when it was wrapped",
            expected=f"parameters among {sorted(map(str, variables))}",
            got=f"{path}",
            fix="Wrap the layer once it is complete",
            kind=RuntimeError,
        )
    return variables[path]
