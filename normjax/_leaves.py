"""Nested dicts of what is given by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns nested dicts of what is given by path."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        inner = tree
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return tree
