"""Reads, replaces and collects the running statistics of models of any kind.

A layer is a dict with `mean` and `var`, and maybe `count`; layers are identified by their paths.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from normjax import _checks, _trees
from normjax._trees import STATISTICS, KeyPath, is_layer, is_nnx
from normjax.statistics.flax_errors import explained
from normjax.statistics.modules import as_training
from normjax.statistics.population import POPULATION

FUNCTION = "recalibrate"
LEAVES = (*STATISTICS, "count")

Layer = dict[str, Any]
Layers = dict[str, Layer]
ApplyFn = Callable[[Any, Any], Any]


class Model(Protocol):
    """A model whose layers can be read and replaced, and can collect calibration statistics.

    Attributes:
      layers: its running statistics.
      static: the static arguments of a call.
      arrays: all other arguments of a call.
    """

    layers: Layers
    static: Any
    arrays: PyTree[Array]

    @staticmethod
    def call(apply_fn: ApplyFn, static: Any, arrays: Any, layers: Layers, batch: Any) -> Layers:
        """Returns the layers after a forward pass that starts from `layers`."""
        ...

    def finish(self, layers: Layers) -> Any:
        """Returns the variables with these statistics."""
        ...


def open_model(variables: Any) -> Model:
    """Returns the model; raises an error if it has no layers."""
    if is_nnx(_batch_stats_of(variables), "State"):
        _checks.raise_error(
            FUNCTION,
            "an nnx.State was passed without its module",
            expected="the nnx.Module",
            got=_contents(variables),
            fix="Pass nnx.merge(graphdef, state), and apply_fn as a function of the module",
            kind=TypeError,
        )
    model = NNX(variables) if is_nnx(variables) else Tree(variables)
    if not model.layers:
        _checks.raise_error(
            FUNCTION,
            "there are no batch statistics",
            expected="variables with a 'mean' and a 'var' side by side in batch_stats",
            got=f"variables with {_contents(variables)}",
            fix="Pass {'params': ..., 'batch_stats': ...}, the pair (params, batch_stats) or an "
            "nnx.Module; layers without running statistics need no recalibration",
        )
    return model


class Tree:
    """Variables in a tree: linen variables, `(params, batch_stats)`, or batch_stats alone."""

    static = None

    def __init__(self, variables: Any):
        self.arrays = variables
        self.layers = _layers_in(_batch_stats_of(variables))

    @staticmethod
    def call(apply_fn: ApplyFn, static: Any, arrays: Any, layers: Layers, batch: Any) -> Layers:
        """Calls `apply_fn(variables, batch)`, which returns `(anything, updates)`.

        `apply_fn` may also be a linen module.
        """
        function = explained(FUNCTION, as_training(apply_fn))
        result = function(_replaced(arrays, layers), batch)
        if not (isinstance(result, tuple) and len(result) == 2):
            _checks.raise_error(
                FUNCTION,
                "apply_fn did not return a pair",
                expected="(anything, batch_stats), or what linen's apply(..., "
                "mutable=['batch_stats']) returns",
                got=_contents(result),
                fix="Return the output first, then the new statistics",
                kind=TypeError,
            )
        returned = _layers_in(_trees.new_batch_stats(result[1]))
        for path in layers:
            if path not in returned:
                _missing(path, returned)
        return {path: returned[path] for path in layers}

    def finish(self, layers: Layers) -> Any:
        """Returns a copy of the variables with these statistics."""
        return _replaced(self.arrays, layers)


class NNX:
    """A module of `flax.nnx`."""

    def __init__(self, module: Any):
        from flax import nnx

        self.module = module
        self.static, self.arrays = nnx.split(module)
        self.layers = {
            path: {leaf: getattr(norm, leaf).get_value() for leaf in LEAVES if hasattr(norm, leaf)}
            for path, norm in _norms(module).items()
        }

    @staticmethod
    def call(apply_fn: ApplyFn, static: Any, arrays: Any, layers: Layers, batch: Any) -> Layers:
        """Calls `apply_fn(module, batch)` on a copy of the module."""
        from flax import nnx

        module = nnx.merge(static, arrays)
        norms = _norms(module)
        for path, layer in layers.items():
            setattr(norms[path], POPULATION, nnx.BatchStat(layer[POPULATION]))
            for leaf in layer.keys() - {POPULATION}:
                getattr(norms[path], leaf).set_value(layer[leaf])
        apply_fn(module, batch)
        return {
            path: {leaf: getattr(norms[path], leaf).get_value() for leaf in layer}
            for path, layer in layers.items()
        }

    def finish(self, layers: Layers) -> Any:
        """Writes the statistics into the module, and returns it."""
        norms = _norms(self.module)
        for path, layer in layers.items():
            for leaf, value in layer.items():
                getattr(norms[path], leaf)[...] = value
        return self.module


def _batch_stats_of(variables: Any) -> Any:
    return _collections(variables)[0]["batch_stats"]


def _collections(variables: Any) -> tuple[_trees.Collections, Callable[[_trees.Collections], Any]]:
    return _trees.collections(variables, known=("batch_stats",), alone="batch_stats")


def _replaced(variables: Any, layers: Layers) -> Any:
    """Returns the variables with the layers at these paths replaced."""

    def replaced(path: KeyPath, node: Any) -> Any:
        if not is_layer(node):
            return node
        kind: Any = type(node)  # also Flax's FrozenDict
        return kind({**node, **layers[_name(path)]})

    found, pack = _collections(variables)
    new = jax.tree.map_with_path(replaced, found["batch_stats"], is_leaf=is_layer)
    return pack(found | {"batch_stats": new})


def _layers_in(batch_stats: Any) -> Layers:
    """Returns the layers of a tree by path; raises an error for a mean or variance alone."""
    nodes, _ = jax.tree.flatten_with_path(batch_stats, is_leaf=is_layer)
    layers = {}
    for path, node in nodes:
        if is_layer(node):
            layers[_name(path)] = {
                leaf: node[leaf] for leaf in (*LEAVES, POPULATION) if leaf in node
            }
        elif path and (alone := _trees.path_names(path)[-1]) in STATISTICS:
            (other,) = set(STATISTICS) - {alone}
            _checks.raise_error(
                FUNCTION,
                "a layer's statistics are not complete",
                expected="'mean' and 'var' side by side",
                got=f"{_name(path)} and no {other!r} beside it",
                fix="Pass batch_stats as the layers' init functions returned them",
            )
    return layers


def _name(path: KeyPath) -> str:
    return _trees.show("batch_stats", path)


def _norms(module: Any) -> dict[str, Any]:
    """Returns the modules with running statistics, by path."""
    from flax import nnx

    def has_statistics(node: Any) -> bool:
        return all(isinstance(getattr(node, leaf, None), nnx.BatchStat) for leaf in STATISTICS)

    named = {
        "".join(f"[{part!r}]" for part in path): node for path, node in nnx.iter_modules(module)
    }
    return {f"model{path}": node for path, node in named.items() if has_statistics(node)}


def _missing(path: str, returned: Collection[str]) -> NoReturn:
    _checks.raise_error(
        FUNCTION,
        "apply_fn did not return the statistics of a layer",
        expected=f"{path}['mean'] and {path}['var'] among what it returns second",
        got=", ".join(sorted(returned)) or "no layer",
        fix="Return the whole batch_stats: (y, batch_stats), or "
        "apply(..., mutable=['batch_stats'])",
    )


def _contents(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {sorted(map(str, value))}"
    return (
        f"{jnp.shape(value)} {value.dtype}"
        if isinstance(value, jax.Array)
        else type(value).__name__
    )
