"""Handles SIGTERM, SIGHUP and Ctrl-C: records them for the loop, and answers immediately.

The signals are blocked in all threads, and one thread waits for them. So they are answered even
while the main thread runs XLA's compiler or waits for another process, when Python's own handlers
would not run. Processes that load data inherit the blocked signals. They also receive Ctrl-C in a
terminal and the signals of a cluster scheduler, which would end them before the program has saved.
"""

from __future__ import annotations

import os
import signal
import threading

from train_resnet.ending import leave, say
from train_resnet.watchdog import progress

LAUNCHER = "TRAIN_RESNET_LAUNCHER"  # the read end of a pipe that closes with the launcher
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Stop:
    """Records signals, which the loop checks between steps; a second Ctrl-C exits immediately."""

    number: int | None = None

    def listen(self) -> None:
        """Starts to record signals; must be called before other threads start."""
        # nohup ignores SIGHUP
        taken = {number for number in NAMES if signal.getsignal(number) != signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, taken)
        threading.Thread(target=self._wait, args=(taken,), daemon=True).start()
        if LAUNCHER in os.environ:
            end = int(os.environ.pop(LAUNCHER))
            threading.Thread(target=self._follow, args=(end,), daemon=True).start()

    def _wait(self, taken: set[signal.Signals]) -> None:
        while True:
            number = signal.sigwait(taken)
            self._note(number, NAMES[signal.Signals(number)])

    def _follow(self, end: int) -> None:
        """Stops when the launcher is gone, since nothing else would end this process."""
        os.read(end, 1)
        self._note(signal.SIGTERM, "the launcher is gone")

    def _note(self, number: int, name: str) -> None:
        where = f"{progress.stage} (for {progress.seconds():.0f} s)"
        again = number == signal.SIGINT and self.number == signal.SIGINT
        self.number = signal.SIGINT if again else self.number or number
        if again:
            leave(self.status, f"a second Ctrl-C: ended at once while {where}; {progress.saved}")
        if not progress.trains:
            leave(self.status, f"{name}: ended while {where}; nothing is lost")
        say(f"{name}: will save and end after {where}; Ctrl-C twice ends at once")

    @property
    def status(self) -> int:
        """Returns the exit status: 0 after SIGTERM or SIGHUP, but nonzero after Ctrl-C."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else 0
