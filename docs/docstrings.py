"""Lets mkdocstrings show the section `Example:` of docstrings; it only knows `Examples:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section.

    Otherwise its `>>>` would be read as Markdown, and arrays in its output as links.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Renames it in one docstring, and leaves the catch-all of wrong names out."""
        if isinstance(obj, griffe.Function) and "_foreign" in obj.parameters:
            del obj.parameters["_foreign"]
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
