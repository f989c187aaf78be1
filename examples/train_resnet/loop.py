"""The training loop, with metrics, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import jax
import numpy as np
from common.data import DataError

from train_resnet import batches, digest, lock, preflight, runtime, sources
from train_resnet.batches import Part
from train_resnet.checkpoints import Checkpoints
from train_resnet.digest import Facts
from train_resnet.ending import say
from train_resnet.lock import LockedError
from train_resnet.metrics import Metrics
from train_resnet.options import Options, total_steps
from train_resnet.signals import Stop
from train_resnet.sources import Sources
from train_resnet.steps import Program, State, learning_rate
from train_resnet.watchdog import COMPILING, progress

# the number of steps in flight before results are read, so that devices do not wait for Python
LAG = 2
Item = TypeVar("Item")


class DivergedError(Exception):
    """Raised if a loss or a statistic is not finite."""


def run(options: Options, stop: Stop) -> int:
    """Trains to the end or until a signal, and returns the exit status."""
    mesh = runtime.mesh()
    data, facts = _prepare(options)
    progress.now("preparing the network and its first state", COMPILING)
    steps = total_steps(options, len(data.train))
    program = Program(options, mesh, data.classes, steps, data.image_size)
    run = Run(options, program, data, facts, steps, stop)
    try:
        finished = run.train()
    finally:
        run.metrics.close()
    progress.now("disconnecting from the other processes")
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    return 0 if finished else stop.status


def _prepare(options: Options) -> tuple[Sources, Facts]:
    """Returns the data, after all processes agree on it, and locks `--out`."""
    progress.now("reading the data")
    data, facts, token, problem = None, {}, None, None
    try:
        data = sources.load(options)
        facts = digest.facts(data)
        if jax.process_index() == 0:
            options.out.mkdir(parents=True, exist_ok=True)
            token = lock.take(options.out)
    except (DataError, LockedError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or options.out}: {error.strerror}"
    progress.now("agreeing with the other processes on the options, the data and --out", COMPILING)
    preflight.agree(options, problem, facts, token)
    assert data is not None
    return data, facts


def _noted(items: Iterable[Item], stage: str) -> Iterator[Item]:
    """Yields items, and tells the watchdog what the loop is waiting for."""
    iterator = iter(items)
    while True:
        progress.now(stage)
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item


class _Dispatched:
    """A step in flight, its results, and the time when they were ready."""

    def __init__(self, step: int, sums: dict[str, jax.Array]):
        self.step, self._sums, self.finished = step, sums, math.inf

    def look(self, now: float) -> None:
        """Records the time when results are ready, which may be long before they are read."""
        if self.finished == math.inf and all(value.is_ready() for value in self._sums.values()):  # pyright: ignore
            self.finished = now

    def values(self) -> dict[str, float]:
        """Waits for the results and returns them."""
        progress.now(f"waiting for the results of step {self.step}, which needs all processes")
        jax.block_until_ready(self._sums)
        self.look(time.perf_counter())
        return {name: float(value) for name, value in self._sums.items()}


class Run:
    """A run, starting from its newest checkpoint."""

    def __init__(
        self,
        options: Options,
        program: Program,
        data: Sources,
        facts: Facts,
        steps: int,
        stop: Stop,
    ):
        self.options, self.program, self.data = options, program, data
        self.steps, self.stop = steps, stop
        self.part = Part(options.batch_size, jax.process_index(), jax.process_count())
        self.checkpoints = Checkpoints(options, program, facts)
        self.state, self.start, self.position = self.checkpoints.restore()
        if self.start:
            progress.saved = f"the last checkpoint is of step {self.start}"
        preflight.room(options, program.abstract_state())
        self.rate = learning_rate(options, steps)
        first = jax.process_index() == 0
        self.metrics = Metrics(options.out, steps, self.start, options.batch_size, first)
        self.pending: deque[_Dispatched] = deque()
        self.stopped = self.warned = False

    def train(self) -> bool:
        """Trains; returns False if a signal stopped it early."""
        state, position, step = self.state, self.position, self.start
        del self.state  # donated to the next step
        self._greet()
        size = self.options.batch_size
        stop = position + (self.steps - step) * size
        loaded = batches.training(
            self.data.train, self.part, self.options.seed, position, stop, self.options.workers
        )
        with closing(loaded):
            for batch in _noted(loaded, f"waiting for images to train on after step {step}"):
                placed = self.program.place(batch | {"stop": self._votes()})
                if step == self.start:
                    self._compile(state, placed)
                progress.now(f"running step {step + 1}")
                state, sums = self.program.train(state, placed)
                step, position = step + 1, position + size
                self.pending.append(_Dispatched(step, sums))
                self._look()
                self._read(LAG)
                self._between(state, step, position)
                if self.stopped:
                    break
        self._read(0)
        self._save(state, step, position)
        self.checkpoints.close()
        self._farewell(step)
        return step == self.steps

    def _compile(self, state: State, batch: batches.Batch) -> None:
        """Compiles, and waits for the other processes, since later steps depend on all of them."""
        progress.trains = True
        progress.now("compiling the training step", COMPILING)
        self.program.compile(state, batch)
        progress.now("waiting for the other processes to compile", COMPILING)
        preflight.meet(self.options, "compiled")

    def _votes(self) -> np.ndarray:
        """Returns this process's vote to stop, which the step sums over processes.

        So all processes see a signal to one of them in the results of the same step, and stop after
        the same step.
        """
        votes = np.zeros(jax.local_device_count(), np.int32)
        votes[0] = self.stop.number is not None
        return votes

    def _look(self) -> None:
        now = time.perf_counter()
        for dispatched in self.pending:
            dispatched.look(now)

    def _read(self, lag: int) -> None:
        """Reads the results of all but the last `lag` steps."""
        while len(self.pending) > lag:
            dispatched = self.pending.popleft()
            step, values = dispatched.step, dispatched.values()
            self.stopped |= values.pop("stop") > 0
            bad = values.pop("not_finite")
            if step % self.options.log_every == 0 or step == self.steps or bad:
                rate = float(np.asarray(self.rate(step - 1)))
                self.metrics.trained(step, values | {"learning_rate": rate}, dispatched.finished)
            if not math.isfinite(values["loss"]):
                self._diverged(f"the loss is {values['loss']} after step {step}")
            if bad:
                self._diverged(f"{bad:.0f} running statistics are not finite after step {step}")

    def _diverged(self, how: str) -> None:
        """Raises DivergedError in all processes at the same step, or warns once."""
        if not self.options.allow_nan:
            self.checkpoints.close()
            raise DivergedError(
                f"{how}; {self.checkpoints.newest()}, and later ones are not written. Lower "
                "--learning-rate in another --out, or go on with --allow-nan"
            )
        if not self.warned and jax.process_index() == 0:
            say(f"warning: {how}; going on, as --allow-nan says")
        self.warned = True

    def _between(self, state: State, step: int, position: int) -> None:
        """Evaluates or saves a checkpoint, if it is due after this step."""
        if step % self.options.eval_every == 0 or step == self.steps:
            self._read(0)
            values = self._evaluate(state, step)
            self.metrics.evaluated(step, values)
            if not math.isfinite(values["loss"]):
                self._diverged(f"the test loss is {values['loss']} after step {step}")
        if step % self.options.checkpoint_every == 0:
            self._save(state, step, position)
        else:
            self.checkpoints.check()

    def _save(self, state: State, step: int, position: int) -> None:
        if not self.checkpoints.save(state, step, position):
            self._read(0)  # its loss may be more informative
            self._diverged(f"the state is not finite after step {step}")
        progress.saved = f"a checkpoint of step {self.checkpoints.step} is written or being written"

    def _evaluate(self, state: State, step: int) -> dict[str, float]:
        totals = {"loss": 0.0, "accuracy": 0.0, "examples": 0.0}
        with closing(batches.evaluation(self.data.test, self.part, self.options.workers)) as loaded:
            for batch in _noted(loaded, f"evaluating after step {step}"):
                sums = self.program.evaluate(state, self.program.place(batch))
                totals = {name: total + float(sums[name]) for name, total in totals.items()}
        examples = totals.pop("examples")
        return {name: total / examples for name, total in totals.items()}

    def _greet(self) -> None:
        devices, kind = self.program.mesh.size, jax.devices()[0].device_kind
        self.metrics.say(
            f"{self.options.network} on {devices} {kind} device(s) of {jax.process_count()} "
            f"process(es); {self.program.shared}"
        )
        if self.start:
            self.metrics.say(f"going on from the checkpoint of step {self.start}")

    def _farewell(self, step: int) -> None:
        how = "finished" if step == self.steps else "stopped by a signal, saved"
        self.metrics.say(f"{how} after step {step} of {self.steps}: {self.options.out}")
