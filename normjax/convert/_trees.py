"""Takes trees apart into leaves, checks the leaves, and nests them again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from normjax import _checks, _trees
from normjax._trees import Path, nest
from normjax._typing import promote
from normjax.convert._paths import and_more, compare

COLLECTIONS = ("params", "batch_stats")
STATISTICS = ("mean", "var", "count", "u", "sigma")
TOGETHER = (("mean", "var"), ("u", "sigma"))
OF_FEATURES = ("scale", "bias", "mean", "var")

Tree = dict[str, Any]
Trees = tuple[Tree, Tree]


class Leaf(NamedTuple):
    """An array and its name in the source, which errors mention."""

    value: Any
    key: str


Leaves = dict[Path, Leaf]  # paths begin with the collection: ("params", "bn1", "scale")


def flatten(function: str, name: str, tree: Any) -> dict[Path, Any]:
    """Returns the arrays of nested mappings by path; raises for other trees and traced arrays."""
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
            because="and conversions are made of values",
            fix="Convert outside of jax.jit and the like",
        )
    return leaves


def take_apart(
    function: str, params: Any, batch_stats: Any, others: Collection[Path] = ()
) -> Leaves:
    """Returns the leaves of both trees, checked, except those at the paths of `others`."""
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
) -> Trees:
    """Returns both trees, of JAX arrays, checked against `like` if it is given.

    Args:
      function: the name that errors begin with.
      leaves: what was found.
      like: None, or `(params, batch_stats)` with the structure, shapes and dtypes to return.
      key_of: maps the path of a leaf to its name in the source, for errors about missing leaves.
      others: paths of leaves that are not a layer's: they are not checked, and keep their dtypes.
    """
    check(function, {path: leaf for path, leaf in leaves.items() if path not in others}, key_of)
    dtypes: dict[Path, Any] = {}
    if like is not None:
        wanted = expectation(function, like)
        extra = {path for path in leaves if path[-1] == "count" and path not in wanted}
        leaves = {path: leaf for path, leaf in leaves.items() if path not in extra}
        match(function, leaves, wanted, key_of)
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
    """Returns a JAX array of the dtype, or if that is None, of the dtype that layers store.

    That is int32 for counts, at least float32 for statistics, and the value's own for parameters.
    """
    if path[-1] == "count":
        value = np.minimum(value, np.iinfo(np.int32).max)
        return jnp.asarray(value, jnp.int32 if dtype is None else dtype)
    array = jnp.asarray(value, dtype)
    if dtype is None and path[0] == "batch_stats" and path[-1] in STATISTICS:
        return array.astype(promote(array.dtype, jnp.float32))
    return array


def _as_it_is(function: str, leaf: Leaf, dtype: Any) -> Any:
    """Returns a JAX array of the dtype, or if that is None, of the value's own."""
    array = jnp.asarray(leaf.value, dtype)
    if leaf.value.dtype.kind in "iu" and not np.array_equal(array, leaf.value):
        _checks.raise_error(
            function,
            f"{leaf.key!r} has integers that {array.dtype} does not hold",
            expected=f"integers from {np.iinfo(np.int32).min} to {np.iinfo(np.int32).max}",
            got=f"up to {leaf.value.max()}",
            fix="Leave it out, or set jax_enable_x64",
        )
    return array


def match(
    function: str,
    leaves: Leaves,
    wanted: Mapping[Path, Any],
    key_of: Callable[[Path], str] = "/".join,
    *,
    whose: str = "`like`",
    backwards: bool = False,
) -> None:
    """Raises an error for leaves that are missing, too many, or of another shape than wanted.

    `backwards` says that `rename` is called with the wanted names, not with those of the leaves.
    """
    missing = [_bare(path, key_of) for path in wanted if path not in leaves]
    extra = [_bare(path, key_of) for path in leaves if path not in wanted]
    advice = compare(extra, missing) if backwards else compare(missing, extra)
    for path in wanted:
        if path not in leaves:
            beside = sorted(leaf.key for other, leaf in leaves.items() if other[1:-1] == path[1:-1])
            _checks.raise_error(
                function,
                f"{key_of(path)!r} is missing{and_more(missing, 'and so is')}",
                expected=f"a leaf for {'/'.join(path)} of {whose}",
                got=f"{beside or 'nothing'} of the same module, among {len(leaves)} leaves",
                fix=advice or "Pass the whole state; if names differ, pass rename=",
            )
    for path, leaf in leaves.items():
        if path not in wanted:
            beside = sorted("/".join(other) for other in wanted if other[1:-1] == path[1:-1])
            examples = beside or sorted("/".join(other) for other in wanted)[:3]
            _checks.raise_error(
                function,
                f"{leaf.key!r} has no counterpart{and_more(extra, 'and neither has')}",
                expected=f"leaves of {whose}, such as {examples}",
                got=f"{'/'.join(path)} of shape {np.shape(leaf.value)}",
                fix=advice or "Leave it out, or check the names and settings of the model",
            )
        if tuple(wanted[path].shape) != np.shape(leaf.value):
            _wrong_shape(function, leaf, f"{tuple(wanted[path].shape)}, as in {whose}")


