"""The order of flattened image features: (C, H, W) in PyTorch, (H, W, C) in Flax."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from normjax import _checks
from normjax.convert._leaf import Leaf, Leaves
from normjax.convert._names import nearest
from normjax.convert._torch_groups import modules_in
from normjax.convert._torch_settings import class_names

Flattened = Mapping[str, Sequence[int] | None]

VECTORS = ("scale", "bias", "mean", "var", "negative_slope")
NORMS = {"_BatchNorm", "LayerNorm", "RMSNorm", "PReLU"}
FEATURES_LAST = {"Linear", "LayerNorm", "Embedding", "RNNBase", "MultiheadAttention", "Conv1D"}


class Order(NamedTuple):
    """The features of a layer are a flattened array `(channels, *window)`.

    `axis` selects the inputs of the layer ("in") or its outputs ("out").
    """

    axis: str
    channels: int
    positions: int


class Findings(NamedTuple):
    """What is known about flattened features of a module, by layer name."""

    orders: dict[str, list[Order]]  # after a Flatten with known channels
    unknown: dict[str, int]  # the number of features, after a Flatten with unknown channels
    raw: dict[str, int]  # the same, if no layer with channels precedes the Flatten
    suspects: dict[str, Order]  # there is no Flatten, but the sizes suggest one


def reorder(decoded: Leaves, order: Order, *, back: bool = False) -> Leaves:
    """Reorders the features of a layer's leaves to Flax's order, or `back` to PyTorch's."""
    sizes = (order.channels, order.positions)
    if back:
        sizes = (order.positions, order.channels)
    kernel = decoded.get(("params", "kernel"))
    moved = {}
    for path, leaf in decoded.items():
        axis = _axis(path[-1], leaf, kernel, order)
        value = leaf.value if axis is None else _swap(leaf.value, axis, sizes)
        moved[path] = Leaf(value, leaf.key)
    return moved


def _axis(name: str, leaf: Leaf, kernel: Leaf | None, order: Order) -> int | None:
    """Returns the axis of a leaf that has the flattened features, or None."""
    value, axis = leaf.value, None
    if name == "kernel" and value.ndim == 2:
        axis = 0 if order.axis == "in" else 1
    elif name == "u" and kernel is not None and kernel.value.ndim == 2:
        axis = 1 if _side_of_u(leaf, kernel) == order.axis else None
    elif name in VECTORS and value.ndim == 1:
        # Beside a kernel, these belong to its outputs; in a norm, to its inputs and outputs.
        axis = 0 if kernel is None or order.axis == "out" else None
    fits = axis is not None and value.shape[axis] == order.channels * order.positions
    return axis if fits else None


def _side_of_u(u: Leaf, kernel: Leaf) -> str:
    """Returns whether the vector of spectral_norm belongs to the kernel's inputs or outputs."""
    inputs, outputs = kernel.value.shape
    if inputs != outputs:
        return "in" if u.value.size == inputs else "out"
    return "in" if u.key.endswith("_v") else "out"


def _swap(value: np.ndarray, axis: int, sizes: tuple[int, int]) -> np.ndarray:
    """Transposes an axis of `sizes[0]` times `sizes[1]` elements."""
    moved = np.moveaxis(value, axis, -1)
    split = moved.reshape(*moved.shape[:-1], *sizes)
    return np.moveaxis(split.swapaxes(-1, -2).reshape(moved.shape), -1, axis)


def given_orders(function: str, flattened: Flattened, sizes: Mapping[str, int]) -> dict[str, Order]:
    """Returns the orders in the argument `flattened`; `sizes` has the features of the layers."""
    orders = {}
    for name, shape in flattened.items():
        if name not in sizes:
            _checks.raise_error(
                function,
                f"flattened names {name!r}, which is not a layer with flattened inputs",
                expected='the name of a Linear layer or a norm in the source, such as "fc"',
                got=f"{name!r}, among {nearest(name, sizes) or [*sizes][:9]}",
                fix="Pass the name of the layer after the Flatten, not of the Flatten",
            )
        if shape is None:
            orders[name] = Order("in", 1, sizes[name])
            continue
        if not shape or math.prod(shape) != sizes[name]:
            _checks.raise_error(
                function,
                f"flattened[{name!r}] does not fit the layer",
                expected=f"(channels, height, width) with a product of {sizes[name]}, its inputs",
                got=f"{tuple(shape)}, with a product of {math.prod(shape)}",
                fix="Pass the shape of one example before Flatten, in PyTorch's layout",
            )
        orders[name] = Order("in", int(shape[0]), math.prod(shape[1:]))
    return orders


