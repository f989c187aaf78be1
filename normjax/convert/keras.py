"""Converts weights from and to Keras 3."""

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
    """Converts the weights of a Keras 3 layer or model to `params` and `batch_stats`.

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
    Layers of a nested model are below the name of that model, even if Keras' own paths omit it. A
    SpectralNormalization has its `u` and `sigma`, and the `kernel` below the name of the wrapped
    layer. Kernels of transposed convolutions have the layout of Flax's `transpose_kernel=True`. A
    synchronized BatchNormalization is read like any other. UnitNormalization has no weights, so the
    result is `({}, {})`. Flax's cells always have a bias, which is 0 if Keras' cell has none.
    Flax's GRUCell has one bias for the gates r and z, which is the sum of Keras' two. Flax has no
    GRU with `reset_after=False`; its arrays are passed through unchanged.

    Args:
      source: a built layer or model, a mapping from the paths of its weights (`"bn/gamma"`) to
        arrays, or the path of a .safetensors file with such names.
      like: `(params, batch_stats)` as returned by the init function of the layer or model. The
        result has this structure, and these shapes and dtypes; otherwise there is an error. For a
        mapping, `like` distinguishes kernels of depthwise convolutions from others.
      rename: new names for weights such as `"bn/gamma"`: a function from name to name, or a dict of
        names or first parts of names: `{"bn": "BatchNorm_0"}`.
      others: what to do with weights that do not belong to a known layer, such as the class token
        of a vision transformer or the slopes of PReLU. "keep", the default, passes them through
        under their own names, in `batch_stats` if Keras does not train them, since the target model
        has them, too. "refuse" raises an error that lists them. A weight that changes what a known
        layer computes (`moving_stddev` of batch renorm) always raises an error.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays, with statistics in at least float32.
      Keras does not store `sigma`; it is computed from u and the kernel.

    Raises:
      ValueError, TypeError: if weights are unknown, or missing, or do not fit each other or `like`;
        if two weights have the same name; if statistics are not finite. The error names the weight.

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
    """Converts `params` and `batch_stats` to the weights of a Keras 3 layer or model.

    It is the inverse of `from_keras`, whose docstring has the table of names.

        layer.set_weights(list(nj.convert.to_keras(params, batch_stats, like=layer).values()))

    Args:
      params: as `from_keras` returns them.
      batch_stats: as `from_keras` returns them. A `count` is dropped, since Keras has none.
      like: the built layer or model to load the weights into, or a mapping from the paths of its
        weights to arrays. The result has the same names in the same order, and the same shapes and
        dtypes; otherwise there is an error. Without `like`, kernels of depthwise convolutions stay
        in Flax's layout, and sibling modules `depthwise` and `pointwise` become one SeparableConv.
      rename: the `rename` that was passed to `from_keras`. It is called with the names in `like`.
        Without `like`, a dict is inverted.
      others: "keep" passes leaves that do not belong to a known layer through under their own
        names, "refuse" raises an error that lists them; see `from_keras`.

    Returns:
      A dict of NumPy arrays by path. Without `like`, the weights of each layer are in Keras' own
      order.

    Raises:
      ValueError, TypeError: if leaves are unknown or missing, or do not fit each other or `like`;
        if statistics are not finite. The error names the leaf.

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
    """Returns the leaves, with depthwise kernels in Flax's layout if `like` has them so."""
    shaped = dict(leaves)
    for path, leaf in leaves.items():
        if path[-1] == "kernel" and path in wanted and np.ndim(leaf.value) > 2:
            flat = depthwise(leaf.value)
            if flat.shape == tuple(wanted[path].shape):
                shaped[path] = Leaf(flat, leaf.key)
    return shaped


def _adapt(weights: Arrays, expected: Mapping[str, Entry]) -> Arrays:
    """Adds or reshapes weights that Flax's layers lack or have in another shape.

    Kernels of depthwise convolutions get two channel axes. A bias of zeros that `like` does not
    have is dropped, since Flax's recurrent cells always have one. A missing count of a
    Normalization, which Keras does not use, is taken from `like`.
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