def _bare(path: Path, key_of: Callable[[Path], str]) -> str:
    """Returns the name of a leaf in the source, without its collection."""
    return key_of(path).removeprefix(f"{path[0]}/")


def modules_of(leaves: Leaves) -> dict[Path, dict[str, Leaf]]:
    """Returns the leaves of each module by name, from both collections."""
    modules: dict[Path, dict[str, Leaf]] = {}
    for path, leaf in leaves.items():
        modules.setdefault(path[1:-1], {})[path[-1]] = leaf
    return modules


def check(function: str, leaves: Leaves, key_of: Callable[[Path], str] = "/".join) -> None:
    """Raises an error for leaves that do not fit together and for impossible statistics."""
    for path, leaf in leaves.items():
        # linen's wrappers have names such as "layer_instance/kernel/u"
        name = path[-1].rpartition("/")[-1]
        if name in STATISTICS and path[0] == "batch_stats":
            _check_statistics(function, name, leaf)
    for path, module in modules_of(leaves).items():
        _check_complete(function, path, module, key_of)
        if "kernel" not in module and "embedding" not in module:
            _check_shapes(function, [module[name] for name in OF_FEATURES if name in module])


def raise_unknown(function: str, leaf: Leaf, known: Iterable[str]) -> NoReturn:
    """Raises an error for a leaf that has no place on the other side, rather than leave it out."""
    _checks.raise_error(
        function,
        f"{leaf.key!r} has no counterpart",
        expected=f"leaves among {list(known)}",
        got=f"an array of shape {np.shape(leaf.value)}",
        fix="Leave it out, and convert it by hand",
    )


def _check_complete(
    function: str, path: Path, module: dict[str, Leaf], key_of: Callable[[Path], str]
) -> None:
    for pair in TOGETHER:
        absent = [name for name in pair if name not in module]
        if len(absent) == 1:
            _checks.raise_error(
                function,
                f"{key_of(('batch_stats', *path, absent[0]))!r} is missing",
                expected=f"{' and '.join(pair)} together",
                got=f"{sorted(leaf.key for leaf in module.values())}",
                fix="Pass the whole state of the layer",
            )


def _check_shapes(function: str, leaves: list[Leaf]) -> None:
    for leaf in leaves[1:]:
        if np.shape(leaf.value) != np.shape(leaves[0].value):
            _wrong_shape(function, leaf, f"{np.shape(leaves[0].value)}, as {leaves[0].key!r} has")


def _wrong_shape(function: str, leaf: Leaf, expected: str) -> None:
    _checks.raise_error(
        function,
        f"{leaf.key!r} has the wrong shape",
        expected=f"shape {expected}",
        got=f"shape {np.shape(leaf.value)}",
        fix="Check that both sides have the same layer with the same number of features",
    )


def _check_statistics(function: str, name: str, leaf: Leaf) -> None:
    value = np.asarray(leaf.value)
    bad = ~np.isfinite(value.astype(np.complex128))
    if name in ("var", "count"):
        bad |= np.real(value) < 0
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        _checks.raise_error(
            function,
            f"{leaf.key!r} holds values that no statistic can have",
            expected="finite values" + (" of at least 0" if name in ("var", "count") else ""),
            got=f"{bad.sum()} of {bad.size} that are not, such as {value[where]} at {where}",
            fix="Training diverged, or the file is damaged: take an earlier checkpoint",
        )
