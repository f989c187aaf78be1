"""Reads, names, nests and checks the variables of functions, linen modules and nnx modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey, keystr
from jaxtyping import PyTree

from normjax import _checks

KeyPath = tuple[Any, ...]  # as jax.tree_util makes it
Path = tuple[str, ...]
Collections = dict[str, PyTree]
Mask = PyTree[bool] | Callable[[PyTree], PyTree[bool]]

STATISTICS = ("mean", "var")


# Paths.


def path_of(path: KeyPath) -> Path:
    """Returns a path as the keys of nested dicts, without splitting 'Dense_0/kernel'."""
    return tuple(map(str, _keys(path)))


def path_names(path: KeyPath) -> Path:
    """Returns the names along a path, splitting keys such as 'Dense_0/kernel/scale' and tuples."""
    parts = [part for key in _keys(path) for part in (key if isinstance(key, tuple) else (key,))]
    return tuple(name for part in parts for name in str(part).split("/"))


def _keys(path: KeyPath) -> tuple[Any, ...]:
    """Returns the keys without the `.value` of a boxed array, such as flax.linen.Partitioned."""
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return tuple(
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path
    )


def by_path(tree: PyTree) -> dict[Path, Any]:
    """Returns the leaves of a tree by their paths as keys of nested dicts."""
    return {path_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def show(tree: str, path: KeyPath) -> str:
    """Returns the Python expression of a leaf."""
    return tree + keystr(path)


def flatten(tree: Mapping[Any, Any]) -> dict[Path, Any]:
    """Returns the leaves of nested mappings by path, in order; the inverse of `nest`."""

    def walk(path: Path, node: Any) -> Iterator[tuple[Path, Any]]:
        if not isinstance(node, Mapping):
            yield path, node
            return
        for key, inner in node.items():
            yield from walk((*path, str(key)), inner)

    return dict(walk((), tree))


def nest(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Returns nested dicts from leaves by path."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        inner = tree
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return tree


# Models.


def is_nnx(value: Any, kind: str = "Module") -> bool:
    """Returns whether a value is an instance of a class of `flax.nnx`, without importing Flax."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, getattr(nnx, kind))


def split_module(module: Any, *filters: Any) -> tuple[list[PyTree], Callable[..., Any]]:
    """Returns the states of an nnx module, and a function that builds a module from them."""
    from flax import nnx

    graphdef, *states = nnx.split(module, *filters)
    return states, lambda *states: nnx.merge(graphdef, *states, copy=True)


def open_module(
    params: Any, function: Callable[[Any], PyTree]
) -> tuple[PyTree, Callable[[Any], PyTree]]:
    """Returns the parameters of an nnx module, and a function of them; other trees unchanged."""
    if not is_nnx(params):
        return params, function
    from flax import nnx

    (state, others), merge = split_module(params, nnx.Param, ...)
    return state, lambda state: function(merge(state, others))


def plain(tree: PyTree) -> PyTree:
    """Returns the tree with arrays in place of nnx variables; for a module, its `nnx.Param`s."""
    if is_nnx(tree):
        from flax import nnx

        tree = nnx.state(tree, nnx.Param)

    def is_variable(node: Any) -> bool:
        return is_nnx(node, "Variable")

    return jax.tree.map(
        lambda leaf: leaf.get_value() if is_variable(leaf) else leaf, tree, is_leaf=is_variable
    )


def collections(
    variables: Any, known: tuple[str, ...], alone: str
) -> tuple[Collections, Callable[[Collections], Any]]:
    """Returns variables by collection, and a function that rebuilds the variables from them.

    Args:
      variables: a mapping with one of the `known` collections, the pair `(params, batch_stats)`, or
        a collection by itself.
      known: names of collections.
      alone: the name of a collection by itself.
    """
    if isinstance(variables, Mapping) and set(known) & set(variables):
        kind: Any = type(variables)  # also Flax's FrozenDict
        return dict(variables), kind
    if isinstance(variables, tuple) and len(variables) == 2:
        pair: Collections = {"params": variables[0], "batch_stats": variables[1]}
        return pair, lambda found: (found["params"], found["batch_stats"])
    return {alone: variables}, lambda found: found[alone]


def new_batch_stats(updates: Any) -> Any:
    """Returns the statistics from the second result of a forward pass, such as linen's updates."""
    return updates.get("batch_stats", updates) if isinstance(updates, Mapping) else updates


