"""Converts the weight layouts of Keras layers to those of the same Flax layers.

Each function converts the arrays of one layer by name. Names with a slash, such as "ii/kernel",
belong to layers inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from normjax._trees import Path
from normjax.convert._leaf import Leaf

Entries = dict[str, Leaf]
Modules = dict[Path, Entries]

LSTM_GATES = ("i", "f", "g", "o")  # Keras' order
GRU_GATES = ("z", "r", "n")
RECURRENT = ("kernel", "recurrent_kernel", "bias")


def decode(entries: Entries, layer: Any) -> Entries | None:
    """Returns the arrays of a layer with several kernels in Flax's layout; None for others.

    `layer` is the Keras layer, if it is known.
    """
    if "recurrent_kernel" in entries and "kernel" in entries:
        return _decode_cell(entries, layer)
    if "depthwise_kernel" in entries and "pointwise_kernel" in entries:
        return _decode_separable(entries)
    return None


def encode(modules: Modules, taken: Collection[str]) -> Modules:
    """Returns modules with several Flax layers in Keras' layout; the inverse of `decode`.

    `taken` contains the names of the wanted weights, if they are known. Modules with these names
    are not changed.
    """
    found = dict(modules)
    for parent in dict.fromkeys(path[:-1] for path in modules if path):
        for pattern in PATTERNS:
            inside = _children(modules, parent, pattern)
            names = {f"{'/'.join(parent)}/{name}".removeprefix("/") for name in inside}
            fits = pattern.needed <= set(inside) <= pattern.needed | pattern.optional
            if not fits or names & set(taken):
                continue
            for child in pattern.children:
                found.pop((*parent, child))
            found[parent] = found.get(parent, {}) | pattern.join(inside)
            break
    return found


def _children(modules: Modules, parent: Path, pattern: Pattern) -> Entries:
    """Returns the arrays of the inner layers of the pattern, such as "ii/kernel"."""
    return {
        f"{child}/{name}": leaf
        for child in pattern.children
        for name, leaf in modules.get((*parent, child), {}).items()
    }


def depthwise(kernel: np.ndarray) -> np.ndarray:
    """Returns Keras' `(*window, in, multiplier)` as Flax's `(*window, 1, in * multiplier)`."""
    return kernel.reshape(*kernel.shape[:-2], 1, -1)


def is_depthwise(layer: Any) -> bool:
    """Returns whether a Keras layer has one kernel for each channel."""
    names = (kind.__name__ for kind in type(layer).__mro__)
    return any("DepthwiseConv" in name or "SeparableConv" in name for name in names)


# Recurrent cells.


def _decode_cell(entries: Entries, layer: Any) -> Entries | None:
    kernel, recurrent = entries["kernel"].value, entries["recurrent_kernel"].value
    if kernel.ndim != 2 or recurrent.ndim != 2 or kernel.shape[1] != recurrent.shape[1]:
        return None
    gates, rest = divmod(recurrent.shape[1], recurrent.shape[0])
    if rest or gates not in CELLS or getattr(layer, "reset_after", True) is False:
        return None  # Flax has no GRU that resets before its matrix product
    bias = entries.get("bias")
    rows = (2, recurrent.shape[1]) if gates == 3 else (recurrent.shape[1],)
    if bias is not None and bias.value.shape != rows:
        return None
    return CELLS[gates](entries)


def _split(leaf: Leaf, gates: int) -> list[Leaf]:
    parts = np.split(leaf.value, gates, axis=-1)
    return [Leaf(part, leaf.key) for part in parts]


def _bias_of(entries: Entries, gates: int) -> Leaf:
    """Returns the bias, or zeros, since Flax's cells always have one."""
    if "bias" in entries:
        return entries["bias"]
    kernel = entries["kernel"]
    size = kernel.value.shape[-1]
    shape = (2, size) if gates == 3 else (size,)
    return Leaf(np.zeros(shape, kernel.value.dtype), kernel.key)


def _decode_lstm(entries: Entries) -> Entries:
    found = {}
    bias = _split(_bias_of(entries, 4), 4)
    inputs, states = _split(entries["kernel"], 4), _split(entries["recurrent_kernel"], 4)
    for i, gate in enumerate(LSTM_GATES):
        found[f"i{gate}/kernel"] = inputs[i]
        found[f"h{gate}/kernel"] = states[i]
        found[f"h{gate}/bias"] = bias[i]
    return found


