"""Makes a model of any kind one function of variables whose leaves have names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jaxtyping import PyTree

from normjax import _checks, _trees
from normjax._trees import STATISTICS

FUNCTION = "lint"


class Leaf(NamedTuple):
    """A leaf of the variables.

    Attributes:
      collection: "params", "batch_stats", or another collection of linen.
      layer: the names on the path to its layer.
      name: the name of the leaf.
    """

    collection: str
    layer: tuple[str, ...]
    name: str

    @property
    def path(self) -> str:
        """Returns the layer's path as findings show it; "/" for the only layer."""
        return "/".join(self.layer) or "/"

    @property
    def is_statistic(self) -> bool:
        """Returns whether it is a running mean or variance."""
        return self.collection == "batch_stats" and self.name in STATISTICS


class Model(NamedTuple):
    """A model as one function.

    Attributes:
      function: maps variables and x to outputs and updated statistics.
      variables: the collections of variables by name.
      names: the names of the variables' leaves, in their order.
    """

    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    variables: dict[str, PyTree]
    names: list[Leaf]


def open_model(apply_fn: Callable[[Any, Any], Any], variables: Any) -> Model:
    """Returns the model as one function of named variables."""
    _checks.must_be_callable(
        FUNCTION,
        "apply_fn",
        apply_fn,
        expected="a function (variables, x) -> (y, batch_stats)",
        fix="The order is lint(apply_fn, variables, x)",
    )
    if _trees.is_nnx(variables):
        return _of_nnx(apply_fn, variables)
    alone = "batch_stats" if _is_updates(variables) else "params"
    found, pack = _trees.collections(variables, known=("params", "batch_stats"), alone=alone)
    names = _names(found)
    has_statistics = any(name.is_statistic for name in names)

    def function(collections: dict[str, PyTree], x: PyTree) -> tuple[PyTree, PyTree]:
        result = apply_fn(pack(collections), x)
        is_pair = isinstance(result, tuple) and len(result) == 2
        if is_pair and (has_statistics or _is_updates(result[1])):
            return result[0], _trees.new_batch_stats(result[1])
        if has_statistics:
            _raise_without_updates(result)
        return result, {}

    return Model(function, found, names)


def _raise_without_updates(result: Any) -> NoReturn:
    _checks.raise_error(
        FUNCTION,
        "apply_fn returns no new statistics, which training needs",
        expected="(y, batch_stats), or what linen's apply(..., mutable=['batch_stats']) returns",
        got=f"a {type(result).__name__}",
        fix="Call the model in training mode, and return its new statistics after y",
        kind=TypeError,
    )


def _of_nnx(apply_fn: Callable[[Any, Any], Any], module: Any) -> Model:
    from flax import nnx

    states, merge = _trees.split_module(module, nnx.Param, nnx.BatchStat, ...)
    order = ("params", "batch_stats", "others")
    found: dict[str, PyTree] = dict(zip(order, states, strict=True))

    def function(collections: dict[str, PyTree], x: PyTree) -> tuple[PyTree, PyTree]:
        model = merge(*(collections[name] for name in order))
        return apply_fn(model, x), nnx.state(model, nnx.BatchStat)

    return Model(function, found, _names(found))


def _is_updates(updates: Any) -> bool:
    """Returns whether this is a tree of running statistics, which may be empty."""
    if not isinstance(updates, Mapping):
        return False
    names = [leaf.name for leaf in names_in("batch_stats", updates)]
    return all(name in (*STATISTICS, "count") for name in names)


def _names(collections: Mapping[str, PyTree]) -> list[Leaf]:
    return [leaf for name in sorted(collections) for leaf in names_in(name, collections[name])]


def names_in(collection: str, tree: PyTree) -> list[Leaf]:
    """Returns the names of the leaves of a collection, in their order."""
    paths = [_trees.path_names(path) or ("",) for path, _ in jax.tree.leaves_with_path(tree)]
    return [Leaf(collection, path[:-1], path[-1]) for path in paths]
