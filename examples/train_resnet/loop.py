"""The loop: batches in, steps dispatched, metrics out, evaluations and checkpoints in between."""

from __future__ import annotations

import math
import time
from collections import deque

import jax
import numpy as np
from common.data import DataError

from train_resnet import batches, runtime, sources
from train_resnet.batches import Part
from train_resnet.checkpoints import Checkpoints
from train_resnet.metrics import Metrics
from train_resnet.options import Options, total_steps
from train_resnet.runtime import Stop
from train_resnet.sources import Sources
from train_resnet.steps import Program, State, learning_rate

# steps that are dispatched before the results of one are read: the devices do not wait for Python
LAG = 2


def run(options: Options, stop: Stop) -> int:
    """Trains to the end, or until a signal, and returns the exit status."""
    mesh, data, problem = runtime.mesh(), None, None
    try:
        data = sources.load(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except DataError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or options.out}: {error.strerror}"
    runtime.agree(options, problem)
    assert data is not None
    steps = total_steps(options, len(data.train))
    program = Program(options, mesh, data.classes, steps, data.image_size)
    run = Run(options, program, data, steps, stop)
    try:
        finished = run.train()
    finally:
        run.metrics.close()
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    return 0 if finished else stop.status


class _Dispatched:
    """A step that devices are running, its results, and the time when they were ready."""

    def __init__(self, step: int, sums: dict[str, jax.Array]):
        self.step, self._sums, self.finished = step, sums, math.inf

    def look(self, now: float) -> None:
        """Stores the time when results are ready, which may be long before they are read."""
        if self.finished == math.inf and all(value.is_ready() for value in self._sums.values()):  # pyright: ignore
            self.finished = now

    def values(self) -> dict[str, float]:
        """Waits for the results and returns them."""
        jax.block_until_ready(self._sums)
        self.look(time.perf_counter())
        return {name: float(value) for name, value in self._sums.items()}


class Run:
    """One run, from its newest checkpoint on."""

    def __init__(self, options: Options, program: Program, data: Sources, steps: int, stop: Stop):
        self.options, self.program, self.data, self.steps, self.stop = (
            options,
            program,
            data,
            steps,
            stop,
        )
        self.part = Part(options.batch_size, jax.process_index(), jax.process_count())
        self.checkpoints = Checkpoints(options, program)
        self.start = self.checkpoints.step or 0
        self.rate = learning_rate(options, steps)
        first = jax.process_index() == 0
        self.metrics = Metrics(options.out, steps, self.start, options.batch_size, first)
        self.pending: deque[_Dispatched] = deque()
        self.stopped = False

    def train(self) -> bool:
        """Trains; returns False if a signal ended it before its end."""
        state, position = self.checkpoints.restore()
        self._greet()
        size, step = self.options.batch_size, self.start
        stop = position + (self.steps - step) * size
        loaded = batches.training(
            self.data.train, self.part, self.options.seed, position, stop, self.options.workers
        )
        for batch in loaded:
            state, sums = self.program.train(
                state, self.program.place(batch | {"stop": self._votes()})
            )
            step, position = step + 1, position + size
            self.pending.append(_Dispatched(step, sums))
            now = time.perf_counter()
            for dispatched in self.pending:
                dispatched.look(now)
            self._read(LAG)
            self._between(state, step, position)
            if self.stopped:
                break
        self._read(0)
        self.checkpoints.save(state, step, position)
        self.checkpoints.close()
        self._farewell(step)
        return step == self.steps

    def _votes(self) -> np.ndarray:
        """Returns this process's vote to stop, which the step sums over processes.

        So all processes learn of a signal to one of them from the results of the same step, and
        stop after the same step.
        """
        votes = np.zeros(jax.local_device_count(), np.int32)
        votes[0] = self.stop.number is not None
        return votes

    def _read(self, lag: int) -> None:
        """Reads the results of all but the last `lag` steps; returns whether one says to stop."""
        while len(self.pending) > lag:
            dispatched = self.pending.popleft()
            step, values = dispatched.step, dispatched.values()
            self.stopped |= values.pop("stop") > 0
            if step % self.options.log_every == 0 or step == self.steps:
                rate = float(np.asarray(self.rate(step - 1)))
                self.metrics.trained(step, values | {"learning_rate": rate}, dispatched.finished)

    def _between(self, state: State, step: int, position: int) -> None:
        """What is to do after some steps: an evaluation, a checkpoint."""
        if step % self.options.eval_every == 0 or step == self.steps:
            self._read(0)
            self.metrics.evaluated(step, self._evaluate(state))
        if step % self.options.checkpoint_every == 0:
            self.checkpoints.save(state, step, position)

    def _evaluate(self, state: State) -> dict[str, float]:
        totals = {"loss": 0.0, "accuracy": 0.0, "examples": 0.0}
        for batch in batches.evaluation(self.data.test, self.part, self.options.workers):
            sums = self.program.evaluate(state, self.program.place(batch))
            totals = {name: total + float(sums[name]) for name, total in totals.items()}
        examples = totals.pop("examples")
        return {name: total / examples for name, total in totals.items()}

    def _greet(self) -> None:
        devices, kind = self.program.mesh.size, jax.devices()[0].device_kind
        self.metrics.say(
            f"{self.options.network} on {devices} {kind} device(s) of {jax.process_count()} "
            f"process(es); {self.program.model.sharing}"
        )
        if self.start:
            self.metrics.say(f"going on from the checkpoint of step {self.start}")

    def _farewell(self, step: int) -> None:
        how = "finished" if step == self.steps else "stopped by a signal, saved"
        self.metrics.say(f"{how} after step {step} of {self.steps}: {self.options.out}")
