"""Groups the keys of a state_dict into layers, and determines the kind of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from normjax import _checks
from normjax.convert._leaf import Leaf
from normjax.convert._sources import Arrays, TorchModule
from normjax.convert._torch_settings import class_names

Entries = dict[str, Leaf]  # the arrays of one layer, by the names in `torch.nn.utils`

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
LAYER = re.compile(rf"(?:(.*)\.)?({NAMES})")
RECURRENT = re.compile(r"(?:(.*)\.)?((?:weight|bias)_(?:ih|hh)(?:_l\d+(?:_reverse)?)?)")
ATTENTION = re.compile(r"(?:(.*)\.)?(in_proj_weight|in_proj_bias|[qkv]_proj_weight)")

LAYERS_WITH_SCALE = {"_BatchNorm", "_InstanceNorm", "LayerNorm", "RMSNorm", "GroupNorm"}
LAYERS_WITH_KERNEL = {"Linear", "_ConvNd"}
# Their weights have several axes, but do not belong to a single matrix product.
LAYERS_WITHOUT_COUNTERPART = {"Bilinear", "CondConv2d"}

# The leaf that a layer's `weight` becomes. The weight of Hugging Face's Conv1D is already a kernel.
KERNEL, CONV1D, SCALE, EMBEDDING, SLOPE = "kernel", "conv1d", "scale", "embedding", "negative_slope"
WEIGHT = "weight"

NAMES_OF_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")  # in GPT-2 and similar models


class Group(NamedTuple):
    """The arrays that belong to one layer."""

    kind: str  # "layer", "recurrent" or "attention"
    module: str
    entries: Entries


class Classes(NamedTuple):
    """What the classes of a module's submodules determine."""

    weights: dict[str, str]  # the kinds of the weights, by layer name
    heads: dict[str, int]
    buffers: set[str]
    attention: set[str] | None  # None if there are only arrays


def modules_in(source: Any) -> Iterable[tuple[str, Any]]:
    """Returns all modules by name, if the source is a module."""
    return source.named_modules() if isinstance(source, TorchModule) else ()


def read_classes(source: Any) -> Classes:
    """Reads the classes of a module's submodules; empty for a mapping."""
    weights, heads = {}, {}
    for name, module in modules_in(source):
        kind = _kind_of_weight(class_names(module))
        if kind is not None:
            weights[name] = kind
        if "MultiheadAttention" in class_names(module):
            heads[name] = module.num_heads
    if not isinstance(source, TorchModule):
        return Classes(weights, heads, set(), None)
    buffers = {name for name, _ in getattr(source, "named_buffers", tuple)()}
    return Classes(weights, heads, buffers, set(heads))


def _kind_of_weight(classes: set[str]) -> str | None:
    kinds = {
        SCALE: LAYERS_WITH_SCALE,
        EMBEDDING: {"Embedding", "EmbeddingBag"},
        KERNEL: LAYERS_WITH_KERNEL,
        CONV1D: {"Conv1D"},
        SLOPE: {"PReLU"},
        WEIGHT: LAYERS_WITHOUT_COUNTERPART,
    }
    return next((kind for kind, names in kinds.items() if classes & names), None)


def group(function: str, arrays: Arrays, classes: Classes) -> tuple[list[Group], dict[str, Leaf]]:
    """Returns the layers, and the arrays that do not belong to a known layer by key."""
    groups: dict[tuple[str, str], Group] = {}
    others = {}
    attention = _attention(function, arrays, classes)
    recurrent = _recurrent(arrays)
    for key, value in arrays.items():
        found = _place(key, attention, recurrent)
        if found is None or classes.weights.get(found[1]) == WEIGHT:
            others[key] = Leaf(value, key)
            continue
        kind, module, name = found
        entries = groups.setdefault((kind, module), Group(kind, module, {})).entries
        entries[PARAMETRIZATIONS.get(name, name)] = Leaf(value, key)
    return list(groups.values()), others


def _place(key: str, attention: set[str], recurrent: set[str]) -> tuple[str, str, str] | None:
    """Returns the kind and name of a key's layer, and the rest of the key."""
    for kind, pattern, modules in (
        ("attention", ATTENTION, attention),
        ("recurrent", RECURRENT, recurrent),
    ):
        found = pattern.fullmatch(key)
        if found is not None:
            module, name = found.group(1) or "", found.group(2)
            return (kind, module, name) if module in modules else None
    found = LAYER.fullmatch(key)
    if found is None:
        return None
    module, name = found.group(1) or "", found.group(2)
    parent, _, last = module.rpartition(".")
    if last == "out_proj" and parent in attention:
        return "attention", parent, f"out_proj.{name}"
    return "layer", module, name


