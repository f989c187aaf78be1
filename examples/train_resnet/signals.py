"""SIGTERM, SIGHUP and Ctrl-C: noted for the loop, and answered at once.

The signals are blocked in all threads and one thread waits for them. So they are answered while the
main thread is inside of XLA's compiler or waits for another process, where Python's own handlers
would wait, too. Processes that load data inherit the block: Ctrl-C in a terminal and the signals of
a cluster's scheduler go to them as well, and would end them before the program has saved.
"""

from __future__ import annotations

import os
import signal
import threading

from train_resnet.ending import leave, say
from train_resnet.watchdog import progress

LAUNCHER = "TRAIN_RESNET_LAUNCHER"  # the end of a pipe that ends with the launcher
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Stop:
    """Lets the loop ask between steps for a signal; a second Ctrl-C acts at once."""

    number: int | None = None

    def listen(self) -> None:
        """Has the signals noted from now on; called before other threads start."""
        # nohup has SIGHUP ignored
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
        """Stops when the launcher is gone: nobody else would end this process."""
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
        """The exit status: an order to end is obeyed with 0, Ctrl-C is not success."""
        return 128 + signal.SIGINT if self.number == signal.SIGINT else 0
