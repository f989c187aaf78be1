"""Finds the paths of the weights of a Keras model in its tree of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from normjax.convert._names import unique


class Weight(NamedTuple):
    """A Keras variable and the layer that created it.

    Attributes:
      key: its path below the model, such as "tower/bn/gamma".
      variable: the `keras.Variable`.
      layer: the layer that created it.
      trained: whether it was created as trainable, even if its layer is frozen.
    """

    key: str
    variable: Any
    layer: Any
    trained: bool


def weights_of(function: str, source: Any) -> list[Weight]:
    """Returns the weights of a layer or model in Keras' order, each with a unique path.

    Keras' own paths do not distinguish the layers of two functional sub-models, so the names of the
    sub-models are added. A layer that is used several times has the path of its first use. Raises
    an error for weights that cannot be distinguished.
    """
    places: dict[int, tuple[str, Any]] = {}
    for layer, path in _layers(source, ""):
        for variable in _own(layer):
            name = _below(variable, layer)
            places.setdefault(id(variable), ("/".join(filter(None, (path, name))), layer))
    found = []
    for index, variable in enumerate(source.weights):
        own = variable.path.removeprefix(f"{source.name}/"), source
        key, layer = places.get(id(variable), own)
        label = f"weight {index} of {source.name}, {variable.path} of shape {tuple(variable.shape)}"
        state = _tracked(layer, "non_trainable")
        trained = all(variable is not other for other in state)
        found.append((key, label, Weight(key, variable, layer, trained)))
    return [*unique(function, found).values()]


def _layers(layer: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[Any, str]]:
    """Yields a layer and all layers inside it once, with their paths."""
    seen = set() if seen is None else seen
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer, path
    for inner in _inner(layer):
        name = _below(inner, layer) if inner.path else inner.name
        yield from _layers(inner, f"{path}/{name}" if path else name, seen)


def _inner(layer: Any) -> list[Any]:
    # Keras 3 has no public list of the layers inside a layer that is not a model, such as the cell
    # of an LSTM.
    return list(getattr(layer, "_layers", None) or getattr(layer, "layers", ()))


def _own(layer: Any) -> list[Any]:
    """Returns the variables that a layer created itself."""
    return [*_tracked(layer, "trainable"), *_tracked(layer, "non_trainable")]


def _tracked(layer: Any, kind: str) -> list[Any]:
    return list(getattr(layer, f"_{kind}_variables", ()))


def _below(inner: Any, layer: Any) -> str:
    """Returns the path of a layer or variable below a layer; only its name if it is elsewhere."""
    above = layer.path or layer.name
    if inner.path.startswith(f"{above}/"):
        return inner.path.removeprefix(f"{above}/")
    return inner.name if layer.path else inner.path
