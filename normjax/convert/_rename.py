"""The argument `rename`: new names for arrays, by a function or a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from normjax import _checks
from normjax.convert._names import beginnings, nearest, unique

Rename = Callable[[str], str] | Mapping[str, str]


def renamed(
    function: str, names: Iterable[str], rename: Rename | None, separator: str
) -> dict[str, str]:
    """Returns the new name of each name.

    A table contains whole names, or their first parts up to a separator. The longest matching entry
    is applied once. An empty new name removes the part, and an empty old name adds a prefix to all
    names that match no other entry. New names may have "/" instead of the separator. Raises an
    error for entries that match nothing, for names that become empty, and for two names that become
    equal.
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
    """Returns the original name of each name that a table has renamed."""
    if rename is None:
        return renamed(function, names, None, separator)
    if not isinstance(rename, Mapping):
        _checks.raise_error(
            function,
            "rename is a function, which cannot be inverted without like=",
            expected="like=, or a table instead of a function",
            got=f"rename={rename!r}",
            fix="Pass like=",
        )
    back: dict[str, str] = {}
    for old, new in rename.items():
        key = _read(str(new), separator)
        if key in back:
            _checks.raise_error(
                function,
                f"rename has two entries with the same new name,  {new!r}",
                expected="an invertible table, or like=",
                got=f"{back[key]!r} and {old!r}",
                fix="Pass like=",
            )
        back[key] = str(old).rstrip("./")
    return renamed(function, names, back, separator)


def by_table(table: Mapping[str, str], name: str, separator: str) -> str:
    """Returns the new name by the longest matching entry, or the name itself if none matches."""
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
        expected="a nonempty str",
        got=f"{new!r}",
        fix="Return the name itself to keep it",
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
                f"rename has an entry for {old!r}, but no array has this name",
                expected=f"names or their first parts, among {len(names)} such as {names[:3]}",
                got=f"{old!r}: {new!r}",
                fix=f"The nearest is {near[0]!r}" if near else "Correct the entry, or leave it out",
            )
