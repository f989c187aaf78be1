"""What a process that loads data does first, so that it ends with its program, and not before it.

It has SIGTERM, SIGHUP and Ctrl-C blocked, as the program has (see signals.py): the program ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def silence_tracker() -> None:
    """Has Python's own process that frees shared memory do so without a warning after our line."""
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"


def start(index: int, count: int) -> None:
    """Watches the program; grain's own loop would go on for ever if the program was killed."""
    del index, count
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    program = multiprocessing.parent_process()
    if program is not None:
        wait([program.sentinel])
        os._exit(1)
