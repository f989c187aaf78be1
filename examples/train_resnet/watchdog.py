"""Knows what the program is doing and since when, and ends it when that takes too long.

Heartbeats show that a process is alive. They cannot show that it waits for ever: for a disk, for a
loader, or for a collective that another process does not take part in.
"""

from __future__ import annotations

import threading
import time

from train_resnet.ending import LOST, leave

COMPILING = 10  # times as patient while compiling, which may take minutes and ends by itself


class Progress:
    """The stage of the program, for the watchdog and for whoever presses Ctrl-C."""

    def __init__(self):
        self.stage, self.since, self.patience = "starting", time.monotonic(), 1
        self.saved = "nothing is saved yet"
        self.trains = False  # until then nothing is lost by an end at once

    def now(self, stage: str, patience: int = 1) -> None:
        """Notes the beginning of a stage."""
        self.stage, self.since, self.patience = stage, time.monotonic(), patience

    def seconds(self) -> float:
        """Returns how long the stage has taken so far."""
        return time.monotonic() - self.since

    def watch(self, limit: int) -> None:
        """Ends the process when a stage takes longer than `limit` seconds."""
        threading.Thread(target=self._watch, args=(limit,), daemon=True).start()

    def _watch(self, limit: int) -> None:
        while True:
            time.sleep(min(1.0, limit / 4))
            stage, patient = self.stage, limit * self.patience
            if self.seconds() > patient and stage == self.stage:
                leave(
                    LOST,
                    f"no progress for {patient} seconds (--stall): {stage}; {self.saved}. "
                    "Start again with the same command to go on from there",
                )


progress = Progress()
