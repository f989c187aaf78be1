"""Models of any kind as one function of a tree of variables, whose leaves are named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from normjax import _checks

FUNCTION = "lint"
STATISTICS = ("mean", "var")


class Leaf(NamedTuple):
    """A leaf of the variables.

    Attributes:
      collection: "params", "batch_stats", or another of linen's.
      layer: the names on the path to it.
      name: its own.
    """

    collection: str
    layer: tuple[str, ...]
    name: str

    @property
    def path(self) -> str:
        """The layer's path, as findings have it; "/" where there is but one layer."""
        return "/".join(self.layer) or "/"

    @property
    def is_statistic(self) -> bool:
        """Whether it is a running mean or variance."""
        return self.collection == "batch_stats" and self.name in STATISTICS


class Model(NamedTuple):
    """A model.

    Attributes:
      function: from variables and x to outputs and new statistics.
      variables: collections by their names.
      names: of the leaves of the variables, in their order.
    """

    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    variables: dict[str, PyTree]
    names: list[Leaf]


def open_model(apply_fn: Callable[[Any, Any], Any], variables: Any) -> Model:
    """Returns the model."""
    _checks.must_be_callable(
        FUNCTION,
        "apply_fn",
        apply_fn,
        expected="a function (variables, x) -> (y, batch_stats)",
        fix="The order is lint(apply_fn, variables, x)",
    )
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(variables, nnx.Module):
        return _of_nnx(apply_fn, variables)
    collections, pack = _collections(variables)
    names = _names(collections)
    has_statistics = any(name.is_statistic for name in names)

    def function(collections: dict[str, PyTree], x: PyTree) -> tuple[PyTree, PyTree]:
        result = apply_fn(pack(collections), x)
        if (
            isinstance(result, tuple)
            and len(result) == 2
            and (has_statistics or _is_updates(result[1]))
        ):
            updates = result[1]
            return result[0], updates.get("batch_stats", updates) if isinstance(
                updates, Mapping
            ) else updates
        if has_statistics:
            _checks.raise_error(
                FUNCTION,
                "apply_fn returns no new statistics, and they are half of what training does",
                expected="(y, batch_stats), or what linen's apply(..., mutable=['batch_stats']) returns",
                got=f"a {type(result).__name__}",
                fix="Call the model in training mode, and return its new statistics behind the output",
                kind=TypeError,
            )
        return result, {}

    return Model(function, collections, names)


def _of_nnx(apply_fn: Callable[[Any, Any], Any], module: Any) -> Model:
    from flax import nnx

    graphdef, params, batch_stats, others = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    collections = {"batch_stats": batch_stats, "others": others, "params": params}

    def function(collections: dict[str, PyTree], x: PyTree) -> tuple[PyTree, PyTree]:
        model = nnx.merge(
            graphdef,
            *(collections[name] for name in ("params", "batch_stats", "others")),
            copy=True,
        )
        return apply_fn(model, x), nnx.state(model, nnx.BatchStat)

    return Model(function, collections, _names(collections))


def _collections(variables: Any) -> tuple[dict[str, PyTree], Callable[[dict[str, PyTree]], Any]]:
    """Returns the variables by collection, and what makes of those the variables again."""
    if isinstance(variables, Mapping) and {"params", "batch_stats"} & set(variables):
        kind: Any = type(variables)  # Flax's FrozenDict, too
        return dict(variables), kind
    if isinstance(variables, tuple) and len(variables) == 2:
        pair = {"params": variables[0], "batch_stats": variables[1]}
        return pair, lambda collections: (collections["params"], collections["batch_stats"])
    alone = "batch_stats" if _is_updates(variables) else "params"
    return {alone: variables}, lambda collections: collections[alone]


def _is_updates(updates: Any) -> bool:
    """Whether that is a tree of statistics, maybe an empty one."""
    return isinstance(updates, Mapping) and all(
        leaf.name in (*STATISTICS, "count") for leaf in _names({"batch_stats": updates})
    )


def _names(collections: Mapping[str, PyTree]) -> list[Leaf]:
    return [
        Leaf(collection, *name_of(path))
        for collection in sorted(collections)
        for path, _ in jax.tree.leaves_with_path(collections[collection])
    ]


def name_of(path: tuple[Any, ...]) -> tuple[tuple[str, ...], str]:
    """Returns the names on the way to a leaf, and its own."""
    if len(path) > 1 and getattr(path[-1], "name", None) == "value":
        path = path[:-1]  # a box around the array
    names = [part for key in path for part in jax.tree_util.keystr((key,), simple=True).split("/")]
    return tuple(names[:-1]), names[-1] if names else ""
