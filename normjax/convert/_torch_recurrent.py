"""Converts LSTM, GRU and RNN of PyTorch to the cells of Flax."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._leaf import Leaf, Leaves
from normjax.convert._sources import Arrays
from normjax.convert._torch_groups import Entries

# In PyTorch's order, with the names in OptimizedLSTMCell, GRUCell and SimpleCell.
GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n"), 1: ("",)}
LAYER = re.compile(r"weight_hh(_l(\d+)(_reverse)?)?")


def decode(function: str, entries: Entries) -> Leaves:
    """Returns the leaves of the cells; several cells are below `l0`, `l0_reverse` and so on."""
    suffixes = _suffixes(entries)
    leaves: Leaves = {}
    for suffix in suffixes:
        inside = (suffix.removeprefix("_"),) if len(suffixes) > 1 else ()
        for (collection, *path), leaf in _decode_cell(function, entries, suffix).items():
            leaves[(collection, *inside, *path)] = leaf
    return leaves


def _suffixes(entries: Entries) -> list[str]:
    """Returns '_l0', '_l0_reverse', '_l1' and so on, for all layers."""
    found = [match for match in map(LAYER.fullmatch, entries) if match is not None]
    found.sort(key=lambda match: (int(match.group(2) or 0), match.group(3) or ""))
    return [match.group(1) or "" for match in found]


def _decode_cell(function: str, entries: Entries, suffix: str) -> Leaves:
    inputs, hidden = entries[f"weight_ih{suffix}"], entries[f"weight_hh{suffix}"]
    size = hidden.value.shape[1]
    gates = GATES[len(hidden.value) // size]
    if inputs.value.ndim != 2 or len(inputs.value) != len(hidden.value):
        _misfit(function, inputs, (len(hidden.value), "inputs"))
    of_inputs, of_hidden = (
        _bias(function, entries, f"bias_{side}{suffix}", hidden) for side in ("ih", "hh")
    )
    leaves: Leaves = {}
    for i, gate in enumerate(gates):
        rows = slice(i * size, (i + 1) * size)
        for side, weight in (("i", inputs), ("h", hidden)):
            kernel = Leaf(weight.value[rows].T, weight.key)
            leaves["params", f"{side}{gate}", "kernel"] = kernel
        if gate == "n":  # the reset gate of a GRU is applied between them
            leaves["params", "in", "bias"] = Leaf(of_inputs.value[rows], of_inputs.key)
            leaves["params", "hn", "bias"] = Leaf(of_hidden.value[rows], of_hidden.key)
        else:
            bias = of_inputs.value[rows] + of_hidden.value[rows]
            side = "h" if len(gates) == 4 else "i"
            leaves["params", f"{side}{gate}", "bias"] = Leaf(bias, of_hidden.key)
    return leaves


def _bias(function: str, entries: Entries, name: str, weight: Leaf) -> Leaf:
    """Returns the bias, or zeros if the layer has none, since Flax's cells always have a bias."""
    zeros = np.zeros(len(weight.value), weight.value.dtype)
    leaf = entries.get(name, Leaf(zeros, weight.key))
    if leaf.value.shape != zeros.shape:
        _misfit(function, leaf, zeros.shape)
    return leaf


def _misfit(function: str, leaf: Leaf, expected: tuple[object, ...]) -> None:
    _checks.raise_error(
        function,
        f"{leaf.key!r} does not fit the recurrent weight",
        expected=f"shape ({', '.join(map(str, expected))},)",
        got=f"shape {leaf.value.shape}",
        fix="Check that both belong to the same layer",
    )


