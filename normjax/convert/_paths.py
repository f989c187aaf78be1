"""Names of arrays: renamed by the user, each used once, and compared if they do not match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn, TypeVar, get_args

from normjax import _checks

Rename = Callable[[str], str] | Mapping[str, str]
Others = Literal["keep", "refuse"]
Value = TypeVar("Value")

LISTED = 40  # of the names in an error

SEPARATORS = re.compile(r"[./_]+")


def renamed(
    function: str, keys: Iterable[str], rename: Rename | None, separator: str
) -> dict[str, str]:
    """Returns the new name of each key, by a function or a table.

    A table holds whole keys, or leading parts of keys that end at a separator. The longest entry
    that fits counts. An empty new name removes the part, and an empty old one adds it to all other
    keys. Raises an error for entries that fit no key, and for two keys of one new name.
    """
    keys = list(keys)
    if rename is None:
        return {key: key for key in keys}
    if isinstance(rename, Mapping):
        rename = _by_table(function, keys, rename, separator)
    _checks.must_be_callable(
        function,
        "rename",
        rename,
        expected="a function from a name to its new name, or a dict of such names",
        fix='Pass a dict such as {"old": "new"}',
    )
    names: dict[str, str] = {}
    for key in keys:
        names[key] = rename(key)
        if not isinstance(names[key], str):
            _checks.raise_error(
                function,
                f"rename returned no name for {key!r}",
                expected="a str for each key",
                got=f"{names[key]!r}",
                fix="Return the key itself where it stays as it is",
                kind=TypeError,
            )
    unique(function, ((new, key, key) for key, new in names.items()))
    return names


def renamed_back(
    function: str, keys: Iterable[str], rename: Rename | None, separator: str
) -> dict[str, str]:
    """Returns the name that each key had before a table renamed it; functions have no inverse."""
    if rename is None or isinstance(rename, Mapping):
        entries = ((new, old, old) for old, new in (rename or {}).items())
        return renamed(function, keys, unique(function, entries) or None, separator)
    _checks.raise_error(
        function,
        "rename is a function, which has no inverse without like=",
        expected="like=, whose names rename is called with, or a dict",
        got=f"rename={rename!r}",
        fix="Pass like=",
    )


def _by_table(
    function: str, keys: list[str], table: Mapping[str, str], separator: str
) -> Callable[[str], str]:
    """Returns a function that renames by the table; raises for entries that fit no key."""
    ends = {old.removesuffix(separator): new.removesuffix(separator) for old, new in table.items()}
    longest_first = sorted(ends, key=len, reverse=True)
    beginnings = {begin: None for key in keys for begin in _beginnings(key, separator)}
    for old, new in ends.items():
        if old and old not in beginnings:
            nearest = difflib.get_close_matches(old, beginnings, n=1, cutoff=0.5)
            _checks.raise_error(
                function,
                f"rename has {old!r}, which is not the name or the beginning of any array",
                expected=f"parts of {len(keys)} names, such as {keys[:3]}",
                got=f"{old!r}: {new!r}",
                fix=f"The nearest is {nearest[0]!r}" if nearest else "Print the source's names",
            )

    def entry_of(key: str) -> str | None:
        fits = _beginnings(key, separator)
        return next((old for old in longest_first if old in fits or not old), None)

    def rename(key: str) -> str:
        old = entry_of(key)
        if old is None:
            return key
        rest = key[len(old) :].removeprefix(separator)
        return separator.join(part for part in (ends[old], rest) if part)

    return rename


def _beginnings(key: str, separator: str) -> list[str]:
    parts = key.split(separator)
    return [separator.join(parts[:end]) for end in range(1, len(parts) + 1)]


def unique(function: str, entries: Iterable[tuple[Any, str, Value]]) -> dict[Any, Value]:
    """Returns values by their new names; raises an error, with both sources, for a name used twice.

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


def _raise_for_two(function: str, target: Any, first: str, second: str) -> None:
    where = target if isinstance(target, str) else "/".join(target)
    _checks.raise_error(
        function,
        f"two arrays would be stored at {where!r}, and one of them be lost",
        expected="a path of its own for each array",
        got=f"{first!r} and {second!r}",
        fix="Give the layers different names, or pass rename=",
    )


