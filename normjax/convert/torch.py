"""Weights from and to PyTorch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._sources import Arrays, Source, TorchModule, conform, read_mapping
from normjax.convert._torch_kernels import (
    from_kernel,
    norms,
    power_iteration,
    singular_vectors,
    to_kernel,
)
from normjax.convert._torch_settings import class_names, weight_normalization
from normjax.convert._trees import (
    COLLECTIONS,
    Leaf,
    Leaves,
    Tree,
    Trees,
    expectation,
    modules_of,
    put_together,
    refuse_unknown,
    take_apart,
)

Entries = dict[str, Leaf]  # of one module, by the names that `torch.nn.utils` gives them

# What the hooks of torch.nn.utils call weight_g is original0 to its parametrizations, and so on.
PARAMETRIZATIONS = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._u": "weight_u",
    "parametrizations.weight.0._v": "weight_v",
}
RENAMED = {
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "count",
}
WEIGHTS = ("weight", "weight_g", "weight_v", "weight_orig", "weight_u")
KEY = re.compile(
    rf"(?:(.*)\.)?({'|'.join(map(re.escape, [*PARAMETRIZATIONS, *RENAMED, *WEIGHTS]))})"
)
LAYERS_WITH_SCALE = {"_BatchNorm", "_InstanceNorm", "LayerNorm", "RMSNorm", "GroupNorm"}


def from_torch(source: Source | TorchModule, *, like: tuple[Tree, Tree] | None = None) -> Trees:
    """Returns `params` and `batch_stats` with the weights of a PyTorch layer or network.

    | torch | normjax |
    |---|---|
    | `weight`, `bias` of BatchNorm, SyncBatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm | `scale`, `bias` |
    | `running_mean`, `running_var`, `num_batches_tracked` | `mean`, `var`, `count` of `batch_stats` |
    | `weight`, `bias` of Linear and ConvNd: `(out, in, *window)` | `kernel`, `bias`: `(*window, in, out)` |
    | the same of ConvTransposeNd: `(in, out, *window)` | `(*window, out, in)`, for `transpose_kernel=True` |
    | `weight` of Embedding | `embedding` |
    | `weight_g`, `weight_v` of weight_norm | `scale`, `kernel` |
    | `weight_orig`, `weight_u`, `weight_v` of spectral_norm | `kernel`; `u`, `sigma` of `batch_stats` |

    Both forms of weight_norm and spectral_norm are known, hooks and parametrizations. Trees are
    nested by the names of
    the modules: `layer1.0.bn1.weight` becomes `params["layer1"]["0"]["bn1"]["scale"]`. Other names
      are had by renaming
    the keys of the state_dict, which is a dict.

    Weights are half of it. PyTorch's momentum is the complement of normjax's and its running
    variance is unbiased, both
    of which a state_dict does not say: `torch_settings` has them from the module.

    Args:
      source: a module, its `state_dict()`, any mapping from its keys to arrays (NumPy's do), or the
        path of a .safetensors file.
      like: `(params, batch_stats)` as the init function of the layer, or the model, returned them,
        arrays or
        `jax.ShapeDtypeStruct`: the result has this structure, these shapes and these dtypes, or
          there is an error.
        `count` is left out where it has none. Without it, a mapping does not tell the scale of a
        layer norm over several axes, if there is no bias beside it, or an embedding from a kernel:
        both are taken for kernels.

    Returns:
      `params` and `batch_stats`, JAX arrays in the dtypes of the source; statistics in at least
      float32, `count` in int32. `u` is the vector that PyTorch's power iteration starts from: with
      hooks u, `(1, out)`, for `feature_axes=-1`; with parametrizations v, for all other axes as
      `feature_axes`, unless `like` has the former.
      `sigma` is that of the stored vectors: at inference PyTorch's weight is `kernel / sigma`.

    Raises:
      ValueError, TypeError: for keys that no such layer has, leaves that are missing or do not fit
        together or `like`, and statistics that are not finite; each names the key.

    Example:
      >>> import numpy as np, normjax as nj
      >>> state = {"weight": np.ones(2), "bias": np.zeros(2), "running_mean": np.array([1.0, 2.0]),
      ...          "running_var": np.ones(2), "num_batches_tracked": np.array(7)}
      >>> params, batch_stats = nj.convert.from_torch(state)
      >>> print(sorted(params), batch_stats["mean"], batch_stats["count"])
      ['bias', 'scale'] [1. 2.] 7

    References:
      `torch.nn.BatchNorm2d`, `torch.nn.utils.parametrizations.weight_norm` and `.spectral_norm` in
      PyTorch's documentation.
    """
    function = "from_torch"
    kinds, sizes = _hints(function, like)
    kinds |= _kinds(source)
    arrays = _arrays(function, source)
    leaves: Leaves = {}
    for module, entries in _by_module(function, arrays).items():
        parts = tuple(module.split(".")) if module else ()
        params, batch_stats = _decode(function, entries, kinds.get(module), sizes.get(module))
        for collection, part in zip(COLLECTIONS, (params, batch_stats), strict=True):
            leaves |= {(collection, *parts, name): leaf for name, leaf in part.items()}
    return put_together(function, leaves, like, _key_of)


def to_torch(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    like: Mapping[str, Any] | TorchModule | None = None,
) -> dict[str, Any]:
    """Returns the state_dict of a PyTorch layer or network with the weights of `params` and `batch_stats`.

    The inverse of `from_torch`, where the names and shapes are told.

    Args:
      params: as `from_torch` returns them.
      batch_stats: likewise. Without a `count`, `num_batches_tracked` is 0.
      like: the module that is to load them, or its state_dict: the result has its keys (those of
        weight_norm's and spectral_norm's hooks, too), shapes, dtypes and devices, or there is an
        error. If its values are tensors, so are those of the result.

    Returns:
      A dict of NumPy arrays, fit for `safetensors.numpy.save_file`; or, with tensors in `like`, of
      tensors, fit for `load_state_dict`. Without `like`, weight_norm and spectral_norm are written
      as parametrizations. Of the two vectors of spectral_norm, the one that normjax does not keep
      is what power iteration gives from the other.

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
    expected = None if like is None else _arrays(function, like)
    dims = {
        name: getattr(weight_normalization(module), "dim", None) for name, module in _modules(like)
    }
    state: Arrays = {}
    for parts, entries in modules_of(take_apart(function, params, batch_stats)).items():
        prefix = "".join(f"{part}." for part in parts)
        own = {key.removeprefix(prefix) for key in expected or () if key.startswith(prefix)}
        encoded = _encode(function, entries, own, dims.get(".".join(parts)))
        state |= {f"{prefix}{name}": value for name, value in encoded.items()}
    if like is None or expected is None:
        return state
    state = {
        key: value
        for key, value in state.items()
        if key in expected or not key.endswith("num_batches_tracked")
    }
    for key in state:
        if (
            key.endswith(("weight_g", "original0"))
            and key in expected
            and state[key].size == expected[key].size
        ):
            state[key] = state[key].reshape(expected[key].shape)
    state = conform(function, state, expected)
    tensors = like.state_dict() if isinstance(like, TorchModule) else like
    return {key: _of_the_kind_of(tensors[key], value) for key, value in state.items()}


def _of_the_kind_of(given: Any, value: np.ndarray) -> Any:
    """The value as a tensor where the given one is, in its dtype and on its device."""
    if not hasattr(given, "new_tensor"):
        return value
    return given.new_tensor(value if value.dtype.isbuiltin == 1 else value.astype(np.float32))


def _arrays(function: str, source: Any) -> Arrays:
    return read_mapping(
        function, source.state_dict() if isinstance(source, TorchModule) else source
    )


def _modules(source: Any) -> Iterable[tuple[str, Any]]:
    """All modules by name, where the source is a module."""
    return source.named_modules() if isinstance(source, TorchModule) else ()


def _kinds(source: Any) -> dict[str, str]:
    """What the weight of each module is, as far as modules say it."""
    kinds = {}
    for name, module in _modules(source):
        classes = class_names(module)
        if classes & LAYERS_WITH_SCALE:
            kinds[name] = "scale"
        elif classes & {"Embedding", "EmbeddingBag"}:
            kinds[name] = "embedding"
    return kinds


def _hints(function: str, like: Any) -> tuple[dict[str, str], dict[str, int]]:
    """What `like` says of each module: the leaf that its weight becomes, and the size of its singular vector."""
    kinds, sizes = {}, {}
    for path, value in expectation(function, like).items() if like is not None else ():
        module = ".".join(path[1:-1])
        if path[-1] in ("scale", "kernel", "embedding"):
            kinds[module] = path[-1]
        elif path[-1] == "u":
            sizes[module] = math.prod(value.shape)
    return kinds, sizes


def _by_module(function: str, arrays: Arrays) -> dict[str, Entries]:
    modules: dict[str, Entries] = {}
    for key, value in arrays.items():
        found = KEY.fullmatch(key)
        if found is None:
            refuse_unknown(function, Leaf(value, key), [*RENAMED, *WEIGHTS])
        module, name = found.group(1, 2)
        modules.setdefault(module or "", {})[PARAMETRIZATIONS.get(name, name)] = Leaf(value, key)
    return modules


def _decode(
    function: str, entries: Entries, kind: str | None, size: int | None
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """The leaves of one module, for params and for batch_stats."""
    found = {new: entries[old] for old, new in RENAMED.items() if old in entries}
    params = {"bias": found.pop("bias")} if "bias" in found else {}
    if "weight_orig" in entries:
        kernel, u, v = _all_of(function, entries, "weight_orig", "weight_u", "weight_v")
        params["kernel"] = Leaf(to_kernel(kernel.value), kernel.key)
        vector, sigma = power_iteration(function, kernel.value, u, v, size)
        found |= {"u": Leaf(vector, u.key), "sigma": Leaf(sigma, v.key)}
    elif "weight_g" in entries or "weight_v" in entries:
        scale, kernel = _all_of(function, entries, "weight_g", "weight_v")
        params["kernel"] = Leaf(to_kernel(kernel.value), kernel.key)
        params["scale"] = Leaf(
            scale.value.reshape(-1) if scale.value.ndim else scale.value, scale.key
        )
    elif "weight" in entries:
        weight = entries["weight"]
        kind = kind or ("kernel" if _looks_like_a_kernel(entries) else "scale")
        params[kind] = Leaf(to_kernel(weight.value), weight.key) if kind == "kernel" else weight
    return params, found


def _all_of(function: str, entries: Entries, *names: str) -> list[Leaf]:
    for name in names:
        if name not in entries:
            _checks.raise_error(
                function,
                f"{name} is missing",
                expected=f"{' and '.join(names)} together, or the same as parametrizations",
                got=f"{sorted(leaf.key for leaf in entries.values())}",
                fix="Pass the whole state_dict of the module",
            )
    return [entries[name] for name in names]


def _looks_like_a_kernel(entries: Entries) -> bool:
    """Whether a weight has two axes or more, and no bias or statistics of its own shape."""
    weight = entries["weight"].value
    others = [entries[name].value.shape for name in ("bias", "running_mean") if name in entries]
    return weight.ndim > 1 and weight.shape not in others


def _key_of(path: Path) -> str:
    name = {new: old for old, new in RENAMED.items()}.get(path[-1], "weight")
    return ".".join((*path[1:-1], name))


def _encode(function: str, leaves: dict[str, Leaf], expected: set[str], dim: int | None) -> Arrays:
    """The entries of one module, in PyTorch's order; `expected` are the names that `like` has, if there is one."""
    known = {"scale", "kernel", "embedding", "u", "sigma", *RENAMED.values()}
    for name, leaf in leaves.items():
        if name not in known:
            refuse_unknown(function, leaf, sorted(known))
    state = _encode_weight(function, leaves, dim)
    if len(state) > 1 and not {"weight_g", "weight_orig"} & expected:
        v = (
            "parametrizations.weight.0._v"
            if "weight_orig" in state
            else "parametrizations.weight.original1"
        )
        names = {old: new for new, old in PARAMETRIZATIONS.items()} | {"weight_v": v}
        state = {names[name]: value for name, value in state.items()}
    state |= {old: leaves[new].value for old, new in RENAMED.items() if new in leaves}
    if "mean" in leaves:
        state["num_batches_tracked"] = np.asarray(
            leaves["count"].value if "count" in leaves else 0, np.int64
        )
    return state


def _encode_weight(function: str, leaves: dict[str, Leaf], dim: int | None) -> Arrays:
    if "kernel" not in leaves:
        weight = leaves.get("scale", leaves.get("embedding"))
        return {} if weight is None else {"weight": weight.value}
    weight = from_kernel(leaves["kernel"].value)
    if "scale" in leaves:
        return {"weight_g": norms(function, weight, leaves["scale"]), "weight_v": weight}
    if "u" in leaves:
        u, v = singular_vectors(function, weight, leaves["u"], dim)
        return {"weight_orig": weight, "weight_u": u, "weight_v": v}
    return {"weight": weight}
