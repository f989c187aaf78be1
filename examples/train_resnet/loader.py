"""Setup of a process that loads data, so that it ends with its program, and not earlier.

It blocks SIGTERM, SIGHUP and Ctrl-C, like the program (see signals.py), which ends it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.connection import wait


def prepare() -> None:
    """Starts Python's resource tracker for shared memory before a loader would start it.

    This avoids a warning after the program's last line. Python 3.11 also unblocks all signals after
    it has started the tracker, which loaders would inherit.
    """
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def start(index: int, count: int) -> None:
    """Watches the program, since grain's loop would run forever if the program was killed."""
    del index, count
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    program = multiprocessing.parent_process()
    if program is not None:
        wait([program.sentinel])
        os._exit(1)
