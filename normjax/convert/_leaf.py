"""Leaves of trees, and checks of the leaves of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from normjax import _checks
from normjax._trees import Path

COLLECTIONS = ("params", "batch_stats")
STATISTICS = ("mean", "var", "count", "u", "sigma")
TOGETHER = (("mean", "var"), ("u", "sigma"))
OF_FEATURES = ("scale", "bias", "mean", "var")


class Leaf(NamedTuple):
    """An array and its name in the source, which errors show."""

    value: Any
    key: str


Leaves = dict[Path, Leaf]  # paths begin with the collection: ("params", "bn1", "scale")


def modules_of(leaves: Leaves) -> dict[Path, dict[str, Leaf]]:
    """Returns the leaves of each module by name, from both collections."""
    modules: dict[Path, dict[str, Leaf]] = {}
    for path, leaf in leaves.items():
        modules.setdefault(path[1:-1], {})[path[-1]] = leaf
    return modules


def check(function: str, leaves: Leaves, key_of: Callable[[Path], str] = "/".join) -> None:
    """Raises an error for leaves that do not fit each other, and for impossible statistics."""
    for path, leaf in leaves.items():
        # linen wrappers have names such as "layer_instance/kernel/u"
        name = path[-1].rpartition("/")[-1]
        if name in STATISTICS and path[0] == "batch_stats":
            _check_statistics(function, name, leaf)
    for path, module in modules_of(leaves).items():
        _check_complete(function, path, module, key_of)
        if "kernel" not in module and "embedding" not in module:
            _check_shapes(function, [module[name] for name in OF_FEATURES if name in module])


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
            expected = f"{np.shape(leaves[0].value)}, as {leaves[0].key!r} has"
            raise_for_shape(function, leaf, expected)


def raise_for_shape(function: str, leaf: Leaf, expected: str, more: str = "") -> NoReturn:
    """Raises an error for a leaf of the wrong shape; the error also lists the other leaves."""
    _checks.raise_error(
        function,
        f"{leaf.key!r} has the wrong shape",
        expected=f"shape {expected}",
        got=f"shape {np.shape(leaf.value)}{more}",
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
            f"{leaf.key!r} has values that a statistic cannot have",
            expected="finite values" + (" of at least 0" if name in ("var", "count") else ""),
            got=f"{bad.sum()} of {bad.size} that are not, such as {value[where]} at {where}",
            fix="Training diverged, or the file is damaged: use an earlier checkpoint",
        )