def is_layer(node: Any) -> bool:
    """Returns whether a node holds the running statistics of one layer."""
    return isinstance(node, Mapping) and all(
        leaf in node and not isinstance(node[leaf], Mapping) for leaf in STATISTICS
    )


def spread(function: str, name: str, mask: Mask, tree: PyTree) -> PyTree[bool]:
    """Returns the mask, or its result for the tree, with a bool for each leaf of the tree.

    Raises an error if the mask has other leaves than bools, or does not fit the tree.
    """
    mask = plain(mask(tree) if callable(mask) else mask)
    chosen = dict(jax.tree.leaves_with_path(mask))
    for path, value in chosen.items():
        if not isinstance(value, (bool, np.bool_)):
            _checks.raise_error(
                function,
                f"{name} has leaves that are not bools",
                expected="True or False for each leaf, known at trace time",
                got=f"{show(name, path)}={value!r}",
                fix="Use Python bools, as decay_mask and scale_invariant return",
                kind=TypeError,
            )

    def choice(path: KeyPath, leaf: Any) -> bool:
        for end in range(len(path), -1, -1):
            if path[:end] in chosen:
                return bool(chosen[path[:end]])
        _checks.raise_error(
            function,
            f"{name} does not fit the parameters",
            expected="a tree with their structure, or a prefix of it",
            got=f"nothing for {show('params', path)} of shape {np.shape(leaf)}",
            fix=f"Make {name} from these parameters, or pass a function that does",
        )

    return jax.tree.map_with_path(choice, tree)


# Checks.


def check_alike(function: str, one: tuple[str, PyTree], other: tuple[str, PyTree]) -> None:
    """Raises an error if two trees, given with their names, differ in leaves or shapes."""
    a, b = (dict(jax.tree.leaves_with_path(tree)) for _, tree in (one, other))
    for path in [*a, *b]:
        if path not in a or path not in b:
            has, lacks = (one[0], other[0]) if path in a else (other[0], one[0])
            problem, expected = "do not have the same leaves", "trees of one structure"
            got = f"{show(has, path)}, which {lacks} lacks"
        elif np.shape(a[path]) != np.shape(b[path]):
            problem = "differ in shape"
            expected = f"shape {np.shape(b[path])}, as {show(other[0], path)} has"
            got = f"shape {np.shape(a[path])} for {show(one[0], path)}"
        else:
            continue
        _checks.raise_error(
            function,
            f"{one[0]} and {other[0]} {problem}",
            expected=expected,
            got=got,
            fix=f"Pass {one[0]} and {other[0]} of the same model",
        )


def check_arrays(function: str, name: str, tree: PyTree) -> None:
    """Raises an error for leaves that are not arrays."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float, complex)):
            _checks.raise_error(
                function,
                f"{name} has leaves that are not arrays",
                expected="a tree of arrays",
                got=f"{show(name, path)} of type {type(leaf).__name__}",
                fix="Pass what the model's init returned, or a part of it",
                kind=TypeError,
            )


def check_known(function: str, name: str, leaf: Any, *, because: str, fix: str) -> None:
    """Raises an error for a traced array, whose values are unknown."""
    if isinstance(leaf, Tracer):
        _checks.raise_error(
            function,
            f"{name} is traced, {because}",
            expected="arrays",
            got=str(leaf.aval),
            fix=fix,
            kind=TypeError,
        )


def check_finite(
    function: str,
    name: str,
    tree: PyTree,
    fix: str = "Find the step that produced them: jax.config.update('jax_debug_nans', True)",
) -> None:
    """Raises an error for NaN and infinities; traced values are not checked."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        with jax.ensure_compile_time_eval():  # also for constants in a program that is being traced
            # jnp would round NumPy's float64 to float32 first, in which 1e300 is infinite.
            isfinite = jnp.isfinite if isinstance(leaf, jax.Array) else np.isfinite
            bad = ~isfinite(leaf)
            count = int(bad.sum())
            if not count:
                continue
            first = tuple(int(i) for i in jnp.argwhere(bad, size=1)[0])
            value = leaf[first] if first else leaf
        _checks.raise_error(
            function,
            f"{name} is not finite",
            expected="finite numbers",
            got=f"{count} NaN or infinite of {np.size(leaf)} in {show(name, path)}, "
            f"the first at {first}: {value}",
            fix=fix,
        )
