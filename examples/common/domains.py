"""Trains a network on two domains, for `domains.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import rich.table
from jax import Array, lax
from rich.console import Console

from common import data, report, session
from common.interrupt import Interrupt
from common.sharing import WAYS, Way
from common.training import State

SHIFTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    # Pixels from 0 to 1. A little noise keeps what is faint from being the same image in other
    # units.
    "faint": lambda pixels, rng: 0.6 + 0.2 * pixels + rng.normal(0, 0.05, pixels.shape),
    "inverted": lambda pixels, rng: 1 - pixels,
    "noisy": lambda pixels, rng: pixels + rng.normal(0, 0.5, pixels.shape),
}
DESCRIPTIONS = {
    "mixed": "one, batches of both domains",
    "in turn": "one, batches of one domain",
    "own": "one for each domain",
    "conditional": "one; scales, biases for each",
}
MOMENTUM = 0.9  # of SGD
CAPTION = (
    "What to see: 'in turn' and 'own' train the same params, and only differ in the statistics at"
    " inference: one batch_stats for both domains fits neither. 'mixed' and 'conditional' normalize"
    " both domains together."
)


class Domains(NamedTuple):
    """Images `(domains, count, pixels)`, the same in each domain, and labels `(count,)`."""

    images: Array
    labels: Array


class DomainRun(NamedTuple):
    """One way with one seed: its test accuracies after each of `steps`, by domain."""

    seed: int
    steps: list[int]
    accuracies: dict[str, list[float]]


def make_domains(
    images: np.ndarray, labels: np.ndarray, peak: int, shift: str, seed: int
) -> Domains:
    """Returns the images as they are, and shifted."""
    pixels = images.reshape(len(images), -1) / peak
    shifted = SHIFTS[shift](pixels, np.random.default_rng(seed))
    return Domains(
        jnp.asarray(np.stack([pixels, shifted]), jnp.float32), jnp.asarray(labels, jnp.int32)
    )


class Trainer:
    """A way to share, with its training and evaluation, each compiled once for all seeds."""

    def __init__(self, way: Way, train: Domains, test: Domains, options: Namespace):
        self.way, self.train, self.test, self.options = way, train, test, options
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps, self._evaluate = jax.jit(self._take_steps), jax.jit(self._accuracies)

    def init(self, seed: int) -> State:
        """Returns the state that training starts from."""
        domains, _, pixels = self.train.images.shape
        params, batch_stats = self.way.init(jax.random.key(seed), pixels, domains)
        return State(params, batch_stats, self.optimizer.init(params))

    def run(self, names: list[str], seed: int, evaluated: session.Evaluated) -> DomainRun:
        """Trains, and evaluates every so many steps, and after the last."""
        state, done, points, accuracies = self.init(seed), 0, [], []
        for rows in self._batches(seed):
            state = self._steps(state, self.train, rows)
            accuracies.append(self._evaluate(state, self.test).tolist())
            points.append(done := done + len(rows))
            evaluated(len(rows), float(np.mean(accuracies[-1])))
        by_domain = dict(zip(names, map(list, zip(*accuracies, strict=True)), strict=True))
        return DomainRun(seed, points, by_domain)

    def _batches(self, seed: int) -> Iterator[np.ndarray]:
        """Yields rows `(steps, domains, batch)`: each domain has its own, the same for each way."""
        rng, steps = np.random.default_rng(seed), self.options.steps
        domains, count, _ = self.train.images.shape
        for done in range(0, steps, self.options.eval_every):
            size = min(self.options.eval_every, steps - done), domains, self.options.batch_size
            yield rng.integers(count, size=size, dtype=np.int32)

    def _take_steps(self, state: State, data: Domains, rows: Array) -> State:
        def loss(params: Any, batch_stats: Any, rows: Array) -> tuple[Array, Any]:
            images = jax.vmap(lambda images, rows: images[rows])(data.images, rows)
            logits, batch_stats = self.way.train(params, batch_stats, images)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, data.labels[rows]
            ).mean(), batch_stats

        def step(state: State, rows: Array) -> tuple[State, None]:
            gradients, batch_stats = jax.grad(loss, has_aux=True)(
                state.params, state.batch_stats, rows
            )
            updates, optimizer = self.optimizer.update(gradients, state.optimizer)
            return State(optax.apply_updates(state.params, updates), batch_stats, optimizer), None

        return lax.scan(step, state, rows)[0]

    def _accuracies(self, state: State, data: Domains) -> Array:
        logits = [
            self.way.infer(state.params, state.batch_stats, images, domain)
            for domain, images in enumerate(data.images)
        ]
        return (jnp.stack(logits).argmax(-1) == data.labels).mean(1)


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains each way and reports; returns the exit status."""
    return session.guard(
        "domains.py", options.out, lambda: Comparison(options).run(interrupt, Console())
    )


