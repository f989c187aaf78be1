"""Compares given and wanted leaves, and reports all differences in one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._advice import advice
from normjax.convert._leaf import Leaf, Leaves, raise_for_shape
from normjax.convert._names import first_of, listed
from normjax.convert._sources import Arrays

KeyOf = Callable[[Path], str]


def match(
    function: str,
    leaves: Leaves,
    wanted: Mapping[Path, Any],
    key_of: KeyOf = "/".join,
    *,
    whose: str = "`like`",
    backwards: bool = False,
    separator: str = "/",
) -> None:
    """Raises an error for leaves that are missing, superfluous, or of another shape.

    Args:
      function: the name that errors begin with.
      leaves: the given leaves.
      wanted: arrays or their shapes and dtypes.
      key_of: maps the path of a leaf to its name in the source.
      whose: the name of the wanted leaves in errors.
      backwards: whether `rename` is called with the wanted names instead of the given names.
      separator: the separator between the parts of names in the source.
    """
    missing = [path for path in wanted if path not in leaves]
    extra = [path for path in leaves if path not in wanted]
    if missing or extra:
        found, expected = ([_bare(path, key_of) for path in side] for side in (leaves, wanted))
        given, other = (expected, found) if backwards else (found, expected)
        fix = advice(given, other, separator)
        if missing:
            _raise_for_missing(function, leaves, missing, extra, key_of, whose, fix)
        _raise_for_extra(function, leaves, wanted, extra, whose, fix)
    shapes = ((leaves[path], tuple(value.shape)) for path, value in wanted.items())
    _check_shapes(function, shapes, whose)


def _bare(path: Path, key_of: KeyOf) -> str:
    """Returns the name of a leaf in the source, without its collection."""
    return key_of(path).removeprefix(f"{path[0]}/")


def _raise_for_missing(
    function: str,
    leaves: Leaves,
    missing: list[Path],
    extra: list[Path],
    key_of: KeyOf,
    whose: str,
    fix: str | None,
) -> None:
    path = missing[0]
    beside = sorted(leaf.key for other, leaf in leaves.items() if other[1:-1] == path[1:-1])
    got = f"{beside or 'nothing'} of the same module, among {len(leaves)} leaves"
    if len(missing) > 1:
        got += f"; missing: {listed(map(key_of, missing))}"
    if extra:
        got += f"; without counterpart: {listed(leaves[other].key for other in extra)}"
    _checks.raise_error(
        function,
        f"{key_of(path)!r} is missing{first_of(missing)}",
        expected=f"a leaf for {'/'.join(path)} of {whose}",
        got=got,
        fix=fix or "Pass the whole state; if names differ, pass rename=",
    )


def _raise_for_extra(
    function: str,
    leaves: Leaves,
    wanted: Mapping[Path, Any],
    extra: list[Path],
    whose: str,
    fix: str | None,
) -> None:
    path = extra[0]
    beside = sorted("/".join(other) for other in wanted if other[1:-1] == path[1:-1])
    examples = beside or sorted("/".join(other) for other in wanted)[:3]
    got = f"{'/'.join(path)} of shape {np.shape(leaves[path].value)}"
    if len(extra) > 1:
        got += f"; without counterpart: {listed(leaves[other].key for other in extra)}"
    _checks.raise_error(
        function,
        f"{leaves[path].key!r} has no counterpart{first_of(extra)}",
        expected=f"leaves of {whose}, such as {examples}",
        got=got,
        fix=fix or "Leave it out, or check the names and settings of the model",
    )


def conform(
    function: str, state: Arrays, expected: Mapping[str, np.ndarray], separator: str = "/"
) -> Arrays:
    """Returns the state in the order and the dtypes of the expected state.

    Raises an error for other keys or shapes. `rename` is called with the expected names.
    """
    extra = [key for key in state if key not in expected]
    missing = [key for key in expected if key not in state]
    if extra or missing:
        only_in = "params and batch_stats" if extra else "`like`"
        sides = (extra, "too many"), (missing, "missing")
        _checks.raise_error(
            function,
            f"{(extra + missing)[0]!r} is only in {only_in}",
            expected=f"the {len(expected)} keys of `like`",
            got="; ".join(f"{len(keys)} {what}: {listed(keys)}" for keys, what in sides if keys),
            fix=advice(expected, state, separator)
            or "Check that both sides have the same layers under the same names",
        )
    shapes = ((Leaf(state[key], key), wanted.shape) for key, wanted in expected.items())
    _check_shapes(function, shapes, "`like`")
    return {key: state[key].astype(wanted.dtype) for key, wanted in expected.items()}


def _check_shapes(
    function: str, leaves: Iterable[tuple[Leaf, tuple[int, ...]]], whose: str
) -> None:
    wrong = [(leaf, shape) for leaf, shape in leaves if np.shape(leaf.value) != shape]
    if not wrong:
        return
    (first, wanted), *others = wrong
    listed_others = ", ".join(
        f"{leaf.key!r} {np.shape(leaf.value)} for {shape}" for leaf, shape in others
    )
    more = f"; {len(others)} more: {listed_others}" if others else ""
    raise_for_shape(function, first, f"{wanted}, as in {whose}", more)
