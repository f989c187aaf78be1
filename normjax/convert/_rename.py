"""New names for arrays: what the argument `rename` says, a function or a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from normjax import _checks
from normjax.convert._names import beginnings, nearest, unique

Rename = Callable[[str], str] | Mapping[str, str]


def renamed(
    function: str, names: Iterable[str], rename: Rename | None, separator: str
) -> dict[str, str]:
    """Returns the new name of each name.

    A table holds whole names, or their first parts up to a separator. The longest entry that fits
    is taken, once. An empty new name removes the part, and an empty old one is added to all names
    that no other entry fits. New names may have "/" in place of the separator. Raises an error for
    entries that fit nothing, for names of which nothing is left, and for two names that become one.
    """
    names = list(names)
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        table = {str(old).rstrip("./"): _read(str(new), separator) for old, new in rename.items()}
        _check_entries(function, table, names, separator)
        found = {name: by_table(table, name, separator) for name in names}
    else:
        _checks.must_be_callable(
            function,
            "rename",
            rename,
            expected="a function from a name to its new name, or a table of names",
            fix='Pass {"old": "new"}, or lambda name: name.removeprefix("module.")',
        )
        found = {name: _by_function(function, rename, name, separator) for name in names}
    for name, new in found.items():
        if not new:
            _raise_for_none(function, name, new)
    unique(function, ((new, name, name) for name, new in found.items()))
    return found


def renamed_back(
    function: str, names: Iterable[str], rename: Rename | None, separator: str
) -> dict[str, str]:
    """Returns the name that each name had before a table renamed it."""
    if rename is None:
        return renamed(function, names, None, separator)
    if not isinstance(rename, Mapping):
        _checks.raise_error(
            function,
            "rename is a function, which cannot be inverted without like=",
            expected="like=, whose names rename is called with, or a table",
            got=f"rename={rename!r}",
            fix="Pass like=",
        )
    back: dict[str, str] = {}
    for old, new in rename.items():
        key = _read(str(new), separator)
        if key in back:
            _checks.raise_error(
                function,
                f"rename has two entries with one new name, {new!r}",
                expected="a table that can be read backwards, or like=",
                got=f"{back[key]!r} and {old!r}",
                fix="Pass like=",
            )
        back[key] = str(old).rstrip("./")
    return renamed(function, names, back, separator)


def by_table(table: Mapping[str, str], name: str, separator: str) -> str:
    """Returns the new name that the longest entry gives, or the name itself if none fits."""
    longest_first = reversed(beginnings(name, separator))
    old = next((beginning for beginning in longest_first if beginning in table), "")
    if old not in table:
        return name
    rest = name[len(old) :].removeprefix(separator)
    return separator.join(part for part in (table[old], rest) if part)


def _read(new: str, separator: str) -> str:
    return new.replace("/", separator).strip(separator)


def _by_function(function: str, rename: Callable[[str], str], name: str, separator: str) -> str:
    new = rename(name)
    if not isinstance(new, str):
        _raise_for_none(function, name, new, TypeError)
    return _read(new, separator)


def _raise_for_none(
    function: str, name: str, new: object, kind: type[Exception] = ValueError
) -> None:
    _checks.raise_error(
        function,
        f"rename returned no name for {name!r}",
        expected="a str that is not empty",
        got=f"{new!r}",
        fix="Return the name itself if it is to stay",
        kind=kind,
    )


def _check_entries(
    function: str, table: Mapping[str, str], names: list[str], separator: str
) -> None:
    known = {beginning for name in names for beginning in beginnings(name, separator)}
    for old, new in table.items():
        if old and old not in known:
            near = nearest(old, sorted(known))
            _checks.raise_error(
                function,
                f"rename has an entry for {old!r}, which no array is called",
                expected=f"names or their first parts, among {len(names)} such as {names[:3]}",
                got=f"{old!r}: {new!r}",
                fix=f"The nearest is {near[0]!r}" if near else "Correct the entry, or leave it out",
            )
