"""Weights from and to Keras 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._keras_layers import depthwise, is_depthwise
from normjax.convert._keras_names import BACK, Entry, decoded, encoded
from normjax.convert._keras_paths import Weight, weights_of
from normjax.convert._leaf import Leaf, Leaves
from normjax.convert._match import conform
from normjax.convert._names import unique
from normjax.convert._others import Others, check_others
from normjax.convert._rename import Rename, renamed, renamed_back
from normjax.convert._sources import Arrays, KerasLayer, Source, read_mapping, to_numpy
from normjax.convert._trees import (
    Tree,
    Trees,
    expectation,
    put_together,
    take_apart,
)


def from_keras(
    source: Source | KerasLayer,
    *,
    like: tuple[Tree, Tree] | None = None,
    rename: Rename | None = None,
    others: Others = "keep",
) -> Trees:
    """Returns `params` and `batch_stats` with the weights of a Keras 3 layer or model.

    | Keras | normjax |
    |---|---|
    | `gamma`, `beta` of Batch-, Layer- and GroupNormalization | `scale`, `bias` |
    | `moving_mean`, `moving_variance` | `mean`, `var` of `batch_stats` |
    | `scale` of RMSNormalization | `scale` |
    | `kernel`, `bias` of Dense and convolutions | `kernel`, `bias`, the arrays unchanged |
    | `kernel` of DepthwiseConv, `(*window, in, multiplier)` | `kernel`, `(*window, 1, in *
      multiplier)`, for Flax's `feature_group_count=in` |
    | `depthwise_kernel`, `pointwise_kernel`, `bias` of SeparableConv | `depthwise`, `pointwise`:
      two convolutions of Flax, the bias in the latter |
    | `vector_u` of SpectralNormalization | `u`, `sigma` of `batch_stats` |
    | `embeddings` of Embedding | `embedding` |
    | `mean`, `variance`, `count` of Normalization | `mean`, `var`, `count` of `batch_stats` |
    | LSTM, GRU, SimpleRNN | `OptimizedLSTMCell`, `GRUCell`, `SimpleCell` of Flax |
    | MultiHeadAttention | `MultiHeadDotProductAttention` of Flax: `query`, `key`, `value`, `out` |

    Trees are nested by the names of the layers, without the name of the layer or model itself.
    Layers of a model inside another are below its name, also where Keras' own paths leave it out. A
    SpectralNormalization has its `u` and `sigma`, and the `kernel` under the name of the wrapped
    layer. Kernels of transposed convolutions suit Flax's `transpose_kernel=True`. A synchronized
    BatchNormalization is read like any other. UnitNormalization has no weights: it gives
    `({}, {})`. Flax's cells always have a bias: it is 0 if Keras' cell has none. Flax's GRUCell has
    one bias for the gates r and z, the sum of Keras' two. Flax has no GRU with
    `reset_after=False`: its arrays are handed through.

    Args:
      source: a layer or model that is built, a mapping from the paths of its weights to arrays
        (`"bn/gamma"`), or the path of a .safetensors file with them.
      like: `(params, batch_stats)` as the init function of the layer, or the model, returned them.
        The result has this structure, these shapes and these dtypes, or there is an error. In a
        mapping, it tells kernels of depthwise convolutions from others.
      rename: a function from the name of a weight (`"bn/gamma"`) to the name to read it under, or a
        dict of names or beginnings of names: `{"bn": "BatchNorm_0"}`.
      others: what to do with a weight that no known layer has, such as the class token of a vision
        transformer or the slopes of PReLU. "keep" hands it through under its own name, in
        `batch_stats` if Keras does not train it. This is the default, since one such weight would
        otherwise refuse a whole model, and nothing is lost: the model that is converted to has
        it, too. "refuse" raises an error that lists all of them. A weight that changes what a known
        layer computes (batch renorm's `moving_stddev`) is always refused.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays; statistics in at least float32. Keras
      does not store `sigma`: it is computed from u and the kernel.

    Raises:
      ValueError, TypeError: for weights that no such layer has, leaves that are missing or do not
        fit together or `like`, two weights of one name, and statistics that are not finite; each
        names the weight.

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
    check_others(function, others)
    found = decoded(function, _entries(function, source, rename), others)
    leaves = unique(function, ((path, leaf.key, leaf) for path, leaf in found))
    if like is not None:
        leaves = _as_depthwise(leaves, expectation(function, like))
    return put_together(function, _with_singular_values(function, leaves), like, _key_of)


def to_keras(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    like: Mapping[str, Any] | KerasLayer | None = None,
    rename: Rename | None = None,
    others: Others = "keep",
) -> Arrays:
    """Returns the weights of a Keras 3 layer or model from `params` and `batch_stats`.

    It is the inverse of `from_keras`, which has the table of names.

        layer.set_weights(list(nj.convert.to_keras(params, batch_stats, like=layer).values()))

    Args:
      params: as `from_keras` returns them.
      batch_stats: as `from_keras` returns them. A `count` is left out: Keras has none.
      like: the layer or model to load the weights into, built, or a mapping from the paths of its
        weights to arrays. The result has its names in its order, its shapes and its dtypes, or
        there is an error. Without it, kernels of depthwise convolutions stay in Flax's layout, and
        two modules `depthwise` and `pointwise` side by side become one SeparableConv.
      rename: as `from_keras` got it: it is called with the names in `like`. Without `like`, a dict
        is read backwards.
      others: "keep" hands leaves through that no known layer has, under their own names; "refuse"
        raises an error that lists them. See `from_keras`.

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
    check_others(function, others)
    expected = {} if like is None else _entries(function, like, rename)
    leaves = take_apart(function, params, batch_stats)
    found = encoded(function, leaves, expected, others)
    weights = unique(function, found)
    if like is None:
        names = renamed_back(function, weights, rename, "/")
        return {names[key]: value for key, value in weights.items()}
    arrays = {key: entry.leaf.value for key, entry in expected.items()}
    weights = conform(function, _adapt(weights, expected), arrays)
    return {expected[key].leaf.key: value for key, value in weights.items()}


def _entries(function: str, source: Any, rename: Rename | None) -> dict[str, Entry]:
    """Returns the weights by their names below the layer or model itself."""
    if isinstance(source, KerasLayer):
        entries = {
            key: Entry(Leaf(to_numpy(function, key, variable.value), key), layer, trained)
            for key, variable, layer, trained in _weights(function, source)
        }
    else:
        arrays = read_mapping(function, source)
        entries = {key: Entry(Leaf(value, key)) for key, value in arrays.items()}
    names = renamed(function, entries, rename, "/")
    return {names[key]: entry for key, entry in entries.items()}


def _weights(function: str, layer: KerasLayer) -> list[Weight]:
    if not layer.built:
        _checks.raise_error(
            function,
            "the layer is not built, so it has no weights yet",
            expected="a layer that was called once",
            got=f"{type(layer).__name__} {layer.name!r}",
            fix="Call layer.build(x.shape) first",
        )
    return weights_of(function, layer)


def _as_depthwise(leaves: Leaves, wanted: Mapping[Path, Any]) -> Leaves:
    """Returns the leaves with kernels of depthwise convolutions in Flax's layout, if wanted so."""
    shaped = dict(leaves)
    for path, leaf in leaves.items():
        if path[-1] == "kernel" and path in wanted and np.ndim(leaf.value) > 2:
            flat = depthwise(leaf.value)
            if flat.shape == tuple(wanted[path].shape):
                shaped[path] = Leaf(flat, leaf.key)
    return shaped


def _adapt(weights: Arrays, expected: Mapping[str, Entry]) -> Arrays:
    """Returns the weights with what Flax's layers do not have, or have in another shape.

    Kernels of depthwise convolutions get their two axes of channels. A bias of zeros that is not
    expected is left out: Flax's recurrent cells always have one. The count of a Normalization,
    which Keras does not use, is taken from `like` if there is none.
    """
    adapted = {}
    for key, value in weights.items():
        if key in expected:
            adapted[key] = _with_multiplier(key, value, expected[key])
        elif not key.endswith("bias") or np.any(value):
            adapted[key] = value
    for key, entry in expected.items():
        is_count = key.endswith("count") and key.removesuffix("count") + "mean" in adapted
        if is_count and key not in adapted:
            adapted[key] = entry.leaf.value
    return adapted


def _with_multiplier(key: str, value: np.ndarray, wanted: Entry) -> np.ndarray:
    """Returns a depthwise kernel in Keras' shape `(*window, in, multiplier)`; others unchanged."""
    may_be = key.endswith("kernel") and value.ndim > 2 and 1 in value.shape[-2:]
    if may_be and (wanted.layer is None or is_depthwise(wanted.layer)):
        shape = wanted.leaf.value.shape
        if (
            len(shape) == value.ndim
            and depthwise(wanted.leaf.value).shape == depthwise(value).shape
        ):
            return value.reshape(shape)
    return value


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
