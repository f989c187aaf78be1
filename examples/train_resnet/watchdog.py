"""Tracks the current stage of the program, and ends the program if it takes too long.

Heartbeats show that a process is alive, but not that it waits forever for a disk, for a loader, or
for a collective in which another process does not take part.
"""

from __future__ import annotations

import threading
import time

from train_resnet.ending import LOST, leave

COMPILING = 10  # the factor of the limit while compiling, which may take minutes but always ends


class Progress:
    """The stage of the program, for the watchdog and for messages after Ctrl-C."""

    def __init__(self):
        self.stage, self.since, self.patience = "starting", time.monotonic(), 1
        self.saved = "nothing is saved yet"
        self.trains = False  # until then, an immediate exit loses nothing

    def now(self, stage: str, patience: int = 1) -> None:
        """Records the beginning of a stage."""
        self.stage, self.since, self.patience = stage, time.monotonic(), patience

    def seconds(self) -> float:
        """Returns the seconds since the stage began."""
        return time.monotonic() - self.since

    def watch(self, limit: int) -> None:
        """Ends the process if a stage takes longer than `limit` seconds."""
        threading.Thread(target=self._watch, args=(limit,), daemon=True).start()

    def _watch(self, limit: int) -> None:
        while True:
            time.sleep(min(1.0, limit / 4))
            stage, patient = self.stage, limit * self.patience
            if self.seconds() > patient and stage == self.stage:
                leave(
                    LOST,
                    f"no progress for {patient} seconds (--stall): {stage}; {self.saved}. "
                    "Start again with the same command to continue",
                )


progress = Progress()
