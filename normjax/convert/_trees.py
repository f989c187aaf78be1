"""Converts trees to leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from normjax import _checks, _trees
from normjax._trees import Path, nest
from normjax._typing import promote
from normjax.convert._leaf import COLLECTIONS, STATISTICS, Leaf, Leaves, check
from normjax.convert._match import match

Tree = dict[str, Any]
Trees = tuple[Tree, Tree]


def flatten(function: str, name: str, tree: Any) -> dict[Path, Any]:
    """Returns the arrays of nested mappings by path; raises an error for other trees."""
    leaves = _trees.flatten(tree)
    for path, leaf in leaves.items():
        where = "/".join((name, *path))
        if path == () or not hasattr(leaf, "shape"):
            _checks.raise_error(
                function,
                f"{where} is not a {'tree' if path == () else 'leaf'}",
                expected="nested dicts of arrays",
                got=type(leaf).__name__,
                fix="Pass the trees as the layer's init function, or the model's, returned them",
                kind=TypeError,
            )
        _trees.check_known(
            function,
            where,
            leaf,
            because="but conversion needs its value",
            fix="Convert outside of jax.jit and other transformations",
        )
    return leaves


def take_apart(
    function: str, params: Any, batch_stats: Any, others: Collection[Path] = ()
) -> Leaves:
    """Returns the leaves of both trees; checks them, except at the paths of `others`."""
    leaves = {
        (collection, *path): Leaf(np.array(value), "/".join((collection, *path)))
        for collection, tree in zip(COLLECTIONS, (params, batch_stats), strict=True)
        for path, value in flatten(function, collection, tree).items()
    }
    check(function, {path: leaf for path, leaf in leaves.items() if path not in others})
    return leaves


def put_together(
    function: str,
    leaves: Leaves,
    like: Any,
    key_of: Callable[[Path], str],
    others: Collection[Path] = (),
    separator: str = "/",
) -> Trees:
    """Returns both trees with JAX arrays; checks them against `like` if it is given.

    Args:
      function: the name that errors begin with.
      leaves: the given leaves.
      like: None, or `(params, batch_stats)` with the structure, shapes and dtypes to return.
      key_of: maps the path of a leaf to its name in the source, for errors about missing leaves.
      others: paths of leaves that do not belong to a known layer; they are not checked, and keep
        their dtypes.
      separator: the separator between the parts of names in the source.
    """
    check(function, {path: leaf for path, leaf in leaves.items() if path not in others}, key_of)
    dtypes: dict[Path, Any] = {}
    if like is not None:
        wanted = expectation(function, like)
        extra = {path for path in leaves if path[-1] == "count" and path not in wanted}
        leaves = {path: leaf for path, leaf in leaves.items() if path not in extra}
        match(function, leaves, wanted, key_of, separator=separator)
        dtypes = {path: value.dtype for path, value in wanted.items()}
    arrays = {}
    for path, leaf in leaves.items():
        dtype = dtypes.get(path)
        is_other = path in others
        arrays[path] = (
            _as_it_is(function, leaf, dtype) if is_other else _as_jax(path, leaf.value, dtype)
        )
    trees = nest(arrays)
    return trees.get("params", {}), trees.get("batch_stats", {})


def expectation(function: str, like: Any) -> dict[Path, Any]:
    """Returns the leaves of `like`, a pair of trees, by path."""
    if not (isinstance(like, tuple | list) and len(like) == 2):
        _checks.raise_error(
            function,
            "like is not a pair of trees",
            expected="(params, batch_stats)",
            got=f"{type(like).__name__}",
            fix='Pass what the init function returned, or (variables["params"], '
            'variables["batch_stats"])',
            kind=TypeError,
        )
    return {
        (collection, *path): value
        for collection, tree in zip(COLLECTIONS, like, strict=True)
        for path, value in flatten(function, f"like/{collection}", tree).items()
    }


def _as_jax(path: Path, value: Any, dtype: Any) -> Any:
    """Returns a JAX array with the dtype; None means the dtype that layers store.

    That is int32 for counts, at least float32 for statistics, and unchanged for parameters.
    """
    if path[-1] == "count":
        value = np.minimum(value, np.iinfo(np.int32).max)
        return jnp.asarray(value, jnp.int32 if dtype is None else dtype)
    array = jnp.asarray(value, dtype)
    if dtype is None and path[0] == "batch_stats" and path[-1] in STATISTICS:
        return array.astype(promote(array.dtype, jnp.float32))
    return array


def _as_it_is(function: str, leaf: Leaf, dtype: Any) -> Any:
    """Returns a JAX array with the dtype; None means the dtype of the value."""
    array = jnp.asarray(leaf.value, dtype)
    if leaf.value.dtype.kind in "iu" and not np.array_equal(array, leaf.value):
        _checks.raise_error(
            function,
            f"{leaf.key!r} has integers that do not fit into {array.dtype}",
            expected=f"integers from {np.iinfo(np.int32).min} to {np.iinfo(np.int32).max}",
            got=f"up to {leaf.value.max()}",
            fix="Leave it out, or set jax_enable_x64",
        )
    return array
