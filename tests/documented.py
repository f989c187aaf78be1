"""Reads the `Args` sections of docstrings."""

import inspect
import re
from collections.abc import Callable

SECTION = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^  ([*\w]+): \S", re.MULTILINE)


def documented(described: object) -> list[str]:
    """Returns the names that the object's own docstring describes in `Args`, in that order."""
    section = SECTION.search(inspect.cleandoc(described.__doc__ or ""))
    return ENTRY.findall(section[1]) if section else []


def arguments(method: Callable) -> list[str]:
    """Returns the names of a method's arguments but `self`, with the stars of variadic ones."""
    _, *parameters = inspect.signature(method).parameters.values()
    return [
        str(parameter.replace(default=parameter.empty, annotation=parameter.empty))
        for parameter in parameters
    ]
