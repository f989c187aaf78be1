"""A file of checksums that covers every file of a folder, including itself.

`SHA256SUMS` has the format of `sha256sum --check`. Its last line, a comment in this format, is a
checksum of the lines above it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    """Writes the checksums of all files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    lines = (f"{_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths)
    with (folder / NAME).open("wb") as file:
        file.write(_sealed("".join(lines).encode()))
        file.flush()
        os.fsync(file.fileno())


def wrong_files(folder: Path) -> list[str]:
    """Returns the files that have changed since the checksums were written."""
    try:
        content = (folder / NAME).read_bytes()
    except OSError:
        return [NAME]
    body, _, _ = content.rpartition(b"# ")
    if not body or content != _sealed(body):
        return [NAME]
    listed = [line.split("  ", 1) for line in body.decode().splitlines()]
    return [name for checksum, name in listed if _file(folder / name) != checksum]


def _sealed(body: bytes) -> bytes:
    return body + f"# {hashlib.sha256(body).hexdigest()}\n".encode()


def _file(path: Path) -> str | None:
    """Returns the checksum of a file, or None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
