"""Flax's leaves as the keys and arrays of a PyTorch network."""

from __future__ import annotations

from typing import Any

import numpy as np

from normjax import _checks
from normjax.convert import _torch_attention, _torch_layers, _torch_recurrent
from normjax.convert._names import Rename, inverse, renamer
from normjax.convert._sources import Arrays
from normjax.convert._torch_features import reorder
from normjax.convert._torch_groups import WEIGHT, Group, modules_in
from normjax.convert._torch_layout import Layout
from normjax.convert._torch_match import refuse
from normjax.convert._torch_settings import weight_normalization
from normjax.convert._trees import COLLECTIONS, Leaf, Leaves, modules_of


def taken(layout: Layout, layer: Group, leaves: Leaves) -> Leaves:
    """Takes the leaves of one layer of `like` out of all leaves; with paths inside the layer."""
    found: Leaves = {}
    for inside, leaf in layout.decode(layer).items():
        path = layout.path(layer.module, inside, leaf.key)
        if path in leaves:
            found[inside] = leaves.pop(path)
    if layer.kind != "layer":
        return found
    # Shapes alone may have told another kind of weight than params have.
    key = next(iter(layer.entries.values())).key
    for collection in COLLECTIONS:
        for name in _torch_layers.LEAVES:
            path = layout.path(layer.module, (collection, name), key)
            if path[-1] == name and path in leaves:
                found[collection, name] = leaves.pop(path)
    return found


def encode_group(layout: Layout, layer: Group, found: Leaves, like: Any) -> Arrays:
    """Returns the entries of one layer of `like`, by their keys."""
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
    """Returns the axis of the rows of a module's spectral_norm, None if that is unknown."""
    module = dict(modules_in(like)).get(name)
    return getattr(weight_normalization(module), "dim", None)


def encode_all(function: str, leaves: Leaves, others: str) -> Arrays:
    """Returns the entries of all leaves by the forms that they have in Flax alone."""
    state: Arrays = {}
    rest = dict(leaves)
    for alone, encode in (
        (_torch_attention.alone, _torch_attention.encode),
        (_torch_recurrent.alone, _torch_recurrent.encode),
    ):
        for module, found in alone(rest).items():
            encoded = encode(found, None)
            state |= {".".join((*module, name)): value for name, value in encoded.items()}
            for collection, *inside in found:
                del rest[(collection, *module, *inside)]
    unknown = []
    for parts, entries in modules_of(rest).items():
        prefix = "".join(f"{part}." for part in parts)
        names = {*_torch_layers.LEAVES} - {WEIGHT}
        known = {name: leaf for name, leaf in entries.items() if name in names}
        encoded = _torch_layers.encode(function, known, None, None, None)
        for name in entries:
            if name not in known:
                unknown.append(entries[name])
                _check_free(function, encoded, entries[name], name)
                encoded[name] = entries[name].value
        state |= {f"{prefix}{name}": value for name, value in encoded.items()}
    if unknown and others == "refuse":
        refuse(function, unknown, sorted(_torch_layers.LEAVES))
    return state


def _check_free(function: str, encoded: Arrays, leaf: Leaf, name: str) -> None:
    if name in encoded:
        _checks.raise_error(
            function,
            f"{leaf.key!r} and another leaf of its module would both become {name!r}",
            expected="one leaf for each key",
            got=f"shapes {leaf.value.shape} and {encoded[name].shape}",
            fix="Pass like=module, whose keys say what is what, or rename one of them",
        )


def rename_back(function: str, state: Arrays, rename: Rename | None) -> Arrays:
    """Returns the state with the names that a table has renamed."""
    name = renamer(function, inverse(function, rename), state)
    renamed: Arrays = {}
    for key, value in state.items():
        new = name(key)
        if new in renamed:
            _checks.raise_error(
                function,
                f"{key!r} and another key would both become {new!r}",
                expected="one key for each array",
                got=f"rename={rename}, read backwards",
                fix="Give one of them another name",
            )
        renamed[new] = value
    return renamed


def adapt(state: Arrays, expected: Arrays) -> Arrays:
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


def like_the_given(given: Any, value: np.ndarray) -> Any:
    """Returns the value as a tensor of the given one's dtype and device, if that is a tensor."""
    if not hasattr(given, "new_tensor"):
        return value
    return given.new_tensor(value if value.dtype.isbuiltin == 1 else value.astype(np.float32))
