"""Determines the order of flattened features, and what to pass if it is unknown."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

from normjax import _checks
from normjax.convert._names import SHOWN, listed
from normjax.convert._sources import TorchModule
from normjax.convert._torch_features import (
    Findings,
    Flattened,
    Order,
    find,
    given_orders,
    is_empty,
)
from normjax.convert._torch_graph import follow_graph
from normjax.convert._torch_groups import CONV1D, Group, modules_in
from normjax.convert._torch_settings import class_names
from normjax.convert._torch_tracing import follow

DEPTH = 6  # the stack level of the call of from_torch or to_torch, for warnings


def read_orders(
    function: str,
    source: Any,
    groups: list[Group],
    kinds: Mapping[str, str],
    like: Any,
    flattened: Flattened | None,
    example_input: Any,
) -> dict[str, list[Order]]:
    """Returns the orders of flattened features; raises an error or warns if they are unknown."""
    found = _findings(source) if isinstance(source, TorchModule) else _suspects(groups)
    known = given_orders(function, flattened or {}, _sizes(groups, kinds))
    if example_input is not None:
        if not isinstance(source, TorchModule):
            _raise_no_module(function, source)
        known = follow(function, source, example_input) | known
    is_told = example_input is not None
    orders: dict[str, list[Order]] = {name: [order] for name, order in known.items()}
    for name, several in found.orders.items():
        own = [order for order in several if order.axis == "out"]
        if name not in known and not is_told:
            own = several
        orders[name] = orders.get(name, []) + own
    if not is_told:
        _check_findings(function, found, known, has_like=like is not None)
    return orders


def _findings(source: Any) -> Findings:
    """Returns where a module flattens images: by its graph, or by its layers if it has none."""
    found = find(source)
    kinds = [class_names(module) for _, module in modules_in(source)]
    may_flatten = any("_ConvNd" in each for each in kinds) and any(
        "Linear" in each for each in kinds
    )
    if is_empty(found) and not may_flatten:
        return found
    graph = follow_graph(source)
    if graph is None:
        return found
    for name, several in found.orders.items():
        own = [order for order in several if order.axis == "out"]
        if own:
            graph.orders[name] = graph.orders.get(name, []) + own
    return graph


def _suspects(groups: list[Group]) -> Findings:
    """Returns the first matrix of a mapping if its inputs are a multiple of the channels before.

    Only such sizes suggest a Flatten, since a mapping only contains layers with arrays. If a
    mapping is sorted by key, as a file may be, the order of the layers is unknown, so the result is
    empty.
    """
    found = Findings({}, {}, {}, {})
    if any(map(_is_sorted, groups)):
        return found
    channels = None
    for layer in groups:
        shape = _shape_of_weight(layer)
        if layer.kind != "layer" or len(shape) == 2:
            positions, rest = divmod(shape[1] if len(shape) == 2 else 0, channels or 1)
            if channels not in (None, 1) and positions > 1 and not rest:
                found.suspects[layer.module] = Order("in", channels, positions)
            return found
        if len(shape) > 2:
            bias = layer.entries.get("bias")
            channels = shape[0] if bias is None else bias.value.size
        elif "running_mean" in layer.entries:
            channels = layer.entries["running_mean"].value.size
    return found


def _check_findings(
    function: str, found: Findings, known: Mapping[str, Order], *, has_like: bool
) -> None:
    seen = {
        name: order
        for name, several in found.orders.items()
        for order in several
        if order.axis == "in" and name not in known
    }
    unknown = {name: size for name, size in found.unknown.items() if name not in known}
    if unknown or (seen and not has_like):
        _raise_unknown_order(function, seen, unknown)
    for name, order in found.suspects.items():
        if name not in known:
            _warn_of_order(
                function,
                name,
                f"has {order.channels * order.positions} inputs, {order.positions} times the "
                f"{order.channels} channels before it, as after flattening (C, H, W)",
            )
    for name, size in found.raw.items():
        if name not in known:
            _warn_of_order(function, name, f"has {size} inputs from a Flatten of the model's input")


def _warn_of_order(function: str, name: str, what: str) -> None:
    warnings.warn(
        f"{function}: {name!r} {what}. If images with several channels are flattened there, the "
        f"order of features differs in Flax: pass flattened={{{name!r}: (channels, height, "
        f"width)}}, or example_input=. If not, pass flattened={{{name!r}: None}}",
        stacklevel=DEPTH,
    )


def _raise_unknown_order(
    function: str, seen: Mapping[str, Order], unknown: Mapping[str, int]
) -> NoReturn:
    names = [*seen, *unknown]
    shapes = [f"{name!r}: ({order.channels}, height, width)" for name, order in seen.items()]
    shapes += [f"{name!r}: (channels, height, width)" for name in unknown]
    sizes = [f"{name!r} {order.channels * order.positions}" for name, order in seen.items()]
    sizes += [f"{name!r} {size}" for name, size in unknown.items()]
    _checks.raise_error(
        function,
        f"a Flatten precedes {listed(names, SHOWN)}, so the order of the features has to be "
        "permuted: PyTorch flattens (C, H, W), Flax (H, W, C)",
        expected="the trees of the Flax model in like=, the sizes in flattened=, or example_input=",
        got=f"none of them for {len(names)} layers, with these numbers of inputs: "
        f"{', '.join(sizes)}",
        fix=f"Pass flattened={{{', '.join(shapes)}}}, or None in place of a shape for no change",
    )


def _raise_no_module(function: str, source: Any) -> NoReturn:
    _checks.raise_error(
        function,
        "example_input takes a module to run",
        expected="a torch.nn.Module as the source",
        got=type(source).__name__,
        fix='Pass the module, or the shape: flattened={"fc": (channels, height, width)}',
        kind=TypeError,
    )


def _sizes(groups: list[Group], kinds: Mapping[str, str]) -> dict[str, int]:
    """Returns the number of inputs of the layers that may follow a Flatten, by name."""
    sizes = {}
    for layer in groups:
        shape = _shape_of_weight(layer)
        if layer.kind == "layer" and len(shape) in (1, 2):
            sizes[layer.module] = shape[0 if kinds.get(layer.module) == CONV1D else -1]
    return sizes


def _is_sorted(layer: Group) -> bool:
    """Returns whether a bias comes before its weight, which is not PyTorch's order."""
    names = [name for name in layer.entries if name in ("bias", "weight")]
    return names == ["bias", "weight"]


def _shape_of_weight(layer: Group) -> tuple[int, ...]:
    # With spectral_norm, "weight_v" is a vector, so "weight_orig" comes first.
    names = ("weight", "weight_orig", "weight_v")
    weights = (layer.entries.get(name) for name in names)
    return next((leaf.value.shape for leaf in weights if leaf is not None), ())
