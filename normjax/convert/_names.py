"""Compares two sets of dotted names, and says how one becomes the other."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from normjax import _checks

Rename = Mapping[str, str] | Callable[[str], str]

SHOWN = 5


def renamer(function: str, rename: Rename | None, names: Collection[str]) -> Callable[[str], str]:
    """Returns a function from a name to the new one.

    Args:
      function: the name that errors begin with.
      rename: None, a function, or a table. A table has whole names or their first parts, up to a
        dot; the longest entry that fits is taken, once. An empty new name removes the part, an
        empty old one is added to all names that no other entry fits.
      names: all names; an entry of a table that fits none of them is an error.
    """
    if rename is None:
        return lambda name: name
    if isinstance(rename, Mapping):
        table = {str(old).rstrip("./"): str(new) for old, new in rename.items()}
        _check_table(function, table, names)
        return lambda name: _by_table(table, name)
    _checks.must_be_callable(
        function,
        "rename",
        rename,
        expected="a function from a name to a name, or a table of them",
        fix='Pass {"conv1": "Conv_0"}, or lambda key: key.removeprefix("module.")',
    )
    return lambda name: _by_function(function, rename, name)


def inverse(function: str, rename: Rename | None) -> Rename | None:
    """Returns the table that renames back; functions have no inverse."""
    if rename is None:
        return None
    if not isinstance(rename, Mapping):
        _checks.raise_error(
            function,
            "rename is a function, which cannot be inverted without like=",
            expected="like=, whose keys rename is called with, or a table",
            got=f"rename of type {type(rename).__name__}",
            fix="Pass like=module",
        )
    back = {str(new).replace("/", "."): str(old) for old, new in rename.items()}
    if len(back) < len(rename):
        _checks.raise_error(
            function,
            "rename has two entries with one new name",
            expected="a table that can be read backwards, or like=",
            got=f"{dict(rename)}",
            fix="Pass like=module",
        )
    return back


def _by_table(table: Mapping[str, str], name: str) -> str:
    fitting = [old for old in table if _fits(old, name)]
    if not fitting:
        return name
    old = max(fitting, key=len)
    rest = name[len(old) :].strip(".")
    parts = (table[old].replace("/", ".").strip("."), rest)
    return ".".join(part for part in parts if part)


def _fits(old: str, name: str) -> bool:
    return old in ("", name) or name.startswith(f"{old}.")


def _by_function(function: str, rename: Callable[[str], str], name: str) -> str:
    new = rename(name)
    if not isinstance(new, str):
        _checks.raise_error(
            function,
            f"rename returns no name for {name!r}",
            expected="a str",
            got=f"{type(new).__name__}",
            fix="Return the name itself if it is to stay",
            kind=TypeError,
        )
    return new.replace("/", ".").strip(".")


def _check_table(function: str, table: Mapping[str, str], names: Collection[str]) -> None:
    for old in table:
        if not any(_fits(old, name) for name in names):
            _checks.raise_error(
                function,
                f"rename has an entry for {old!r}, which nothing in the source is called",
                expected="names of the source, or their first parts up to a dot",
                got=f"{len(names)} names, the nearest {nearest(old, names)}",
                fix="Correct the entry, or leave it out",
            )


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Returns the names that are most like a name, at most three."""
    parts = {".".join(other.split(".")[: name.count(".") + 1]) for other in names}
    return difflib.get_close_matches(name, sorted({*parts, *names}), 3, 0.5)


def some(names: Collection[str]) -> str:
    """Returns the names for an error: all if they are few, else the first and their number."""
    shown = list(names)
    text = ", ".join(map(repr, shown[:SHOWN]))
    return text if len(shown) <= SHOWN else f"{text} and {len(shown) - SHOWN} more"


def all_of(names: Collection[str]) -> str:
    """Returns every name, for errors that list all that is refused."""
    return ", ".join(map(repr, names))


def advice(
    given: Collection[str],
    wanted: Collection[str],
    sides: tuple[str, str] = ("the source", "`like`"),
) -> str | None:
    """Returns what to pass for `rename`, if the names differ in a system that is recognized.

    Args:
      given: the names of modules that `rename` would be called with, and that are not wanted.
      wanted: the names that are wanted, and that there is no module of.
      sides: what errors call the two.
    """
    given, wanted = (
        [name for name in names if name and name not in others]
        for names, others in ((given, wanted), (wanted, given))
    )
    found = _prefix(given, wanted, sides) or _separators(given, wanted)
    if found:
        return found
    close = {name: difflib.get_close_matches(name, wanted, 1, 0.6) for name in given}
    pairs = {name: found[0] for name, found in close.items() if found}
    if not pairs:
        return None
    return f"The nearest names differ: pass rename={_table(pairs)} if they are meant"


def _prefix(given: Collection[str], wanted: Collection[str], sides: tuple[str, str]) -> str | None:
    """Returns advice if one side's names begin with a prefix, such as 'module.'."""
    for longer, shorter, whose in ((given, wanted, sides[0]), (wanted, given, sides[1])):
        for prefix in _prefixes(longer):
            new = "key.removeprefix({prefix!r})" if longer is given else "{prefix!r} + key"
            new = new.format(prefix=prefix)
            problem = f"The names in {whose} begin with {prefix!r}"
            bare = {name.removeprefix(prefix) for name in longer}
            if bare & {*shorter}:
                return f"{problem}: pass rename=lambda key: {new}"
            if {*map(_unseparated, bare)} & {*map(_unseparated, shorter)}:
                to_underscores = any("_" in name for name in wanted)
                return (
                    f"{problem}, and they differ in their separators: pass rename=lambda key: "
                    f"{_substitution(new, to_underscores=to_underscores)}"
                )
    return None


def _substitution(key: str, *, to_underscores: bool) -> str:
    old, new = (r"\.(\d+)", r"_\1") if to_underscores else (r"_(\d+)", r".\1")
    return f're.sub(r"{old}", r"{new}", {key})'


def _prefixes(names: Collection[str]) -> list[str]:
    firsts = [name.split(".") for name in names if "." in name]
    if not firsts:
        return []
    common = []
    for level in zip(*firsts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ["".join(f"{part}." for part in common[:end]) for end in range(1, len(common) + 1)]


def _separators(given: Collection[str], wanted: Collection[str]) -> str | None:
    """Returns advice if names agree up to their separators, as 'layer1.0' and 'layer1_0' do."""
    plain = {_unseparated(name): name for name in wanted}
    pairs = {name: plain[_unseparated(name)] for name in given if _unseparated(name) in plain}
    if not pairs:
        return None
    old, new = next(iter(pairs.items()))
    if all(re.sub(r"\.(\d+)", r"_\1", name) == other for name, other in pairs.items()):
        fix = f"lambda key: {_substitution('key', to_underscores=True)}"
    elif all(re.sub(r"_(\d+)", r".\1", name) == other for name, other in pairs.items()):
        fix = f"lambda key: {_substitution('key', to_underscores=False)}"
    else:
        fix = _table(pairs)
    return f"The names differ in their separators, as {old!r} and {new!r} do: pass rename={fix}"


def _unseparated(name: str) -> str:
    return re.sub(r"[._/]+", "_", name).strip("_")


def _table(pairs: Mapping[Any, Any]) -> str:
    shown = ", ".join(f"{old!r}: {new!r}" for old, new in list(pairs.items())[:SHOWN])
    return f"{{{shown}{', ...' if len(pairs) > SHOWN else ''}}}"