def _decode_gru(entries: Entries) -> Entries:
    bias = _bias_of(entries, 3)
    of_inputs, of_states = (_split(Leaf(row, bias.key), 3) for row in bias.value)
    inputs, states = _split(entries["kernel"], 3), _split(entries["recurrent_kernel"], 3)
    found = {}
    for i, gate in enumerate(GRU_GATES):
        found[f"i{gate}/kernel"] = inputs[i]
        found[f"h{gate}/kernel"] = states[i]
        if gate == "n":
            found["in/bias"], found["hn/bias"] = of_inputs[i], of_states[i]
        else:  # both are added before the sigmoid
            found[f"i{gate}/bias"] = Leaf(of_inputs[i].value + of_states[i].value, bias.key)
    return found


def _decode_simple(entries: Entries) -> Entries:
    return {
        "i/kernel": entries["kernel"],
        "i/bias": _bias_of(entries, 1),
        "h/kernel": entries["recurrent_kernel"],
    }


CELLS: dict[int, Callable[[Entries], Entries]] = {
    4: _decode_lstm,
    3: _decode_gru,
    1: _decode_simple,
}


def _join(entries: Entries, names: list[str]) -> np.ndarray:
    return np.concatenate([entries[name].value for name in names], axis=-1)


def _encode_lstm(entries: Entries) -> Entries:
    arrays = (
        _join(entries, [f"i{gate}/kernel" for gate in LSTM_GATES]),
        _join(entries, [f"h{gate}/kernel" for gate in LSTM_GATES]),
        _join(entries, [f"h{gate}/bias" for gate in LSTM_GATES]),
    )
    return _cell(arrays, entries["ii/kernel"].key)


def _encode_gru(entries: Entries) -> Entries:
    of_inputs = _join(entries, [f"i{gate}/bias" for gate in GRU_GATES])
    of_states = np.zeros_like(of_inputs)
    size = entries["hn/bias"].value.size
    of_states[-size:] = entries["hn/bias"].value
    arrays = (
        _join(entries, [f"i{gate}/kernel" for gate in GRU_GATES]),
        _join(entries, [f"h{gate}/kernel" for gate in GRU_GATES]),
        np.stack([of_inputs, of_states]),
    )
    return _cell(arrays, entries["iz/kernel"].key)


def _encode_simple(entries: Entries) -> Entries:
    arrays = (entries[name].value for name in ("i/kernel", "h/kernel", "i/bias"))
    return _cell(arrays, entries["i/kernel"].key)


def _cell(arrays: Any, key: str) -> Entries:
    return {name: Leaf(value, key) for name, value in zip(RECURRENT, arrays, strict=True)}


# Separable convolutions: two convolutions in Flax.


def _decode_separable(entries: Entries) -> Entries:
    kernel = entries["depthwise_kernel"]
    found = {
        "depthwise/kernel": Leaf(depthwise(kernel.value), kernel.key),
        "pointwise/kernel": entries["pointwise_kernel"],
    }
    if "bias" in entries:
        found["pointwise/bias"] = entries["bias"]
    return found


def _encode_separable(entries: Entries) -> Entries:
    kernel = entries["depthwise/kernel"]
    value = kernel.value.reshape(*kernel.value.shape[:-2], -1, 1)  # the most common multiplier
    found = {
        "depthwise_kernel": Leaf(value, kernel.key),
        "pointwise_kernel": entries["pointwise/kernel"],
    }
    if "pointwise/bias" in entries:
        found["bias"] = entries["pointwise/bias"]
    return found


class Pattern(NamedTuple):
    """The arrays of Flax layers that form one Keras layer."""

    needed: set[str]
    optional: set[str]
    join: Callable[[Entries], Entries]

    @property
    def children(self) -> list[str]:
        """Returns the names of the Flax layers."""
        return sorted({name.split("/")[0] for name in self.needed})


def _kernels(gates: tuple[str, ...]) -> set[str]:
    return {f"{side}{gate}/kernel" for side in "ih" for gate in gates}


PATTERNS = (
    Pattern(_kernels(LSTM_GATES) | {f"h{gate}/bias" for gate in LSTM_GATES}, set(), _encode_lstm),
    Pattern(
        _kernels(GRU_GATES) | {"hn/bias"} | {f"i{gate}/bias" for gate in GRU_GATES},
        set(),
        _encode_gru,
    ),
    Pattern({"i/kernel", "i/bias", "h/kernel"}, set(), _encode_simple),
    Pattern({"depthwise/kernel", "pointwise/kernel"}, {"pointwise/bias"}, _encode_separable),
)