def encode(leaves: Leaves, expected: set[str] | None) -> Arrays:
    """Returns the entries of one layer, in PyTorch's order.

    Args:
      leaves: as `decode` returns them.
      expected: the names that the result should have; None for the names of an nn.LSTM, nn.GRU or
        nn.RNN with biases.
    """
    inside = {path[1] for path in leaves if len(path) == 4}
    names = [f"_{name}" for name in inside] or [""]
    if not inside and (expected is None or "weight_hh_l0" in expected):
        names = ["_l0"]
    state: Arrays = {}
    for suffix in sorted(names, key=_order):
        own = {path[-2:]: leaf.value for path, leaf in leaves.items() if _belongs(path, suffix)}
        state |= {f"{name}{suffix}": value for name, value in _encode_cell(own).items()}
    absent = set() if expected is None else {name for name in state if name not in expected}
    return {
        name: value
        for name, value in state.items()
        if not (name in absent and name.startswith("bias") and not value.any())
    }


def _belongs(path: Path, suffix: str) -> bool:
    return len(path) == 3 or path[1] == suffix.removeprefix("_")


def _order(suffix: str) -> tuple[int, str]:
    number = re.search(r"\d+", suffix)
    return (int(number.group()) if number else 0, suffix)


def _encode_cell(own: dict[Path, np.ndarray]) -> Arrays:
    gates = next(gates for gates in GATES.values() if (f"h{gates[0]}", "kernel") in own)
    weights = {
        side: np.concatenate([own[f"{side}{gate}", "kernel"].T for gate in gates])
        for side in ("i", "h")
    }
    zeros = np.zeros(weights["h"].shape[1], weights["h"].dtype)
    biases = {
        side: [own.get((f"{side}{gate}", "bias"), zeros) for gate in gates] for side in ("i", "h")
    }
    if len(gates) == 4:  # Flax has one bias; PyTorch's second bias is 0
        biases = {"i": biases["h"], "h": biases["i"]}
    return {
        "weight_ih": weights["i"],
        "weight_hh": weights["h"],
        "bias_ih": np.concatenate(biases["i"]),
        "bias_hh": np.concatenate(biases["h"]),
    }


def cells(paths: Iterable[Path]) -> set[Path]:
    """Returns the paths of cells: modules with gates `hi`, `hr` or `h`.

    A SimpleCell counts if it only has `i` and `h`.
    """
    children: dict[Path, set[str]] = {}
    for path in paths:
        if path[0] == "params" and len(path) >= 3 and path[-1] in ("kernel", "bias"):
            children.setdefault(path[:-2], set()).add(path[-2])
    gates = [{f"{side}{gate}" for side in "ih" for gate in names} for names in GATES.values()]
    return {path for path, names in children.items() if names in gates}


def alone(leaves: Leaves) -> dict[Path, Leaves]:
    """Returns the LSTMs and GRUs among all leaves by path.

    A module with only `i` and `h` may be anything, so a SimpleCell is not included.
    """
    found: dict[Path, Leaves] = {}
    of_cells = cells(leaves)
    for path, leaf in leaves.items():
        cell = path[:-2]
        if cell not in of_cells or path[-2] in ("i", "h"):
            continue
        is_one_of_several = len(cell) > 1 and re.fullmatch(r"l\d+(_reverse)?", cell[-1])
        module = cell[1:-1] if is_one_of_several else cell[1:]
        found.setdefault(module, {})[("params", *path[len(module) + 1 :])] = leaf
    return found


def onto(leaves: Leaves, wanted: Iterable[Path]) -> Leaves:
    """Moves the cells of one layer to their paths in `like`, below the layer's path.

    Cells are ordered by the numbers in their names, forward before backward.

    Args:
      leaves: as `decode` returns them.
      wanted: the paths in `like` below the layer's path, beginning with the collection.
    """
    own = sorted(cells(leaves), key=_order_of_cell)
    theirs = sorted(cells(wanted), key=_order_of_cell)
    if len(own) != len(theirs):
        return leaves
    moved = dict(zip(own, theirs, strict=True))
    return {(*moved[path[:-2]], *path[-2:]): leaf for path, leaf in leaves.items()}


def _order_of_cell(path: Path) -> tuple[list[int], bool, Path]:
    name = "/".join(path)
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return numbers, "reverse" in name or "backward" in name, path
