"""The names of weights in Keras, normjax and Flax."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from normjax._trees import Path
from normjax.convert._keras_layers import RECURRENT, decode, depthwise, encode, is_depthwise
from normjax.convert._leaf import STATISTICS as STORED
from normjax.convert._leaf import Leaf, Leaves, modules_of
from normjax.convert._others import Others, refuse

PARAMS = {"gamma": "scale", "scale": "scale", "beta": "bias", "bias": "bias", "kernel": "kernel"}
PARAMS |= {"embeddings": "embedding"}
STATISTICS = {"moving_mean": "mean", "moving_variance": "var", "vector_u": "u"}
OF_DATA = {"mean": "mean", "variance": "var", "count": "count"}  # of keras.layers.Normalization
KNOWN = PARAMS | STATISTICS
SEPARABLE = ("depthwise_kernel", "pointwise_kernel")
BACK = {  # in Keras' own order
    "kernel": ("kernel",),
    "embedding": ("embeddings",),
    "scale": ("gamma", "scale"),
    "bias": ("beta", "bias"),
    "mean": ("moving_mean", "mean"),
    "var": ("moving_variance", "variance"),
    "u": ("vector_u",),
}
ATTENTION = ("query", "key", "value")
NORM = {"scale", "mean", "var", "u"}


class Entry(NamedTuple):
    """A weight, its layer (None if unknown), and whether it is trained."""

    leaf: Leaf
    layer: Any = None
    trained: bool = True


def decoded(function: str, entries: dict[str, Entry], others: Others) -> list[tuple[Path, Leaf]]:
    """Returns the leaves of all layers with their paths in `params` and `batch_stats`.

    Leaves that do not belong to a known layer keep their names, or one error lists them.
    """
    modules: dict[Path, dict[str, Entry]] = {}
    for key, entry in entries.items():
        *parts, name = key.split("/")
        modules.setdefault(tuple(parts), {})[name] = entry
    found: list[tuple[Path, Leaf]] = []
    refused: list[Leaf] = []
    for parts, module in modules.items():
        where = _with_output(parts, modules, "attention_output", "out")
        # u of spectral norm has Keras' layout, which Flax's depthwise convolutions lack.
        is_bounded = "vector_u" in modules.get(parts[:-1], {})
        known, left = _decode_module(module, keep_layout=is_bounded)
        found += [((collection, *where, *path), leaf) for (collection, *path), leaf in known]
        for name in left:
            if others == "refuse" or _belongs_to_a_known_layer(name, module):
                refused.append(module[name].leaf)
            found.append(((_collection(name, module[name]), *where, name), module[name].leaf))
    if refused:
        refuse(function, refused, [*KNOWN, *RECURRENT[1:2], *SEPARABLE, *OF_DATA], others)
    return found


def _decode_module(
    module: dict[str, Entry], *, keep_layout: bool
) -> tuple[list[tuple[Path, Leaf]], list[str]]:
    """Returns the leaves of one layer with their paths, and the names of unknown leaves."""
    arrays = {name: entry.leaf for name, entry in module.items()}
    layer = next(iter(module.values())).layer
    inside = decode(arrays, layer)
    if inside is not None:
        found = [(("params", *name.split("/")), leaf) for name, leaf in inside.items()]
        return found, [name for name in arrays if name not in (*RECURRENT, *SEPARABLE)]
    if set(RECURRENT[:2]) <= set(arrays):  # Flax does not have this cell
        return [], [*arrays]
    if "kernel" in arrays and is_depthwise(layer) and not keep_layout:
        kernel = arrays["kernel"]
        arrays["kernel"] = Leaf(depthwise(kernel.value), kernel.key)
    names = KNOWN | (OF_DATA if {"mean", "variance"} <= set(arrays) else {})
    found = []
    for name in (name for name in arrays if name in names):
        collection = "params" if name in PARAMS else "batch_stats"
        found.append(((collection, names[name]), arrays[name]))
    return found, [name for name in arrays if name not in names]


def _collection(name: str, entry: Entry) -> str:
    """Returns the collection of an unknown weight: `params` if it is trained."""
    return "params" if entry.trained or name in STORED else "batch_stats"


def _belongs_to_a_known_layer(name: str, module: Collection[str]) -> bool:
    """Returns whether this weight changes what a known layer computes."""
    is_norm = not {"gamma", "beta", *STATISTICS}.isdisjoint(module)
    return is_norm or name in (*RECURRENT[1:2], *SEPARABLE) and "kernel" not in module


def _with_output(parts: Path, modules: Collection[Path], old: str, new: str) -> Path:
    """Returns the path with the output of an attention layer renamed."""
    for end, part in enumerate(parts):
        around = parts[:end]
        if part == old and all((*around, name) in modules for name in ATTENTION):
            return (*around, new, *parts[end + 1 :])
    return parts


def encoded(
    function: str, leaves: Leaves, expected: Collection[str], others: Others
) -> list[tuple[str, str, np.ndarray]]:
    """Returns the Keras name, path and value of each leaf; the inverse of `decoded`.

    `expected` contains the wanted names, if they are known.
    """
    found: list[tuple[str, str, np.ndarray]] = []
    refused: list[Leaf] = []
    modules = encode(modules_of(leaves), expected)
    for parts, module in modules.items():
        where = _with_output(parts, modules, "out", "attention_output")
        if any(key.startswith("/".join((*parts, ""))) for key in expected):
            where = parts
        left = [name for name in module if name not in (*BACK, "count", "sigma")]
        for name in left:
            if others == "refuse" or name not in RECURRENT and not NORM.isdisjoint(module):
                refused.append(module[name])
        for name in (*(name for name in BACK if name in module), *left):
            key = _key(where, name, module, expected)
            found.append((key, module[name].key, module[name].value))
        count = "/".join((*where, "count"))
        if count in expected and "count" in module:
            found.append((count, module["count"].key, module["count"].value))
    if refused:
        refuse(function, refused, BACK, others)
    return found


def _key(where: Path, name: str, module: Collection[str], expected: Collection[str]) -> str:
    """Returns the Keras name of a leaf: the expected name, or else the usual name."""
    names = BACK.get(name, (name,))
    # Beside a kernel it is the bias of a linear layer, not the beta of a norm.
    if any(name.endswith("kernel") for name in module):
        names = names[::-1]
    keys = ["/".join((*where, name)) for name in names]
    return next((key for key in keys if key in expected), keys[0])