def _attention(function: str, arrays: Arrays, classes: Classes) -> set[str]:
    """Returns the names of the modules that are `torch.nn.MultiheadAttention`."""
    found = (ATTENTION.fullmatch(key) for key in arrays)
    modules = {match.group(1) or "" for match in found if match is not None}
    if classes.attention is not None:
        return modules & classes.attention
    for module in modules:
        _check_attention(function, f"{module}." if module else "", arrays)
    return modules


def _check_attention(function: str, prefix: str, arrays: Arrays) -> None:
    separate = [f"{prefix}{letter}_proj_weight" for letter in "qkv"]
    joint = f"{prefix}in_proj_weight"
    inputs = [joint] if joint in arrays else separate
    needed = [*inputs, f"{prefix}out_proj.weight"]
    lacking = [key for key in needed if key not in arrays or arrays[key].ndim != 2]
    if not lacking and (joint not in arrays or len(arrays[joint]) % 3 == 0):
        return
    present = [key for key in arrays if ATTENTION.fullmatch(key) and key.startswith(prefix)]
    _checks.raise_error(
        function,
        f"{present[0]!r} has no counterpart",
        expected=f"the matrices {' and '.join(needed)} of a MultiheadAttention together",
        got=", ".join(f"{key!r} of shape {arrays[key].shape}" for key in present),
        fix="Pass the whole state_dict, or the module, whose class determines what it is",
    )


def _recurrent(arrays: Arrays) -> set[str]:
    """Returns the names of the modules that are an LSTM, GRU or RNN, or one of their cells."""
    found = [match for match in map(RECURRENT.fullmatch, arrays) if match is not None]
    modules = {match.group(1) or "" for match in found}
    return {module for module in modules if _is_recurrent(f"{module}." if module else "", arrays)}


def _is_recurrent(prefix: str, arrays: Arrays) -> bool:
    """Returns whether all recurrent weights map a layer's outputs to 1, 3 or 4 gates.

    An LSTM with projections (`proj_size`) has other shapes, and no counterpart in Flax.
    """
    own = [
        key for key in arrays if key.startswith(f"{prefix}weight_h") and RECURRENT.fullmatch(key)
    ]
    if not own or any(key.startswith(f"{prefix}weight_hr") for key in arrays):
        return False
    for key in own:
        shape = arrays[key].shape
        if len(shape) != 2 or shape[0] not in (shape[1], 3 * shape[1], 4 * shape[1]):
            return False
        if key.replace("_hh", "_ih") not in arrays:
            return False
    return True


def conv1d_by_shape(
    groups: Iterable[Group], kinds: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Returns which matrices belong to a Hugging Face `Conv1D` by shape, and ambiguous ones.

    A bias has the size of the outputs, so a matrix that is not square is `(in, out)` if its second
    axis has that size. A square matrix has the kind of other matrices with the same last name.

    Returns:
      The kinds of these matrices by module, and, if there is a Conv1D, the modules of the square
      matrices whose kind is only known from such a name, or not at all.
    """
    found: dict[str, str] = {}
    square = []
    for each in groups:
        weight, bias = (each.entries.get(name) for name in ("weight", "bias"))
        if each.kind != "layer" or each.module in kinds or weight is None or bias is None:
            continue
        if weight.value.ndim != 2 or bias.value.ndim != 1:
            continue
        rows, columns = weight.value.shape
        if rows == columns == len(bias.value):
            square.append(each.module)
        elif len(bias.value) in (rows, columns):
            found[each.module] = KERNEL if len(bias.value) == rows else CONV1D
    conv1d = {name: CONV1D for name, kind in found.items() if kind == CONV1D}
    linear = {_last(name) for name, kind in found.items() if kind == KERNEL}
    open_ones = [name for name in square if _last(name) not in linear]
    if not conv1d:
        return {}, [name for name in open_ones if _last(name) in NAMES_OF_CONV1D]
    known = {_last(name) for name in conv1d}
    return conv1d | {name: CONV1D for name in open_ones if _last(name) in known}, open_ones


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def looks_like_a_kernel(entries: Entries) -> bool:
    """Returns whether a weight has several axes, and no bias or statistics of the same shape."""
    weight = entries["weight"].value
    others = [entries[name].value.shape for name in ("bias", "running_mean") if name in entries]
    return weight.ndim > 1 and weight.shape not in others


def is_float(array: np.ndarray) -> bool:
    """Returns whether an array has a floating-point dtype, so that training may change it."""
    return array.dtype.kind not in "biu"
