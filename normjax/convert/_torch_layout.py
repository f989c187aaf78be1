"""Maps the arrays of a PyTorch network to paths in Flax trees."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normjax import _checks
from normjax._trees import Path
from normjax.convert import _torch_attention, _torch_layers, _torch_recurrent
from normjax.convert._leaf import COLLECTIONS, Leaf, Leaves
from normjax.convert._names import SHOWN, listed
from normjax.convert._rename import Rename, renamed
from normjax.convert._sources import Arrays
from normjax.convert._torch_features import Flattened, Order, reorder
from normjax.convert._torch_groups import (
    CONV1D,
    EMBEDDING,
    KERNEL,
    SCALE,
    SLOPE,
    WEIGHT,
    Classes,
    Group,
    conv1d_by_shape,
    group,
    is_float,
    read_classes,
)
from normjax.convert._torch_orders import read_orders

DEPTH = 4  # the stack level of the call of from_torch or to_torch, for warnings


@dataclass(frozen=True)
class Layout:
    """The layers of a source, and the mapping of its names, kinds and orders to Flax."""

    function: str
    groups: list[Group]
    others: dict[str, Leaf]
    classes: Classes
    kinds: Mapping[str, str]
    orders: Mapping[str, list[Order]]
    names: Mapping[str, str]  # the new name of each key
    like: Mapping[Path, Any]  # the wanted leaves, if they are known

    def decode(self, layer: Group) -> Leaves:
        """Returns the leaves of a layer by their paths inside the layer."""
        if layer.kind == "recurrent":
            leaves = _torch_recurrent.decode(self.function, layer.entries)
            return _torch_recurrent.onto(leaves, self._inside(layer))
        if layer.kind == "attention":
            heads = self.classes.heads.get(layer.module)
            if heads is None:
                heads = _torch_attention.heads_of(self._inside(layer).items())
            return _torch_attention.decode(self.function, layer.entries, heads)
        size = self._size_of_u(layer)
        kind = self._kind(layer)
        decoded = _torch_layers.decode(self.function, layer.entries, kind, size)
        for order in self.orders.get(layer.module, ()):
            decoded = reorder(decoded, order)
        return decoded

    def path(self, module: str, inside: Path, key: str) -> Path:
        """Returns the path of a leaf, from its path inside its layer and its key in the source."""
        own = key.removeprefix(f"{module}.") if module else key
        new = self.names[key]
        collection, *names = inside
        if new == own or new.endswith(f".{own}"):
            return (collection, *_parts(new[: -len(own)]), *names)
        if len(names) > 1:
            _checks.raise_error(
                self.function,
                f"rename changes {own!r} of {key!r}",
                expected=f"a name that ends in {own!r}, since it becomes several leaves",
                got=repr(new),
                fix="Rename the module in front of it alone",
            )
        return (collection, *_parts(new))

    def path_of_other(self, key: str) -> Path:
        """Returns the path of an array outside of known layers; in `batch_stats` if not trained."""
        parts = _parts(self.names[key])
        for collection in COLLECTIONS:
            if (collection, *parts) in self.like:
                return (collection, *parts)
        is_buffer = key in self.classes.buffers or not is_float(self.others[key].value)
        return (COLLECTIONS[is_buffer], *parts)

    def _inside(self, layer: Group) -> dict[Path, tuple[int, ...]]:
        """Returns the wanted shapes below a layer, by paths inside the layer."""
        key = next(iter(layer.entries.values())).key
        prefix = self.path(layer.module, ("params",), key)
        shapes = {path: tuple(value.shape) for path, value in self.like.items()}
        return {
            ("params", *path[len(prefix) :]): shape
            for path, shape in shapes.items()
            if path[: len(prefix)] == prefix
        }

    def _kind(self, layer: Group) -> str | None:
        """Returns the leaf that the weight becomes, according to its class or else to `like`."""
        if layer.module in self.kinds or "weight" not in layer.entries:
            return self.kinds.get(layer.module)
        names = (SCALE, KERNEL, EMBEDDING, SLOPE, WEIGHT)
        for name in names:
            path = self.path(layer.module, ("params", name), layer.entries["weight"].key)
            if path in self.like and path[-1] in names:
                return path[-1]
        return None

    def _size_of_u(self, layer: Group) -> int | None:
        if "weight_u" not in layer.entries:
            return None
        key = layer.entries["weight_u"].key
        wanted = self.like.get(self.path(layer.module, ("batch_stats", "u"), key))
        return None if wanted is None else math.prod(wanted.shape)


def _parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part]


def read_layout(
    function: str,
    source: Any,
    arrays: Arrays,
    *,
    like: Mapping[Path, Any] | None,
    rename: Rename | None,
    flattened: Flattened | None,
    example_input: Any = None,
) -> Layout:
    """Returns the layout of a module or a mapping.

    Args:
      function: the name that errors begin with.
      source: a `torch.nn.Module`, or a mapping.
      arrays: its arrays.
      like: the wanted leaves; None if they are unknown.
      rename: the argument of `from_torch`.
      flattened: the argument of `from_torch`.
      example_input: the argument of `from_torch`.
    """
    classes = read_classes(source)
    groups, others = group(function, arrays, classes)
    conv1d, doubts = conv1d_by_shape(groups, classes.weights)
    kinds = {**classes.weights, **conv1d}
    if doubts:
        _warn_of_conv1d(function, doubts, kinds)
    orders = read_orders(function, source, groups, kinds, like, flattened, example_input)
    names = renamed(function, arrays, rename, ".")
    return Layout(function, groups, others, classes, kinds, orders, names, like or {})


def _warn_of_conv1d(function: str, doubts: list[str], kinds: Mapping[str, str]) -> None:
    conv1d = [name for name in doubts if kinds.get(name) == CONV1D]
    linear = [name for name in doubts if name not in conv1d]
    readings = []
    if conv1d:
        readings.append(
            f"{listed(conv1d, SHOWN)} as Conv1D's, (in, out), as others of that name are"
        )
    if linear:
        readings.append(f"{listed(linear, SHOWN)} as Linear's, (out, in)")
    warnings.warn(
        f"{function}: some weights are square, so their shapes do not tell whether they are a "
        f"Linear's or a Conv1D's of Hugging Face's. Took {' and '.join(readings)}. Pass the "
        "module: its classes say it",
        stacklevel=DEPTH,
    )
