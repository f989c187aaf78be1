"""Weights from and to Keras 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._sources import Arrays, KerasLayer, Source, conform, read_mapping, to_numpy
from normjax.convert._trees import (
    Leaf,
    Leaves,
    Tree,
    Trees,
    modules_of,
    put_together,
    raise_unknown,
    take_apart,
)

PARAMS = {"gamma": "scale", "scale": "scale", "beta": "bias", "bias": "bias", "kernel": "kernel"}
PARAMS |= {"embeddings": "embedding"}
STATISTICS = {"moving_mean": "mean", "moving_variance": "var", "vector_u": "u"}
KNOWN = PARAMS | STATISTICS
BACK = {  # in Keras' own order
    "kernel": ("kernel",),
    "embedding": ("embeddings",),
    "scale": ("gamma", "scale"),
    "bias": ("beta", "bias"),
    "mean": ("moving_mean",),
    "var": ("moving_variance",),
    "u": ("vector_u",),
}


def from_keras(source: Source | KerasLayer, *, like: tuple[Tree, Tree] | None = None) -> Trees:
    """Returns `params` and `batch_stats` with the weights of a Keras 3 layer or model.

    | Keras | normjax |
    |---|---|
    | `gamma`, `beta` of Batch-, Layer- and GroupNormalization | `scale`, `bias` |
    | `moving_mean`, `moving_variance` | `mean`, `var` of `batch_stats` |
    | `scale` of RMSNormalization | `scale` |
    | `kernel`, `bias` of Dense and convolutions | `kernel`, `bias`, the arrays unchanged |
    | `vector_u` of SpectralNormalization | `u`, `sigma` of `batch_stats` |
    | `embeddings` of Embedding | `embedding` |

    Trees are nested by the names of the layers, without the name of the layer or model itself. A
    SpectralNormalization has its `u` and `sigma`, and the `kernel` under the name of the wrapped
    layer. Kernels of transposed convolutions suit Flax's `transpose_kernel=True`. A synchronized
    BatchNormalization is read like any other. UnitNormalization has no weights: it gives
    `({}, {})`.

    Args:
      source: a layer or model that is built, a mapping from the paths of its weights to arrays
        (`"bn/gamma"`), or the path of a .safetensors file with them.
      like: `(params, batch_stats)` as the init function of the layer, or the model, returned them.
        The result has this structure, these shapes and these dtypes, or there is an error.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays; statistics in at least float32. Keras
      does not store `sigma`: it is computed from u and the kernel.

    Raises:
      ValueError, TypeError: for weights that no such layer has, leaves that are missing or do not
        fit together or `like`, and statistics that are not finite; each names the weight.

    Example:
      >>> import numpy as np, normjax as nj
      >>> weights = {"bn/gamma": np.ones(2), "bn/moving_mean": np.array([1.0, 2.0])}
      >>> weights["bn/moving_variance"] = np.ones(2)
      >>> params, batch_stats = nj.convert.from_keras(weights)
      >>> print(params["bn"]["scale"], batch_stats["bn"]["mean"])
      [1. 1.] [1. 2.]

    References:
      `keras.layers.BatchNormalization` and the other normalization layers in Keras' documentation.
    """
    function = "from_keras"
    leaves: Leaves = {}
    for key, value in _weights(function, source).items():
        *parts, name = key.split("/")
        if name not in KNOWN:
            raise_unknown(function, Leaf(value, key), KNOWN)
        collection = "params" if name in PARAMS else "batch_stats"
        leaves[collection, *parts, KNOWN[name]] = Leaf(value, key)
    return put_together(function, _with_singular_values(function, leaves), like, _key_of)


def to_keras(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    like: Mapping[str, Any] | KerasLayer | None = None,
) -> Arrays:
    """Returns the weights of a Keras 3 layer or model from `params` and `batch_stats`.

    It is the inverse of `from_keras`, which has the table of names.

        layer.set_weights(list(nj.convert.to_keras(params, batch_stats, like=layer).values()))

    Args:
      params: as `from_keras` returns them.
      batch_stats: as `from_keras` returns them. A `count` is left out: Keras has none.
      like: the layer or model to load the weights into, built, or a mapping from the paths of its
        weights to arrays. The result has its names in its order, its shapes and its dtypes, or
        there is an error.

    Returns:
      A dict of NumPy arrays by path. Without `like`, each layer's are in Keras' own order.

    Raises:
      ValueError, TypeError: for leaves that are unknown, missing or do not fit together or `like`,
        and statistics that are not finite; each names the leaf.

    Example:
      >>> import normjax as nj
      >>> print(list(nj.convert.to_keras(*nj.batch_norm_init(2))))
      ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """
    function = "to_keras"
    expected = None if like is None else _weights(function, like)
    weights: Arrays = {}
    for parts, leaves in modules_of(take_apart(function, params, batch_stats)).items():
        for name, leaf in leaves.items():
            if name not in (*BACK, "count", "sigma"):
                raise_unknown(function, leaf, BACK)
        for name in BACK:
            if name in leaves:
                names = BACK[name][::-1] if "kernel" in leaves else BACK[name]
                keys = ["/".join((*parts, name)) for name in names]
                key = next((key for key in keys if expected and key in expected), keys[0])
                weights[key] = leaves[name].value
    return weights if expected is None else conform(function, weights, expected)


def _weights(function: str, source: Any) -> Arrays:
    """Returns the weights by path, without the name of the layer or model itself."""
    if not isinstance(source, KerasLayer):
        return read_mapping(function, source)
    if not source.built:
        _checks.raise_error(
            function,
            "the layer is not built, so it has no weights yet",
            expected="a layer that was called once",
            got=f"{type(source).__name__} {source.name!r}",
            fix="Call layer.build(x.shape) first",
        )
    prefix = f"{source.name}/"
    return {
        weight.path.removeprefix(prefix): to_numpy(function, weight.path, weight.value)
        for weight in source.weights
    }


def _with_singular_values(function: str, leaves: Leaves) -> Leaves:
    """Adds the sigma beside each u, from the kernel of the wrapped layer."""
    found = dict(leaves)
    for path, u in leaves.items():
        if path[-1] != "u":
            continue
        wrapper = ("params", *path[1:-1])
        inside = [
            leaf.value
            for other, leaf in leaves.items()
            if other[: len(wrapper)] == wrapper and other[-1] in ("kernel", "embedding")
        ]
        if len(inside) != 1 or inside[0].shape[-1:] != u.value.shape[-1:]:
            _checks.raise_error(
                function,
                f"{u.key!r} does not fit the kernel of its layer",
                expected=f"one kernel with {u.value.shape[-1]} features",
                got=f"kernels of shapes {[kernel.shape for kernel in inside]}",
                fix="Pass the weights of the wrapped layer, too",
            )
        matrix = inside[0].reshape(-1, u.value.shape[-1])
        v = matrix @ u.value[0]
        norm = np.linalg.norm(v)
        next_u = (v / (norm or 1)) @ matrix
        found[(*path[:-1], "sigma")] = Leaf(np.linalg.norm(next_u).astype(u.value.dtype), u.key)
    return found


def _key_of(path: Path) -> str:
    return "/".join((*path[1:-1], BACK.get(path[-1], path[-1:])[0]))
