"""What a process that loads data does first, so that it ends with its program, and not before it.

It has SIGTERM, SIGHUP and Ctrl-C blocked, as the program has (see signals.py): the program ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.connection import wait


def prepare() -> None:
    """Starts Python's own process that frees shared memory, before a loader would.

    It is to do so without a warning after the program's last line. And Python 3.11 unblocks signals
    after it has started it, also those that were blocked before: loaders would inherit that.
    """
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def start(index: int, count: int) -> None:
    """Watches the program; grain's own loop would go on for ever if the program was killed."""
    del index, count
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    program = multiprocessing.parent_process()
    if program is not None:
        wait([program.sentinel])
        os._exit(1)
