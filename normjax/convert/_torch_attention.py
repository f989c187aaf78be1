"""`torch.nn.MultiheadAttention` as `flax.linen.MultiHeadDotProductAttention`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._leaf import Leaf, Leaves
from normjax.convert._sources import Arrays
from normjax.convert._torch_groups import Entries

INPUTS = {"query": "q", "key": "k", "value": "v"}


def decode(function: str, entries: Entries, heads: int | None) -> Leaves:
    """Returns the leaves of `query`, `key`, `value` and `out`.

    Their kernels are `(inputs, heads, size)` and `(heads, size, outputs)`. If the number of heads
    is unknown, they are matrices, which only have to be reshaped.
    """
    leaves: Leaves = {}
    for i, (name, letter) in enumerate(INPUTS.items()):
        weight = _third(entries, "in_proj_weight", i) or entries[f"{letter}_proj_weight"]
        kernel = _split(function, weight._replace(value=weight.value.T), heads)
        leaves["params", name, "kernel"] = kernel
        bias = _third(entries, "in_proj_bias", i)
        if bias is not None:
            leaves["params", name, "bias"] = _split(function, bias, heads)
    weight = entries["out_proj.weight"]
    split = _split(function, weight, heads)
    leaves["params", "out", "kernel"] = Leaf(np.moveaxis(split.value, 0, -1), weight.key)
    if "out_proj.bias" in entries:
        leaves["params", "out", "bias"] = entries["out_proj.bias"]
    return leaves


def _third(entries: Entries, name: str, i: int) -> Leaf | None:
    if name not in entries:
        return None
    value, key = entries[name]
    return Leaf(np.split(value, 3)[i], key)


def _split(function: str, leaf: Leaf, heads: int | None) -> Leaf:
    """Splits the last axis into heads."""
    *others, size = leaf.value.shape
    if heads is None:
        return leaf
    if size % heads:
        _checks.raise_error(
            function,
            f"{leaf.key!r} cannot be split into heads",
            expected=f"a multiple of {heads} heads",
            got=f"{size} features",
            fix="Check the number of heads of the model",
        )
    return Leaf(leaf.value.reshape(*others, heads, size // heads), leaf.key)


def encode(leaves: Leaves, expected: set[str] | None) -> Arrays:
    """Returns the entries of one layer, in PyTorch's order."""
    kernels = {name: leaves["params", name, "kernel"].value for name in INPUTS}
    weights = {name: kernel.reshape(len(kernel), -1).T for name, kernel in kernels.items()}
    joint = len({weight.shape for weight in weights.values()}) == 1
    if expected is not None:
        joint = "in_proj_weight" in expected
    if joint:
        state = {"in_proj_weight": np.concatenate(list(weights.values()))}
    else:
        state = {f"{INPUTS[name]}_proj_weight": weight for name, weight in weights.items()}
    if ("params", "query", "bias") in leaves:
        biases = [leaves["params", name, "bias"].value.reshape(-1) for name in INPUTS]
        state["in_proj_bias"] = np.concatenate(biases)
    out = leaves["params", "out", "kernel"].value
    state["out_proj.weight"] = out.reshape(-1, out.shape[-1]).T
    if ("params", "out", "bias") in leaves:
        state["out_proj.bias"] = leaves["params", "out", "bias"].value
    return state


def alone(leaves: Leaves) -> dict[Path, Leaves]:
    """Returns attention layers by path: modules with four kernels with heads."""
    names = (*INPUTS, "out")
    found: dict[Path, Leaves] = {}
    for path, leaf in leaves.items():
        module = path[1:-2]
        kernels = [("params", *module, name, "kernel") for name in names]
        if path[-2:] != ("query", "kernel") or leaf.value.ndim != 3:
            continue
        if all(each in leaves for each in kernels):
            biases = [(*each[:-1], "bias") for each in kernels]
            own = [each for each in (*kernels, *biases) if each in leaves]
            found[module] = {("params", *each[-2:]): leaves[each] for each in own}
    return found


def heads_of(wanted: Iterable[tuple[Path, tuple[int, ...]]]) -> int | None:
    """Returns the number of heads of the query kernel in `like`, if it has that axis."""
    for path, shape in wanted:
        if path == ("params", "query", "kernel") and len(shape) == 3:
            return shape[1]
    return None
