"""Functions on names of arrays, and checks that names are unique."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from normjax import _checks

Value = TypeVar("Value")

SHOWN = 5


def beginnings(name: str, separator: str) -> list[str]:
    """Returns the first part of a name, the first two, and so on, up to the whole name."""
    parts = name.split(separator)
    return [separator.join(parts[:end]) for end in range(1, len(parts) + 1)]


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Returns at most three names that are most similar to a name."""
    return difflib.get_close_matches(name, list(names), 3, 0.5)


def listed(names: Iterable[str], most: int | None = None) -> str:
    """Lists names for an error: all names, or the first names and the number of the others."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    left = len(names[most:]) if most is not None else 0
    return f"{shown} and {left} more" if left else shown


def first_of(names: Sequence[object]) -> str:
    """Returns ", the first of 3" for three names, to end a sentence about the first one."""
    return f", the first of {len(names)}" if len(names) > 1 else ""


def unique(function: str, entries: Iterable[tuple[Any, str, Value]]) -> dict[Any, Value]:
    """Returns values by their new names; raises an error if a name is used twice.

    It is also an error if one path is a prefix of another.

    Args:
      function: the name that errors begin with.
      entries: the new name (a path or a str), the name in the source, and the value of each array.
    """
    found: dict[Any, Value] = {}
    sources: dict[Any, str] = {}
    for target, source, value in entries:
        if target in found:
            _raise_for_two(function, target, sources[target], source)
        found[target], sources[target] = value, source
    for target in found:
        for length in range(1, len(target) if isinstance(target, tuple) else 0):
            if target[:length] in found:
                _raise_for_two(function, target[:length], sources[target[:length]], sources[target])
    return found


def _raise_for_two(function: str, target: Any, first: str, second: str) -> NoReturn:
    where = target if isinstance(target, str) else "/".join(target)
    _checks.raise_error(
        function,
        f"two arrays would be stored at {where!r}, so one of them would be lost",
        expected="a separate path for each array",
        got=f"{first!r} and {second!r}",
        fix="Give the layers different names, or pass rename=",
    )