def find(source: Any) -> Findings:
    """Finds where a module flattens its features, from the sequence of its layers."""
    found = Findings({}, {}, {}, {})
    state = _Walk()
    leaves = [(name, module) for name, module in modules_in(source) if _is_leaf(module)]
    for name, module in leaves:
        state.step(found, name, module, class_names(module))
    return found


def _is_leaf(module: Any) -> bool:
    """Returns whether a module is a layer; layers with weight_norm also have submodules."""
    return not any(name != "parametrizations" for name, _ in module.named_children())


def note(found: Findings, name: str, features: int | None, channels: int | None) -> None:
    """Records a layer with flattened inputs."""
    if features is None or features in (1, channels):
        return
    if channels is None:
        found.raw[name] = features
    elif channels < 1 or features % channels:
        found.unknown[name] = features
    else:
        found.orders.setdefault(name, []).append(Order("in", channels, features // channels))


def is_empty(found: Findings) -> bool:
    """Returns whether no flattening was found."""
    return not any(found)


class _Walk:
    """Follows the number of channels through the layers of a module, in their order."""

    def __init__(self) -> None:
        self.channels: int | None = None  # of an image before a Flatten
        self.is_image = True  # the output of the last layer has channels first, and a window
        self.is_flat = False
        self.flat_features: int | None = (
            None  # of the last Flatten, which other layers may read, too
        )
        self.is_first = True  # no layer with features last came before
        self.linear: tuple[str, Any] | None = None  # the last Linear, for an Unflatten after it

    def step(self, found: Findings, name: str, module: Any, classes: set[str]) -> None:
        """Advances by one layer."""
        if flattens_images(module, classes):
            self.is_flat = self.is_image
        elif "Unflatten" in classes:
            self._unflatten(found, module)
        elif "_ConvNd" in classes:
            self.channels, self.is_image, self.is_flat = module.out_channels, True, False
            self.flat_features = None
        elif pools_to_one(module, classes):
            self.is_image = self.is_flat = False
        elif "Linear" in classes:
            self._linear(found, name, module)
            self.linear = (name, module)
        elif self.is_flat and classes & NORMS:
            note(found, name, size_of_norm(module), self.channels)
        elif classes & {"_NormBase", "GroupNorm"} and self.is_image:
            self.channels = getattr(module, "num_features", getattr(module, "num_channels", None))
        if has_features_last(module, classes) and not self.is_flat:
            self.is_image = self.is_first = False

    def _linear(self, found: Findings, name: str, module: Any) -> None:
        features = module.in_features
        previous = self.linear and self.linear[1].out_features
        if self.is_flat:
            self.flat_features = features
            note(found, name, features, self.channels)
        elif features == self.flat_features and features != previous:
            note(found, name, features, self.channels)
        elif self.is_first and self.is_image and self.channels not in (None, 1):
            positions, rest = divmod(features, self.channels)
            if positions > 1 and not rest:
                found.suspects[name] = Order("in", self.channels, positions)
        self.is_image = self.is_flat = False

    def _unflatten(self, found: Findings, module: Any) -> None:
        shape: list[int] = list(module.unflattened_size)
        if self.linear is not None and module.dim in (1, -1) and len(shape) > 1:
            name, linear = self.linear
            if linear.out_features == math.prod(shape):
                order = Order("out", shape[0], math.prod(shape[1:]))
                found.orders.setdefault(name, []).append(order)
        self.channels, self.is_image, self.is_flat = shape[0], True, False


def flattens_images(module: Any, classes: set[str]) -> bool:
    """Returns whether a layer is a Flatten that joins channels and window."""
    return "Flatten" in classes and module.start_dim in (0, 1)


def has_features_last(module: Any, classes: set[str]) -> bool:
    """Returns whether the input of a layer has its features on the last axis.

    A LayerNorm over several axes normalizes a whole image, and timm's LayerNorm2d channels.
    """
    if "LayerNorm" in classes:
        return len(module.normalized_shape) == 1 and "LayerNorm2d" not in classes
    return bool(classes & FEATURES_LAST)


def pools_to_one(module: Any, classes: set[str]) -> bool:
    """Returns whether a layer reduces to one value per channel."""
    if not any("Adaptive" in name for name in classes):
        return False
    size = getattr(module, "output_size", 1)
    return all(each == 1 for each in (size if isinstance(size, tuple | list) else (size,)))


def size_of_norm(module: Any) -> int | None:
    """Returns the number of features of a PyTorch normalization; None for another module."""
    for name in ("num_features", "normalized_shape", "num_parameters"):
        size = getattr(module, name, None)
        if size is not None:
            return math.prod(size) if isinstance(size, Iterable) else int(size)
    return None
