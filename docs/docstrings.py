"""Prepares docstrings and signatures for Sphinx."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = {
    "self",
    "parent",
    "name",
    "_foreign",
}  # arguments of every linen module, and for wrong names
ERROR = r"(?<=[.;] )(?=(?:\w+Error|KeyboardInterrupt)(?:, \w+Error)*: )"


def setup(app: Any) -> dict[str, bool]:
    """Connects `process`, before napoleon, and `signature`."""
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True}


def signature(app: Any, what: str, name: str, obj: Any, options: Any, *_: Any) -> Any:
    """Returns the parameters and the return type as written in the source.

    autodoc would evaluate types, and expand `Mask` to half a line of jaxtyping.
    """
    if what not in ("function", "class", "method"):
        return None
    function = obj.__init__ if what == "class" else inspect.unwrap(obj)
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    kept = [_parameter(each) for each in found.parameters.values() if each.name not in HIDDEN]
    returns = None if what == "class" else _type(found.return_annotation)
    return str(found.replace(parameters=kept, return_annotation=found.empty)), returns


def _parameter(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if default is not parameter.empty:
        default = _AsWritten(_default(default))
    kind = _type(parameter.annotation)
    annotation = parameter.empty if kind is None else _AsWritten(kind)
    return parameter.replace(default=default, annotation=annotation)


def _default(value: Any) -> str:
    if isinstance(value, Mapping) and not value:
        return "{}"
    if getattr(value, "__module__", "").startswith("jax.numpy"):
        return f"jnp.{value.__name__}"
    return getattr(value, "__name__", repr(value))


def _type(annotation: Any) -> str | None:
    if annotation is inspect.Parameter.empty:
        return None
    if isinstance(annotation, str):
        return annotation
    return (
        getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else None
    )


class _AsWritten(str):
    """A string that a signature shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def process(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Rewrites the lines of one docstring in place."""
    done: list[str] = []
    for title, section in _sections(lines):
        done += {"Returns": _returns, "Raises": _raises}.get(title, _tables)(section)
    lines[:] = _code(list(map(_inline, done)))


def _inline(line: str) -> str:
    """Escapes text that would be markup, such as `x`s and |x|."""
    if line.lstrip().startswith((">>>", "...", "|", ".. math", ":math")) or "\\" in line:
        return line
    line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)
    return re.sub(r"\|(\w+)\|", r"\\|\1\\|", line)


def _code(lines: list[str]) -> list[str]:
    """Marks indented code that follows a colon."""
    done = list(lines)
    for i, line in enumerate(lines[:-2]):
        own, next_own = _indent([line]), _indent([lines[i + 2]])
        if line.endswith(":") and not lines[i + 1].strip() and next_own >= own + 4:
            done[i] = line + ":"
    return done


def _sections(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Splits a docstring at section titles, such as `Returns:`."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        title = re.fullmatch(r"([A-Z][a-z]+):", line)
        if title:
            found.append((title[1], []))
        found[-1][1].append(line)
    return found


def _returns(section: list[str]) -> list[str]:
    """Formats several results as a list; each begins with its name in backticks."""
    body = [line for line in section[1:] if line.strip()]
    own = _indent(body)
    named = [line for line in body if re.match(rf" {{{own}}}`[^`]+`(, of [^:]+)?: ", line)]
    if len(named) < 2:
        return _tables(section)
    listed = []
    for line in section[1:]:
        starts = line in named
        listed += ["", " " * own + "- " + line.strip()] if starts else ["  " + line]
    return [section[0], *listed]


def _raises(section: list[str]) -> list[str]:
    """Puts each error on its own line."""
    text = " ".join(line.strip() for line in section[1:])
    own = " " * _indent(section[1:])
    return [section[0], *(own + error.strip() for error in re.split(ERROR, text)), ""]


def _tables(section: list[str]) -> list[str]:
    """Converts Markdown tables to reStructuredText."""
    done: list[str] = []
    for line in _whole_rows(section):
        row = line.strip()
        if not re.fullmatch(r"\|.*\|", row):
            done.append(line)
            continue
        own = line[: len(line) - len(line.lstrip())]
        first = not (done and done[-1].startswith(own + "     "))
        if re.fullmatch(r"[|\-: ]+", row):
            continue
        cells = [cell.strip() for cell in row[1:-1].split("|")]
        if first:
            done += ["", own + ".. list-table::", own + "   :header-rows: 1", ""]
        done += [own + ("   * - " if not i else "     - ") + cell for i, cell in enumerate(cells)]
    return done


def _whole_rows(section: list[str]) -> list[str]:
    """Joins the lines of a table row, which ends with a bar."""
    done: list[str] = []
    for line in section:
        row = done[-1].strip() if done else ""
        if row.startswith("| ") and not row.endswith("|"):
            done[-1] += " " + line.strip()
        else:
            done.append(line)
    return done


def _indent(lines: list[str]) -> int:
    """Returns the smallest indentation of the lines."""
    return min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