def compare(missing: list[str], extra: list[str]) -> str | None:
    """Returns a sentence that says how to rename the extra names to the missing ones.

    Names are compared without a prefix, then without regard to separators, then by likeness. None
    if no two names are alike.
    """
    if not (missing and extra):
        return None
    return (
        _by_prefix(missing, extra)
        or _by_separators(missing, extra)
        or _nearest_pair(missing, extra)
    )


def _by_prefix(missing: list[str], extra: list[str]) -> str | None:
    """Looks for a prefix that makes names of one side those of the other."""
    prefix = _prefix(extra, set(missing))
    if prefix is not None:
        count = sum(name.startswith(prefix) for name in extra)
        return (
            f"The prefix {prefix!r} of {count} of the {len(extra)} names without a counterpart is "
            f"too many: pass rename={{{prefix[:-1]!r}: ''}}"
        )
    prefix = _prefix(missing, set(extra))
    if prefix is not None:
        return f"The names lack the prefix {prefix!r}: pass rename=lambda name: {prefix!r} + name"
    return None


def _prefix(names: list[str], others: set[str]) -> str | None:
    """Returns the beginning of a name, with its separator, after which it is one of the others."""
    for name in names:
        for separator in re.finditer(r"[./]", name):
            if name[separator.end() :] in others:
                return name[: separator.end()]
    return None


def _by_separators(missing: list[str], extra: list[str]) -> str | None:
    """Looks for names that only differ in separators, as layer1.0 and layer1_0."""
    plain = {SEPARATORS.sub("_", name): name for name in missing}
    for name in extra:
        if (other := plain.get(SEPARATORS.sub("_", name))) is not None:
            return _suggest(name, other, "they differ in separators")
    return None


def _nearest_pair(missing: list[str], extra: list[str]) -> str | None:
    for name in extra[:20]:  # a comparison of all names would take long in large networks
        nearest = difflib.get_close_matches(name, missing, n=1, cutoff=0.6)
        if nearest:
            return _suggest(name, nearest[0], "it is the nearest name")
    return None


def _suggest(name: str, other: str, why: str) -> str:
    """Returns a suggestion to rename the beginning in which two names differ."""
    end = 0
    while end < min(len(name), len(other)) and name[-1 - end] == other[-1 - end]:
        end += 1
    tail = name[len(name) - end :]
    boundary = re.search(r"[./]", tail)
    cut = end - boundary.start() if boundary else 0
    old, new = name[: len(name) - cut], other[: len(other) - cut]
    return f"Is {name!r} {other!r} of the other side ({why})? Pass rename={{{old!r}: {new!r}}}"


def and_more(names: list[str], words: str) -> str:
    """Returns the names after the first, with words before them, for an error that lists all."""
    more = names[1:]
    if not more:
        return ""
    rest = f", and {len(more) - LISTED} more" if len(more) > LISTED else ""
    return f", {words} {', '.join(map(repr, more[:LISTED]))}{rest}"


def check_others(function: str, others: object) -> None:
    """Raises an error for another word than those of `Others`."""
    _checks.choice(function, "others", others, get_args(Others))


def raise_for_others(
    function: str, refused: list[tuple[str, tuple[int, ...]]], known: Iterable[str], others: Others
) -> NoReturn:
    """Raises one error for all arrays, names and shapes, that no known layer has."""
    names = [name for name, _ in refused]
    problem = f"{names[0]!r} has no counterpart{and_more(names, 'and neither has')}"
    shapes = [shape for _, shape in refused[:LISTED]]
    advice = "Leave it out, and convert it by hand: its layer would compute something else without"
    if others == "refuse":
        advice = 'Pass others="keep" to hand it through unchanged, or leave it out'
    _checks.raise_error(
        function,
        problem,
        expected=f"leaves among {list(known)}",
        got=f"an array of shape {shapes[0]}" if len(names) == 1 else f"arrays of shapes {shapes}",
        fix=advice,
    )