class Comparison:
    """The ways of one command line, and what is finished of them."""

    def __init__(self, options: Namespace):
        self.options, self.names = options, ["as they are", options.shift]
        images = data.selected(options)
        self.train = make_domains(
            images.train_images, images.train_labels, images.peak, options.shift, seed=0
        )
        self.test = make_domains(
            images.test_images, images.test_labels, images.peak, options.shift, seed=1
        )
        self.runs: dict[str, list[DomainRun]] = {}
        options.out.mkdir(parents=True, exist_ok=True)

    def run(self, interrupt: Interrupt, console: Console) -> bool:
        """Trains, shows and returns whether all is trained."""
        options = self.options
        trainers = {
            name: Trainer(way, self.train, self.test, options) for name, way in WAYS.items()
        }
        variants = {name: partial(trainer.run, self.names) for name, trainer in trainers.items()}
        self.save("running")
        finished = session.train_all(
            variants, options.seeds, options.steps, interrupt, console, self._finished
        )
        self.save("finished" if finished else "interrupted")
        self.show(console, finished)
        return finished

    def _finished(self, name: str, runs: list[DomainRun]) -> None:
        self.runs[name] = runs
        self.save("running")

    def save(self, status: str) -> None:
        """Writes all there is so far as JSON."""
        config = session.settings(vars(self.options))
        content = {"status": status, "config": config, **session.environment()}
        content["ways"] = {
            name: [run._asdict() for run in runs] for name, runs in self.runs.items()
        }
        report.write_json(self.options.out / "domains.json", content)

    def show(self, console: Console, finished: bool) -> None:
        """Prints the table and writes the plot."""
        console.print(self._table())
        if not finished:
            console.print(f"Interrupted: {len(self.runs)} of {len(WAYS)} ways are finished.")
        if self.runs:
            path = self.options.out / "domains.png"
            images = f"{data.TITLES[self.options.data]}, as they are and {self.options.shift}"
            title = f"{images}: who shares statistics"
            report.write_panels(path, title, "test accuracy (%)", self._panels(), CAPTION)
            console.print(f"Plot: {path.resolve()}", soft_wrap=True)
        console.print(f"Results: {(self.options.out / 'domains.json').resolve()}", soft_wrap=True)

    def _table(self) -> rich.table.Table:
        shown = rich.table.Table(
            title=f"Test accuracy after step {self.options.steps}, "
            f"median of {self.options.seeds} seed(s)",
            title_justify="left",
        )
        shown.box, shown.pad_edge = rich.box.SIMPLE_HEAD, False
        shown.add_column("way", no_wrap=True)
        shown.add_column("batch_stats", no_wrap=True)
        for heading in self.names:
            shown.add_column(heading, justify="right")
        for name, runs in self.runs.items():
            last = [median(run.accuracies[domain][-1] for run in runs) for domain in self.names]
            shown.add_row(name, DESCRIPTIONS[name], *(f"{value:.1%}" for value in last))
        return shown

    def _panels(self) -> dict[str, dict[str, report.Curve]]:
        """Returns the curves by way, medians over the seeds, for each domain."""
        panels: dict[str, dict[str, report.Curve]] = {domain: {} for domain in self.names}
        for domain, curves in panels.items():
            for name, runs in self.runs.items():
                accuracies = zip(*(run.accuracies[domain] for run in runs), strict=True)
                curves[name] = runs[0].steps, [median(values) for values in accuracies]
        return panels
