"""Follows channels through the graph of a PyTorch module to find flattened images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from normjax.convert._torch_features import (
    FEATURES_LAST,
    NORMS,
    Findings,
    flattens_images,
    has_features_last,
    note,
    pools_to_one,
    size_of_norm,
)
from normjax.convert._torch_settings import class_names

LAYERS = {"_ConvNd", "Linear", "_NormBase", "GroupNorm"} | NORMS | FEATURES_LAST
# After these operations, channels are on another axis, are new, or have no window.
ENDS = {
    *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "einsum", "t"),
    *("mean", "sum", "amax", "amin", "max", "linear", "matmul", "bmm", "chunk", "split", "unbind"),
    *("getitem", "getattr", "size", "unfold", "fold", "unflatten", "pixel_shuffle", "stack"),
    *("pixel_unshuffle", "scaled_dot_product_attention", "squeeze", "unsqueeze"),
}


class State(NamedTuple):
    """What is known about a value: an image with channels first, or a flattened image."""

    is_flat: bool
    channels: int | None  # None if unknown, -1 for several that were concatenated after flattening


def follow_graph(module: Any) -> Findings | None:
    """Returns where a module flattens images; None if it has no graph.

    `torch.fx` cannot trace modules that branch on values or shapes.
    """
    graph = _trace(module)
    if graph is None:
        return None
    found = Findings({}, {}, {}, {})
    states: dict[Any, State | None] = {}
    is_first = True
    for node in graph.nodes:
        before = (states.get(each) for each in node.all_input_nodes)
        inputs = [state for state in before if state is not None]
        state = inputs[0] if inputs else None
        if node.op == "placeholder":
            state, is_first = (State(False, None) if is_first else None), False
        elif node.op == "call_module":
            layer = module.get_submodule(node.target)
            state = _through_layer(found, node.target, layer, state)
        elif node.op in ("call_function", "call_method"):
            name = getattr(node.target, "__name__", str(node.target)).strip("_")
            state = _through_function(name, node, inputs)
        states[node] = state
    return found


def _trace(module: Any) -> Any:
    from torch import fx

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
            return bool(class_names(m) & LAYERS) or super().is_leaf_module(m, module_qualified_name)

    try:
        with warnings.catch_warnings(), _restored(module):
            warnings.simplefilter("ignore")
            return Tracer().trace(module)
    # Any error that the module's code raises when it is called with a proxy of a tensor.
    except Exception:
        return None


@contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Restores the attributes of all submodules, since a forward pass may store proxies."""
    stored = [attributes for each in module.modules() for attributes in _stores(each)]
    before = [dict(attributes) for attributes in stored]
    try:
        yield
    finally:
        for attributes, values in zip(stored, before, strict=True):
            attributes.clear()
            attributes.update(values)


def _stores(module: Any) -> list[dict[str, Any]]:
    return [vars(module), module._buffers, module._parameters, module._modules]


def _through_layer(found: Findings, name: str, layer: Any, state: State | None) -> State | None:
    classes = class_names(layer)
    if "_ConvNd" in classes:
        return State(False, layer.out_channels)
    if state is None:
        return None
    if state.is_flat and classes & ({"Linear"} | NORMS):
        size = layer.in_features if "Linear" in classes else size_of_norm(layer)
        note(found, name, size, state.channels)
        return None if "Linear" in classes else state
    if flattens_images(layer, classes):
        return State(True, state.channels)
    if has_features_last(layer, classes) or pools_to_one(layer, classes) or "Flatten" in classes:
        return None
    if "Unflatten" in classes:
        return State(False, layer.unflattened_size[0])
    if "PixelShuffle" in classes or "PixelUnshuffle" in classes:
        return State(False, None)
    if "_NormBase" in classes and not state.is_flat:
        return State(False, layer.num_features)
    return state


def _through_function(name: str, node: Any, inputs: list[State]) -> State | None:
    if not inputs or name in ENDS:
        return None
    state = inputs[0]
    arguments = node.args[1:]
    if name in ("flatten", "view", "reshape"):
        if state.is_flat:
            return state
        return State(True, state.channels) if _flattens(name, node, arguments) else None
    if name in ("cat", "concat", "concatenate"):
        return _joined(node, inputs)
    if name.startswith("adaptive"):
        sizes = (*arguments[:1], *node.kwargs.values())
        return None if {1, (1, 1), (1, 1, 1)} & {*map(_hashable, sizes)} else state
    return state


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _flattens(name: str, node: Any, arguments: tuple[Any, ...]) -> bool:
    """Returns whether a call returns `(batch, features)`."""
    if name == "flatten":
        start = node.kwargs.get("start_dim", arguments[0] if arguments else 0)
        return start in (0, 1)
    shape = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else arguments
    return len(shape) == 2


def _joined(node: Any, inputs: list[State]) -> State | None:
    """Returns the state of a concatenation, if all parts are known and of one kind."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
    if len(inputs) < len({*parts}):
        return None
    if all(state.is_flat for state in inputs):
        return State(True, -1)
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if dim not in (1, -3) or any(state.is_flat or state.channels is None for state in inputs):
        return State(False, None)
    return State(False, sum(state.channels or 0 for state in inputs))
