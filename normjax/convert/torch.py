"""Weights from and to PyTorch."""

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
    """Returns `params` and `batch_stats` with the weights of a PyTorch layer or network.

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
    | any other parameter, `cls_token` say | the same name and values |
    | any other buffer, or integers | the same, in `batch_stats` |

    A weight `(out, in, *window)` becomes a kernel `(*window, in, out)`. ConvTransposeNd has weights
    `(in, out, *window)`: its kernels `(*window, out, in)` suit Flax's `transpose_kernel=True`. Both
    forms of weight_norm and spectral_norm are known, hooks and parametrizations. A Conv1D of
    Hugging Face's has weights `(in, out)`, which are kernels as they are.

    An LSTM, GRU or RNN of one layer becomes one cell in its place; the cells of several layers or
    directions are below it as `l0`, `l0_reverse`, `l1`, or where `like` has as many cells.
    PyTorch's two biases are added where Flax has one. An LSTM with `proj_size` has no counterpart
    in Flax, and is kept as it is. Attention has kernels `(in, heads, size)`. The number of heads is
    known from a module or `like`; without both they are matrices, to be reshaped.

    Trees are nested by the names of the modules: `layer1.0.bn1.weight` becomes
    `params["layer1"]["0"]["bn1"]["scale"]`.

    If images `(C, H, W)` are flattened before a Linear layer, Flax's features come in another
    order, (H, W, C), and the rows of the kernel are permuted to it. A module with a Flatten says
    where, and `like` that it is for such a model: both together are enough. If the module calls
    `x.view` or `x.flatten` itself, pass `flattened` or `example_input`; a warning says so if the
    sizes look like it. Norms between Flatten and Linear are permuted, too, and so are the outputs
    of a Linear layer before an Unflatten.

    What shapes cannot tell: in a mapping, whether a square matrix is a Linear's or a Conv1D's. It
    is taken for a Linear's, unless others of its last name, such as `c_proj`, are a Conv1D's by
    their shape; there is a warning if the mapping has a Conv1D. A module's classes say it.

    The weights alone do not say how training continues: normjax's momentum is 1 minus PyTorch's,
    and PyTorch's running variance is unbiased. `torch_settings` reads such settings from a module.

    Args:
      source: a module, its `state_dict()`, a mapping from its keys to arrays (NumPy's are enough),
        or the path of a .safetensors file.
      like: `(params, batch_stats)` as the init function of the layer, or the model, returned them,
        arrays or `jax.ShapeDtypeStruct`. The result has this structure, these shapes and these
        dtypes, or there is an error, which lists all differences. A `count` that `like` does not
        have is left out, and so are integers that are not a layer's, such as tables of positions.
        A matrix is reshaped if `like` has its inputs or outputs in several axes, as DenseGeneral
        has. Without `like`, two kinds of weights in a mapping are taken for kernels: embeddings,
        and scales of several axes without a bias.
      rename: new names, from keys of the source such as `layer1.0.bn1.weight`. A function from a
        key to a key, or a table of keys or their first parts, up to a dot:
        `{"layer1.0": "layer1_0", "module": ""}`. The longest entry that fits is taken; an empty
        old name, as in `{"": "backbone"}`, fits all.
      others: what to do with arrays that are not a layer's: position embeddings, class tokens,
        layer scales. "keep", the default, hands them through, since most networks have some, and
        nothing about them has to be converted; "refuse" raises an error that lists them.
      flattened: the shapes `(C, H, W)` of what is flattened before layers, by their names, such as
        `{"fc": (256, 6, 6)}`. None in place of a shape: the features keep their order.
      example_input: a tensor, or a tuple of arguments, that the module is run on once, at
        inference, to see where it flattens images. No `flattened` is needed then.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays in the dtypes of the source; statistics
      in at least float32, `count` in int32. `u` is the vector that PyTorch's power iteration starts
      from. With hooks that is u, `(1, out)`, for `feature_axes=-1`. With parametrizations it is v,
      for all other axes as `feature_axes`, unless `like` has the shape of the former. `sigma`
      belongs to the stored vectors: at inference PyTorch's weight is `kernel / sigma`.

    Raises:
      ValueError, TypeError: for leaves that are missing or do not fit together or `like`, two keys
        that would become one leaf, features that are flattened in an unknown order, and statistics
        that are not finite; each names the keys. The fix for names that differ by a prefix or in
        their separators is the `rename` to pass.

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
    """Returns the leaves without counts and constants that are not wanted, with axes as wanted."""
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
    """Returns the state_dict of a PyTorch layer or network from `params` and `batch_stats`.

    It is the inverse of `from_torch`, which has the table of names.

    Args:
      params: as `from_torch` returns them.
      batch_stats: as `from_torch` returns them. Without a `count`, `num_batches_tracked` is 0.
      like: the module to load the result into, or its state_dict. The result has its keys (also
        the names that hooks use), shapes, dtypes and devices, or there is an error, which lists
        all keys that differ. If its values are tensors, the result has tensors, too. A module says
        what its weights are (an LSTM or a cell, a Conv1D), and where features are flattened.
      rename: as `from_torch` got it, from keys of `like` to names of `params`. Without `like`, a
        table is read backwards.
      others: "keep" hands leaves that are not a layer's through, "refuse" raises an error that
        lists them; with `like`, its keys decide.
      flattened: as `from_torch` got it.

    Returns:
      A dict of NumPy arrays, fit for `safetensors.numpy.save_file`; with tensors in `like`, a dict
      of tensors, fit for `load_state_dict`. Without `like`, weight_norm and spectral_norm are
      written as parametrizations, and cells as a `torch.nn.LSTM` or `GRU`. Where PyTorch has two
      biases and Flax one, the second is zero. normjax stores one of spectral_norm's two vectors;
      the other is computed from it by power iteration.

    Raises:
      ValueError, TypeError: for leaves that are unknown, missing or do not fit together or `like`,
        and statistics that are not finite; each names the leaf.

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
            state[key] = expected[key]  # from_torch leaves it out if Flax's model has no place
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
