"""Converts weights from and to PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normjax import _checks
from normjax._trees import Path
from normjax.convert import _torch_layers
from normjax.convert._leaf import COLLECTIONS, Leaf, Leaves
from normjax.convert._match import conform
from normjax.convert._names import unique
from normjax.convert._others import Others, check_others, refuse
from normjax.convert._rename import Rename
from normjax.convert._sources import Arrays, Source, TorchModule, read_mapping
from normjax.convert._torch_encode import (
    adapt,
    encode_all,
    encode_group,
    like_the_given,
    rename_back,
    taken,
)
from normjax.convert._torch_features import Flattened
from normjax.convert._torch_groups import RENAMED, WEIGHTS, is_float
from normjax.convert._torch_layout import read_layout
from normjax.convert._trees import (
    Tree,
    Trees,
    expectation,
    put_together,
    take_apart,
)


def from_torch(
    source: Source | TorchModule,
    *,
    like: tuple[Tree, Tree] | None = None,
    rename: Rename | None = None,
    others: Others = "keep",
    flattened: Flattened | None = None,
    example_input: Any = None,
) -> Trees:
    """Converts the weights of a PyTorch layer or network to `params` and `batch_stats`.

    | torch | normjax |
    |---|---|
    | `weight`, `bias` of a normalization layer | `scale`, `bias` |
    | `running_mean`, `running_var` | `mean`, `var` of `batch_stats` |
    | `num_batches_tracked` | `count` of `batch_stats` |
    | `weight`, `bias` of Linear and ConvNd | `kernel`, `bias` |
    | `weight` of Embedding | `embedding` |
    | `weight_g`, `weight_v` of weight_norm | `scale`, `kernel` |
    | `weight_orig` of spectral_norm | `kernel` |
    | `weight_u`, `weight_v` of spectral_norm | `u`, `sigma` of `batch_stats` |
    | `weight` of PReLU, of a module | `negative_slope` |
    | LSTM, GRU, RNN and their cells | OptimizedLSTMCell, GRUCell, SimpleCell of Flax |
    | MultiheadAttention | MultiHeadDotProductAttention of Flax |
    | any other parameter, such as `cls_token` | the same name and values |
    | any other buffer, or integers | the same name and values, in `batch_stats` |

    A weight `(out, in, *window)` becomes a kernel `(*window, in, out)`. ConvTransposeNd has weights
    `(in, out, *window)`; they become kernels `(*window, out, in)` for Flax's
    `transpose_kernel=True`. weight_norm and spectral_norm are supported both as hooks and as
    parametrizations. The weights `(in, out)` of Hugging Face's Conv1D are already laid out as
    kernels.

    An LSTM, GRU or RNN with one layer becomes one cell in its place. The cells of several layers or
    directions are nested below it as `l0`, `l0_reverse`, `l1`, or at the paths of the cells in
    `like`. If Flax has one bias where PyTorch has two, they are added. An LSTM with `proj_size` has
    no counterpart in Flax, and is not converted. Attention has kernels `(in, heads, size)`. The
    number of heads is read from the module or from `like`; without both, the kernels are matrices
    that you have to reshape.

    Trees are nested by the names of the modules: `layer1.0.bn1.weight` becomes
    `params["layer1"]["0"]["bn1"]["scale"]`.

    If images `(C, H, W)` are flattened before a Linear layer, Flax has the features in another
    order, (H, W, C), and the rows of the kernel have to be permuted. This is automatic if you pass
    a module with a Flatten, and `like` of the Flax model. If the module calls `x.view` or
    `x.flatten` itself, pass `flattened` or `example_input`; there is a warning if the sizes suggest
    flattening. Norms between Flatten and Linear are permuted, too, and so are the outputs of a
    Linear layer before an Unflatten.

    In a mapping, shapes do not determine whether a square matrix belongs to a Linear or to a
    Conv1D. It is read as a Linear, unless other matrices with the same last name, such as `c_proj`,
    have the shape of a Conv1D. There is a warning if the mapping has a Conv1D. If you pass a
    module, its classes determine this.

    To continue training, you also need the settings of the layers: the momentum of normjax is 1
    minus that of PyTorch, and PyTorch's running variance is unbiased. `torch_settings` reads these
    settings from a module.

    Args:
      source: a module, its `state_dict()`, a mapping from its keys to arrays (NumPy arrays are
        enough), or the path of a .safetensors file.
      like: `(params, batch_stats)` as returned by the init function of the layer or model; leaves
        are arrays or `jax.ShapeDtypeStruct`. The result has this structure, and these shapes and
        dtypes; otherwise, an error lists all differences. A `count` that `like` does not have is
        left out, and so are integers that do not belong to a layer, such as tables of positions. A
        matrix is reshaped if `like` has several axes for its inputs or outputs, as DenseGeneral
        has. Without `like`, embeddings in a mapping, and scales of several axes without a bias, are
        read as kernels.
      rename: new names for keys of the source, such as `layer1.0.bn1.weight`: a function from key
        to key, or a table of keys or of their first parts, up to a dot: `{"layer1.0": "layer1_0",
        "module": ""}`. The longest matching entry applies; an empty old name, as in `{"":
        "backbone"}`, matches every key.
      others: what to do with arrays that do not belong to a known layer, such as position
        embeddings, class tokens or layer scales. "keep", the default, passes them through
        unchanged, since most networks have some, and they need no conversion. "refuse" raises an
        error that lists them.
      flattened: the shape `(C, H, W)` of the array that is flattened before a layer, by the name of
        the layer, such as `{"fc": (256, 6, 6)}`. With None instead of a shape, the features keep
        their order.
      example_input: a tensor, or a tuple of arguments. The module is run on it once, in evaluation
        mode, to find where it flattens images. `flattened` is not needed then.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays in the dtypes of the source; statistics
      in at least float32, `count` in int32. `u` is the vector from which PyTorch's power iteration
      starts. With hooks, this is u, `(1, out)`, for `feature_axes=-1`. With parametrizations, this
      is v, for which `feature_axes` are all other axes, unless `like` has the shape for hooks.
      `sigma` belongs to the stored vectors: at inference, PyTorch's weight is `kernel / sigma`.

    Raises:
      ValueError, TypeError: if leaves are missing, or do not fit each other or `like`; if two keys
        would become one leaf; if features are flattened in an unknown order; if statistics are not
        finite. The error names the keys. If names only differ by a prefix or in their separators,
        the error shows the `rename` to pass.

    Example:
      >>> import numpy as np, normjax as nj
      >>> state = {"weight": np.ones(2), "bias": np.zeros(2), "running_mean": np.array([1.0, 2.0]),
      ...          "running_var": np.ones(2), "num_batches_tracked": np.array(7)}
      >>> params, batch_stats = nj.convert.from_torch(state)
      >>> print(sorted(params), batch_stats["mean"], batch_stats["count"])
      ['bias', 'scale'] [1. 2.] 7
      >>> state = {"module.norm.weight": np.ones(2), "module.cls_token": np.zeros((1, 1, 2))}
      >>> names = {"module": "", "module.norm": "LayerNorm_0"}
      >>> params, _ = nj.convert.from_torch(state, rename=names)
      >>> print(params["LayerNorm_0"]["scale"], params["cls_token"].shape)
      [1. 1.] (1, 1, 2)

    References:
      `torch.nn.BatchNorm2d`, `torch.nn.utils.parametrizations.weight_norm` and `.spectral_norm` in
      PyTorch's documentation.
    """
    function = "from_torch"
    check_others(function, others)
    wanted = None if like is None else expectation(function, like)
    layout = read_layout(
        function,
        source,
        _arrays(function, source),
        like=wanted,
        rename=rename,
        flattened=flattened,
        example_input=example_input,
    )
    if layout.others and others == "refuse":
        refuse(function, layout.others.values(), [*RENAMED, *WEIGHTS], others)
    found: list[tuple[Path, str, Leaf]] = []
    for layer in layout.groups:
        for inside, leaf in layout.decode(layer).items():
            found.append((layout.path(layer.module, inside, leaf.key), leaf.key, leaf))
    kept = {key: layout.path_of_other(key) for key in layout.others}
    found += [(path, key, layout.others[key]) for key, path in kept.items()]
    leaves = unique(function, found)
    if wanted is not None:
        constants = {path for key, path in kept.items() if not is_float(layout.others[key].value)}
        leaves = _fit(leaves, wanted, constants)
    return put_together(function, leaves, like, _key_of, others=kept.values(), separator=".")


def _fit(leaves: Leaves, wanted: Mapping[Path, Any], constants: set[Path]) -> Leaves:
    """Returns the leaves without unwanted counts and constants, with axes as in `like`."""
    fitted = {}
    for path, leaf in leaves.items():
        if path in wanted and path[-1] in ("kernel", "bias"):
            leaf = _torch_layers.split_axes(leaf, tuple(wanted[path].shape))
        if path in wanted or not (path[-1] == "count" or path in constants):
            fitted[path] = leaf
    return fitted


def to_torch(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    like: Mapping[str, Any] | TorchModule | None = None,
    rename: Rename | None = None,
    others: Others = "keep",
    flattened: Flattened | None = None,
) -> dict[str, Any]:
    """Converts `params` and `batch_stats` to the state_dict of a PyTorch layer or network.

    It is the inverse of `from_torch`, whose docstring has the table of names.

    Args:
      params: as `from_torch` returns them.
      batch_stats: as `from_torch` returns them. Without a `count`, `num_batches_tracked` is 0.
      like: the module to load the result into, or its state_dict. The result has its keys
        (including the names that hooks use), shapes, dtypes and devices; otherwise, an error lists
        all keys that differ. If its values are tensors, the result has tensors, too. A module also
        determines the kind of its weights (an LSTM or a cell, a Conv1D), and where features are
        flattened.
      rename: the `rename` that was passed to `from_torch`, from keys of `like` to names of
        `params`. Without `like`, a table is inverted.
      others: "keep" passes leaves that do not belong to a known layer through, "refuse" raises an
        error that lists them. With `like`, its keys determine what is kept.
      flattened: the `flattened` that was passed to `from_torch`.

    Returns:
      A dict of NumPy arrays for `safetensors.numpy.save_file`, or, with tensors in `like`, a dict
      of tensors for `load_state_dict`. Without `like`, weight_norm and spectral_norm are written as
      parametrizations, and cells as a `torch.nn.LSTM` or `GRU`. If PyTorch has two biases where
      Flax has one, the second bias is zero. normjax stores one of the two vectors of spectral_norm;
      the other is computed from it by power iteration.

    Raises:
      ValueError, TypeError: if leaves are unknown or missing, or do not fit each other or `like`;
        if statistics are not finite. The error names the leaf.

    Example:
      >>> import normjax as nj
      >>> state_dict = nj.convert.to_torch(*nj.batch_norm_init(2))
      >>> for key, value in state_dict.items():
      ...     print(key, value)
      weight [1. 1.]
      bias [0. 0.]
      running_mean [0. 0.]
      running_var [1. 1.]
      num_batches_tracked 0
    """
    function = "to_torch"
    check_others(function, others)
    if like is None:
        _check_alone(function, flattened)
        state = encode_all(function, take_apart(function, params, batch_stats), others)
        return rename_back(function, state, rename)
    expected = _arrays(function, like)
    layout = read_layout(function, like, expected, like={}, rename=rename, flattened=flattened)
    places = {key: layout.path_of_other(key)[1:] for key in layout.others}
    unchecked = {(collection, *parts) for collection in COLLECTIONS for parts in places.values()}
    leaves = take_apart(function, params, batch_stats, unchecked)
    state: Arrays = {}
    for key, parts in places.items():
        if not is_float(expected[key]):
            state[key] = expected[key]  # from_torch drops it if Flax's model has no place for it
        for path in [path for path in leaves if path[1:] == parts]:
            state[key] = leaves.pop(path).value
    for layer in layout.groups:
        state |= encode_group(layout, layer, taken(layout, layer, leaves), like)
    state |= encode_all(function, leaves, "keep")
    state = adapt(state, expected)
    state = conform(function, state, expected, ".")
    tensors = like.state_dict() if isinstance(like, TorchModule) else like
    return {key: like_the_given(tensors[key], value) for key, value in state.items()}


def _check_alone(function: str, flattened: object) -> None:
    if flattened is not None:
        _checks.raise_error(
            function,
            "flattened takes like=",
            expected="the module, or its state_dict, that has the names and sizes of PyTorch",
            got="flattened without like",
            fix="Pass like=module",
        )


def _arrays(function: str, source: Any) -> Arrays:
    if isinstance(source, TorchModule):
        source = source.state_dict()
    return read_mapping(function, source)


def _key_of(path: Path) -> str:
    names = {new: old for old, new in RENAMED.items()}
    names |= dict.fromkeys(("scale", "kernel", "embedding", "negative_slope", "u"), "weight")
    return ".".join((*path[1:-1], names.get(path[-1], path[-1])))
