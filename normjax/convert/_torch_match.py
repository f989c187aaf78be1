"""Compares what a source has with what is wanted, and reports all differences in one error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._names import advice, all_of, nearest
from normjax.convert._trees import Leaf, Leaves


def add(function: str, leaves: Leaves, path: Path, leaf: Leaf) -> None:
    """Adds a leaf; raises an error if another one is at its path, or above or below it."""
    other = leaves.get(path)
    if other is not None:
        _raise_same_path(function, leaf, other, path)
    leaves[path] = leaf


def check_nesting(function: str, leaves: Leaves) -> None:
    """Raises an error if a leaf is where others have a module."""
    for path, leaf in leaves.items():
        for end in range(2, len(path)):
            if path[:end] in leaves:
                _raise_same_path(function, leaf, leaves[path[:end]], path[:end])


def _raise_same_path(function: str, leaf: Leaf, other: Leaf, path: Path) -> NoReturn:
    _checks.raise_error(
        function,
        f"{other.key!r} and {leaf.key!r} would both become {'/'.join(path)}",
        expected="one array for each place",
        got=f"shapes {np.shape(other.value)} and {np.shape(leaf.value)}",
        fix="Give one of them another name with rename=",
    )


def refuse(function: str, others: Collection[Leaf], known: Collection[str]) -> NoReturn:
    """Raises an error that lists all arrays that are not a layer's."""
    first, *more = others
    listed = ", ".join(f"{leaf.key!r} of shape {np.shape(leaf.value)}" for leaf in others)
    _checks.raise_error(
        function,
        f"{first.key!r} has no counterpart" + (f", nor have {len(more)} more" if more else ""),
        expected=f"leaves among {list(known)}",
        got=f"{len(others)} others: {listed}",
        fix='Hand them through with others="keep", or leave them out and convert them by hand',
    )


def match(
    function: str, leaves: Leaves, wanted: Mapping[Path, Any], key_of: Callable[[Path], str]
) -> None:
    """Raises one error for all leaves that are missing, too many, or of another shape."""
    missing = [path for path in wanted if path not in leaves]
    extra = [path for path in leaves if path not in wanted]
    if missing:
        _raise_missing(function, leaves, missing, extra, key_of)
    if extra:
        _raise_extra(function, leaves, wanted, extra)
    wrong = [path for path in wanted if np.shape(leaves[path].value) != tuple(wanted[path].shape)]
    if wrong:
        _raise_shapes(function, leaves, wanted, wrong)


def _raise_missing(
    function: str,
    leaves: Leaves,
    missing: list[Path],
    extra: list[Path],
    key_of: Callable[[Path], str],
) -> NoReturn:
    path = missing[0]
    beside = sorted(leaf.key for other, leaf in leaves.items() if other[1:-1] == path[1:-1])
    got = f"{beside or 'nothing'} of the same module, among {len(leaves)} leaves"
    if len(missing) > 1:
        got += f"; missing are {len(missing)} in all: {all_of([*map(key_of, missing)])}"
    if extra:
        keys = [leaves[other].key for other in extra]
        got += f"; without counterpart are {all_of(keys)}"
    near = nearest(key_of(path), [leaves[other].key for other in extra])
    if near:
        got += f"; the nearest name is {near[0]!r}"
    _checks.raise_error(
        function,
        f"{key_of(path)!r} is missing",
        expected=f"a leaf for {'/'.join(path)} of `like`",
        got=got,
        fix=_fix(missing, extra) or "Pass the whole state; if names differ, pass rename=",
    )


def _raise_extra(
    function: str, leaves: Leaves, wanted: Mapping[Path, Any], extra: list[Path]
) -> NoReturn:
    path = extra[0]
    leaf = leaves[path]
    beside = sorted("/".join(other) for other in wanted if other[1:-1] == path[1:-1])
    examples = beside or sorted("/".join(other) for other in wanted)[:3]
    got = f"{'/'.join(path)} of shape {np.shape(leaf.value)}"
    if len(extra) > 1:
        keys = [leaves[other].key for other in extra]
        got += f"; {len(extra)} in all: {all_of(keys)}"
    _checks.raise_error(
        function,
        f"{leaf.key!r} has no counterpart",
        expected=f"leaves of `like`, such as {examples}",
        got=got,
        fix="Leave it out, or check the names and settings of the model; rename= gives other names",
    )


def _raise_shapes(
    function: str, leaves: Leaves, wanted: Mapping[Path, Any], wrong: list[Path]
) -> NoReturn:
    first, *more = wrong
    got = f"shape {np.shape(leaves[first].value)}"
    if more:
        others = ", ".join(
            f"{leaves[path].key!r} {np.shape(leaves[path].value)} for {tuple(wanted[path].shape)}"
            for path in more
        )
        got += f"; {len(more)} more: {others}"
    _checks.raise_error(
        function,
        f"{leaves[first].key!r} has the wrong shape",
        expected=f"shape {tuple(wanted[first].shape)}, as in `like`",
        got=got,
        fix="Check that both sides have the same layer with the same number of features",
    )


def _fix(missing: list[Path], extra: list[Path]) -> str | None:
    given, wanted = (
        list(dict.fromkeys(".".join(path[1:-1]) for path in paths)) for paths in (extra, missing)
    )
    found = advice(given, wanted)
    return found and f"{found}, or rename the keys"


def match_keys(function: str, state: Collection[str], expected: Collection[str]) -> None:
    """Raises one error for all keys of a state_dict that are missing or too many."""
    extra = [key for key in state if key not in expected]
    missing = [key for key in expected if key not in state]
    if not extra and not missing:
        return
    of_like, of_params = (
        list(dict.fromkeys(key.rpartition(".")[0] for key in keys)) for keys in (missing, extra)
    )
    found = advice(of_like, of_params, ("`like`", "params"))
    only_in = "params and batch_stats" if extra else "`like`"
    _checks.raise_error(
        function,
        f"{(extra + missing)[0]!r} is only in {only_in}",
        expected=f"the {len(expected)} keys of `like`",
        got=f"{len(extra)} too many: {all_of(extra)}; {len(missing)} missing: {all_of(missing)}",
        fix=found or "Check that both sides have the same layers; rename= gives other names",
    )
