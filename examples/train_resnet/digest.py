"""Facts about the data, which must agree on all hosts and when a run continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from train_resnet.sources import Folder, InMemory, Source, Sources

Facts = dict[str, Any]
LONGEST = 200  # the number of characters of class names in a message


def facts(data: Sources) -> Facts:
    """Returns the counts, the classes and a checksum of the names and sizes of the files."""
    found: Facts = {
        "training images": len(data.train),
        "test images": len(data.test),
        "classes": data.classes,
    }
    if isinstance(data.train, Folder):
        found["names of the classes"] = _shortened(data.train.classes)
    for part, source in (("training", data.train), ("test", data.test)):
        if (checksum := _checksum(source)) is not None:
            found[f"checksum of the {part} images"] = checksum
    return found


def difference(seen: Facts, expected: Facts) -> str | None:
    """Returns the first fact that differs, in words."""
    for name in expected | seen:
        if seen.get(name) != expected.get(name):
            return f"{name}: {seen.get(name)}, not {expected.get(name)}"
    return None


def _checksum(source: Source) -> str | None:
    """Returns a checksum of the contents of arrays, or of the classes, names and sizes of files."""
    checksum = hashlib.sha256()
    if isinstance(source, InMemory):
        for array in (source.images, source.labels):
            checksum.update(np.ascontiguousarray(array).data)
    elif isinstance(source, Folder):
        for path, label in source.files:
            checksum.update(json.dumps([path.name, label, path.stat().st_size]).encode())
    else:
        return None  # generated from the options
    return checksum.hexdigest()[:16]


def _shortened(names: Sequence[str]) -> str:
    text = ", ".join(names)
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
