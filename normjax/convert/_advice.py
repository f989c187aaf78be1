"""Finds the `rename` to pass if the names of two sides do not match."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from normjax.convert._rename import by_table

LIKENED = 100  # the number of names that are compared by letters, which is slow


class Match(NamedTuple):
    """The difference between names in words, and the pairs of corresponding names."""

    words: str
    pairs: Mapping[str, str]


def advice(given: Iterable[str], wanted: Iterable[str], separator: str) -> str | None:
    """Returns a sentence with the `rename` that maps given names to wanted names.

    Names are compared without a prefix, without separators, and without both; the comparison that
    pairs the most names is used. If none pairs any, the most similar names are paired. Module names
    are compared first, then whole names. The result is None if no names are similar.

    Args:
      given: all names that `rename` is called with.
      wanted: all names of the other side.
      separator: the separator between the parts of names.
    """
    sides = [*dict.fromkeys(given)], [*dict.fromkeys(wanted)]
    modules = [[*dict.fromkeys(name.rpartition(separator)[0] for name in side)] for side in sides]
    return _advice(modules[0], modules[1], separator) or _advice(*sides, separator)


def _advice(given: list[str], wanted: list[str], separator: str) -> str | None:
    kept = {*given} & {*wanted, ""}
    given, wanted = (
        [name for name in side if name and name not in kept] for side in (given, wanted)
    )
    ways = (
        _by_prefix(given, wanted, separator, str),
        _by_letters(given, wanted),
        _by_prefix(given, wanted, separator, _letters),
    )
    certain = [way for way in ways if way is not None]
    if certain:
        found = max(certain, key=lambda way: len(way.pairs))
    else:
        found = _by_likeness(given, wanted, separator)
    return found and f"{found.words}: pass rename={_table(found.pairs, kept, separator)}"


def _by_prefix(
    given: list[str], wanted: list[str], separator: str, form: Callable[[str], str]
) -> Match | None:
    """Finds the prefix without which most names of one side are names of the other side."""
    for longer, shorter, verb in (
        (given, wanted, "begin with"),
        (wanted, given, "lack the prefix"),
    ):
        forms = {form(name): name for name in shorter}
        found: dict[str, dict[str, str]] = {}
        for name in longer:
            for prefix, rest in _splits(name, separator):
                if form(rest) in forms:
                    found.setdefault(prefix, {})[name] = forms[form(rest)]
                    break
        if found:
            prefix, pairs = max(found.items(), key=lambda item: len(item[1]))
            words = f"{len(pairs)} of {len(given)} names without a counterpart {verb} {prefix!r}"
            if form is not str:
                words += ", and differ in their separators"
            if longer is wanted:
                pairs = {short: long for long, short in pairs.items()}
            return Match(words, pairs)
    return None


def _splits(name: str, separator: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(re.escape(separator), name):
        yield name[: found.end()], name[found.end() :]


def _by_letters(given: list[str], wanted: list[str]) -> Match | None:
    """Finds names that only differ in separators, such as layer1.0 and layer1_0."""
    letters = {_letters(name): name for name in wanted}
    pairs = {name: letters[_letters(name)] for name in given if _letters(name) in letters}
    if not pairs:
        return None
    old, new = next(iter(pairs.items()))
    return Match(f"The names differ in their separators, as {old!r} and {new!r} do", pairs)


def _letters(name: str) -> str:
    return re.sub(r"[._/]+", "_", name).strip("_")


def _by_likeness(given: list[str], wanted: list[str], separator: str) -> Match | None:
    """Pairs the most similar names, each once, preferring names with the same numbers."""
    left = wanted[:LIKENED]
    pairs = {}
    for name in given[:LIKENED]:
        alike = [other for other in left if _numbers(other) == _numbers(name)]
        near = _nearest(name, alike, separator) or _nearest(name, left, separator)
        if near:
            pairs[name] = near[0]
            left.remove(near[0])
    return Match("The nearest names may be meant", pairs) if pairs else None


def _nearest(name: str, names: list[str], separator: str) -> list[str]:
    near = difflib.get_close_matches(name, names, 1, 0.6)
    module, _, own = name.rpartition(separator)
    for other in near:
        other_module, _, other_own = other.rpartition(separator)
        # Names in a module with a long name are similar even if they are "weight" and "bias".
        if other_module == module and not difflib.get_close_matches(own, [other_own], 1, 0.45):
            return []
    return near


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _table(pairs: Mapping[str, str], kept: Iterable[str], separator: str) -> dict[str, str]:
    """Returns the table with the shortest entries that renames the pairs, but not kept names."""
    names = {**pairs, **{name: name for name in kept if name}}
    for least in (0, 1):
        table = dict(_shortened(old, new, separator, least) for old, new in pairs.items())
        if all(by_table(table, name, separator) == new for name, new in names.items()):
            return table
    return dict(pairs)


def _shortened(old: str, new: str, separator: str, least: int) -> tuple[str, str]:
    """Removes the common end of two names, but keeps the given number of parts of the old name."""
    parts, others = old.split(separator), new.split(separator)
    while len(parts) > least and others and parts[-1] == others[-1]:
        parts.pop()
        others.pop()
    return separator.join(parts), separator.join(others)
