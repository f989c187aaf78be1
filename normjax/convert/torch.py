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
    raise_unknown,
    take_apart,
)

Entries = dict[str, Leaf]  # the arrays of one module, by the names in `torch.nn.utils`

# The hooks of torch.nn.utils and its parametrizations name the same arrays differently.
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
NAMES = "|".join(map(re.escape, [*PARAMETRIZATIONS, *RENAMED, *WEIGHTS]))
KEY = re.compile(rf"(?:(.*)\.)?({NAMES})")
LAYERS_WITH_SCALE = {"_BatchNorm", "_InstanceNorm", "LayerNorm", "RMSNorm", "GroupNorm"}


def from_torch(source: Source | TorchModule, *, like: tuple[Tree, Tree] | None = None) -> Trees:
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

    A weight `(out, in, *window)` becomes a kernel `(*window, in, out)`. ConvTransposeNd has weights
    `(in, out, *window)`: its kernels `(*window, out, in)` suit Flax's `transpose_kernel=True`. Both
    forms of weight_norm and spectral_norm are known, hooks and parametrizations.

    Trees are nested by the names of the modules: `layer1.0.bn1.weight` becomes
    `params["layer1"]["0"]["bn1"]["scale"]`. To change names, rename the keys of the state_dict,
    which is a dict.

    The weights alone do not say how training continues: normjax's momentum is 1 minus PyTorch's,
    and PyTorch's running variance is unbiased. `torch_settings` reads such settings from a module.

    Args:
      source: a module, its `state_dict()`, a mapping from its keys to arrays (NumPy's are enough),
        or the path of a .safetensors file.
      like: `(params, batch_stats)` as the init function of the layer, or the model, returned them,
        arrays or `jax.ShapeDtypeStruct`. The result has this structure, these shapes and these
        dtypes, or there is an error. A `count` that `like` does not have is left out. Without
        `like`, two kinds of weights in a mapping are taken for kernels: embeddings, and scales of
        several axes without a bias.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays in the dtypes of the source; statistics
      in at least float32, `count` in int32. `u` is the vector that PyTorch's power iteration starts
      from. With hooks that is u, `(1, out)`, for `feature_axes=-1`. With parametrizations it is v,
      for all other axes as `feature_axes`, unless `like` has the shape of the former. `sigma`
      belongs to the stored vectors: at inference PyTorch's weight is `kernel / sigma`.

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
    """Returns the state_dict of a PyTorch layer or network from `params` and `batch_stats`.

    It is the inverse of `from_torch`, which has the table of names.

    Args:
      params: as `from_torch` returns them.
      batch_stats: as `from_torch` returns them. Without a `count`, `num_batches_tracked` is 0.
      like: the module to load the result into, or its state_dict. The result has its keys (also
        the names that hooks use), shapes, dtypes and devices, or there is an error. If its values
        are tensors, the result has tensors, too.

    Returns:
      A dict of NumPy arrays, fit for `safetensors.numpy.save_file`; with tensors in `like`, a dict
      of tensors, fit for `load_state_dict`. Without `like`, weight_norm and spectral_norm are
      written as parametrizations. normjax stores one of spectral_norm's two vectors; the other is
      computed from it by power iteration.

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
    hooks = {name: weight_normalization(module) for name, module in _modules(like)}
    dims = {name: getattr(hook, "dim", None) for name, hook in hooks.items()}
    state: Arrays = {}
    for parts, entries in modules_of(take_apart(function, params, batch_stats)).items():
        prefix = "".join(f"{part}." for part in parts)
        own = {key.removeprefix(prefix) for key in expected or () if key.startswith(prefix)}
        encoded = _encode(function, entries, own, dims.get(".".join(parts)))
        state |= {f"{prefix}{name}": value for name, value in encoded.items()}
    if like is None or expected is None:
        return state
    state = conform(function, _adapt(state, expected), expected)
    tensors = like.state_dict() if isinstance(like, TorchModule) else like
    return {key: _like_the_given(tensors[key], value) for key, value in state.items()}


def _adapt(state: Arrays, expected: Arrays) -> Arrays:
    """Returns the state without counts that are not expected, and with norms in their shapes."""
    adapted = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked") and key not in expected:
            continue
        is_norm = key.endswith(("weight_g", "original0")) and key in expected
        if is_norm and value.size == expected[key].size:
            value = value.reshape(expected[key].shape)
        adapted[key] = value
    return adapted


def _like_the_given(given: Any, value: np.ndarray) -> Any:
    """Returns the value as a tensor of the given one's dtype and device, if that is a tensor."""
    if not hasattr(given, "new_tensor"):
        return value
    return given.new_tensor(value if value.dtype.isbuiltin == 1 else value.astype(np.float32))


def _arrays(function: str, source: Any) -> Arrays:
    if isinstance(source, TorchModule):
        source = source.state_dict()
    return read_mapping(function, source)


def _modules(source: Any) -> Iterable[tuple[str, Any]]:
    """Returns all modules by name, if the source is a module."""
    return source.named_modules() if isinstance(source, TorchModule) else ()


def _kinds(source: Any) -> dict[str, str]:
    """Returns what the weight of each module is, as far as the class of the module says it."""
    kinds = {}
    for name, module in _modules(source):
        classes = class_names(module)
        if classes & LAYERS_WITH_SCALE:
            kinds[name] = "scale"
        elif classes & {"Embedding", "EmbeddingBag"}:
            kinds[name] = "embedding"
    return kinds


def _hints(function: str, like: Any) -> tuple[dict[str, str], dict[str, int]]:
    """Returns from `like` the leaf that each module's weight becomes, and the size of its u."""
    kinds, sizes = {}, {}
    expected = {} if like is None else expectation(function, like)
    for path, value in expected.items():
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
            raise_unknown(function, Leaf(value, key), [*RENAMED, *WEIGHTS])
        module, name = found.group(1, 2)
        modules.setdefault(module or "", {})[PARAMETRIZATIONS.get(name, name)] = Leaf(value, key)
    return modules


def _decode(
    function: str, entries: Entries, kind: str | None, size: int | None
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """Returns the leaves of one module, for params and for batch_stats."""
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
        flat = scale.value.reshape(-1) if scale.value.ndim else scale.value
        params["scale"] = Leaf(flat, scale.key)
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
    """Returns the entries of one module, in PyTorch's order; `expected` has the names in `like`."""
    known = {"scale", "kernel", "embedding", "u", "sigma", *RENAMED.values()}
    for name, leaf in leaves.items():
        if name not in known:
            raise_unknown(function, leaf, sorted(known))
    state = _encode_weight(function, leaves, dim)
    if len(state) > 1 and not {"weight_g", "weight_orig"} & expected:
        v = "0._v" if "weight_orig" in state else "original1"
        names = {old: new for new, old in PARAMETRIZATIONS.items()}
        names["weight_v"] = f"parametrizations.weight.{v}"
        state = {names[name]: value for name, value in state.items()}
    state |= {old: leaves[new].value for old, new in RENAMED.items() if new in leaves}
    if "mean" in leaves:
        count = leaves["count"].value if "count" in leaves else 0
        state["num_batches_tracked"] = np.asarray(count, np.int64)
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
