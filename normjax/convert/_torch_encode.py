"""Converts Flax leaves to the keys and arrays of a PyTorch network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from normjax._trees import Path
from normjax.convert import _torch_attention, _torch_layers, _torch_recurrent
from normjax.convert._leaf import COLLECTIONS, Leaf, Leaves, modules_of
from normjax.convert._names import unique
from normjax.convert._others import Others, refuse
from normjax.convert._rename import Rename, renamed_back
from normjax.convert._sources import Arrays
from normjax.convert._torch_features import reorder
from normjax.convert._torch_groups import WEIGHT, Group, modules_in
from normjax.convert._torch_layout import Layout
from normjax.convert._torch_settings import weight_normalization


def taken(layout: Layout, layer: Group, leaves: Leaves) -> Leaves:
    """Removes the leaves of one layer of `like` from all leaves; returns them by inner path."""
    found: Leaves = {}
    for inside, leaf in layout.decode(layer).items():
        path = layout.path(layer.module, inside, leaf.key)
        if path in leaves:
            found[inside] = leaves.pop(path)
    if layer.kind != "layer":
        return found
    # The shapes in `like` may suggest another kind of weight than params have.
    key = next(iter(layer.entries.values())).key
    for collection in COLLECTIONS:
        for name in _torch_layers.LEAVES:
            path = layout.path(layer.module, (collection, name), key)
            if path[-1] == name and path in leaves:
                found[collection, name] = leaves.pop(path)
    return found


def encode_group(layout: Layout, layer: Group, found: Leaves, like: Any) -> Arrays:
    """Returns the entries of one layer of `like` by key."""
    prefix = f"{layer.module}." if layer.module else ""
    names = {leaf.key.removeprefix(prefix) for leaf in layer.entries.values()}
    if not found:
        return {}
    if layer.kind == "recurrent":
        encoded = _torch_recurrent.encode(found, names)
    elif layer.kind == "attention":
        encoded = _torch_attention.encode(found, names)
    else:
        for order in reversed(layout.orders.get(layer.module, [])):
            found = reorder(found, order, back=True)
        wanted = {leaf.key.removeprefix(prefix): leaf.value for leaf in layer.entries.values()}
        kind = layout.kinds.get(layer.module)
        own = {path[-1]: leaf for path, leaf in found.items()}
        dim = _axis_of_rows(like, layer.module) if "weight_orig" in layer.entries else None
        encoded = _torch_layers.encode(layout.function, own, wanted, kind, dim)
    return {f"{prefix}{name}": value for name, value in encoded.items()}


def _axis_of_rows(like: Any, name: str) -> int | None:
    """Returns the row axis of a module's spectral_norm, or None if it is unknown."""
    module = dict(modules_in(like)).get(name)
    return getattr(weight_normalization(module), "dim", None)


def encode_all(function: str, leaves: Leaves, others: Others) -> Arrays:
    """Returns the entries of all leaves, whose kinds are derived from their form in Flax."""
    found: list[tuple[str, str, np.ndarray]] = []
    rest = dict(leaves)
    for alone, encode in (
        (_torch_attention.alone, _torch_attention.encode),
        (_torch_recurrent.alone, _torch_recurrent.encode),
    ):
        for module, inside in alone(rest).items():
            found += _named(module, encode(inside, None), inside.values())
            for collection, *path in inside:
                del rest[(collection, *module, *path)]
    unknown: list[Leaf] = []
    for module, entries in modules_of(rest).items():
        names = {*_torch_layers.LEAVES} - {WEIGHT}
        known = {name: leaf for name, leaf in entries.items() if name in names}
        encoded = _torch_layers.encode(function, known, None, None, None)
        found += _named(module, encoded, known.values())
        for name in entries:
            if name not in known:
                unknown.append(entries[name])
                found += _named(module, {name: entries[name].value}, [entries[name]])
    if unknown and others == "refuse":
        refuse(function, unknown, sorted(_torch_layers.LEAVES), others)
    return unique(function, found)


def _named(
    module: Path, encoded: Arrays, leaves: Iterable[Leaf]
) -> list[tuple[str, str, np.ndarray]]:
    """Returns, for each array, its key, the leaves it may be computed from, and the array."""
    sources = [leaf.key for leaf in leaves]
    source = f"{sources[0]} and {len(sources) - 1} more" if len(sources) > 1 else "".join(sources)
    return [(".".join((*module, name)), source, value) for name, value in encoded.items()]


def rename_back(function: str, state: Arrays, rename: Rename | None) -> Arrays:
    """Returns the state with the names before a table renamed them."""
    names = renamed_back(function, state, rename, ".")
    return {names[key]: value for key, value in state.items()}


def adapt(state: Arrays, expected: Arrays) -> Arrays:
    """Returns the state without unexpected counts, and with norms in the expected shapes."""
    adapted = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked") and key not in expected:
            continue
        is_norm = key.endswith(("weight_g", "original0")) and key in expected
        if is_norm and value.size == expected[key].size:
            value = value.reshape(expected[key].shape)
        adapted[key] = value
    return adapted


def like_the_given(given: Any, value: np.ndarray) -> Any:
    """Returns the value with the dtype and device of the given tensor, if it is a tensor."""
    if not hasattr(given, "new_tensor"):
        return value
    return given.new_tensor(value if value.dtype.isbuiltin == 1 else value.astype(np.float32))
