"""A lock that allows one run at a time in a folder; the operating system releases it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from pathlib import Path

NAME = "lock"
SECONDS = 5  # seconds until other hosts must see the file, since network file systems cache folders


class LockedError(Exception):
    """Raised if another run has locked the folder; the message is one line that names it."""


def take(folder: Path) -> str:
    """Locks the folder until this process ends; returns the token in the lock file.

    Raises:
      LockedError: if another process has locked it.
      OSError: if the folder cannot be written.
    """
    path = folder / NAME
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise LockedError(
                f"{folder} is in use by {_holder(path)}; choose another --out"
            ) from None
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise  # otherwise the file system has no locks, so the run continues without
    token = secrets.token_hex(8)
    holder = {"token": token, "host": socket.gethostname(), "process": os.getpid()}
    os.ftruncate(file, 0)
    os.write(file, json.dumps(holder | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
    os.fsync(file)
    return token


def sees(folder: Path, token: str) -> bool:
    """Returns whether this host sees the token of process 0 in the folder."""
    deadline = time.monotonic() + SECONDS
    while True:
        if _read(folder / NAME).get("token") == token:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _holder(path: Path) -> str:
    read = _read(path)
    if not read:
        return "another run"
    return f"process {read.get('process')} on {read.get('host')} since {read.get('since')}"


def _read(path: Path) -> dict:
    try:
        read = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
