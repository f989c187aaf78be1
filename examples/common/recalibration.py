"""Trains a network, and evaluates it with old and recalibrated statistics, for `recalibrate.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
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

import normjax as nj
from common import data, networks, report, session
from common.domains import MOMENTUM, SHIFTS
from common.interrupt import Interrupt

CALIBRATION_BATCH = EVALUATION_BATCH = 100
# By panel: the name of a line, the weights, and the statistics that come with them.
AS_THEY_ARE = {
    "trained weights": ("trained", "running"),
    "EMA, running statistics": ("EMA", "running"),
    "EMA, running statistics averaged, too": ("EMA", "EMA of running"),
    "EMA, recalibrated": ("EMA", "recalibrated"),
}
SHIFTED = {
    "running statistics": ("trained", "running"),
    "recalibrated": ("trained", "recalibrated"),
}
# Evaluated after the last step only.
WAYS: dict[str, dict[str, Any]] = {
    "recalibrated": {},
    "recalibrated, averaged": {"estimate": "averaged"},
    "recalibrated, layer by layer": {"layer_by_layer": True},
}
CAPTION = (
    "What to see: averaged weights have other activations, so the running statistics of the trained"
    " weights do not fit them; nor do statistics of clean images fit shifted images. One pass over"
    " training images without labels finds statistics that fit. No weight is changed."
)

Tree = networks.Tree


class Examples(NamedTuple):
    """Images `(count, height, width, channels)` from 0 to 1, and labels `(count,)`."""

    images: Array
    labels: Array


class State(NamedTuple):
    """The state of a training step; `average` is the average of params and batch_stats."""

    params: Tree
    batch_stats: Tree
    average: tuple[Tree, Tree]
    optimizer: Any


class Run(NamedTuple):
    """One seed: test accuracies after `steps`, and at the end by (images, weights, statistics)."""

    seed: int
    steps: list[int]
    curves: dict[str, list[float]]
    last: dict[str, float]


def examples(
    images: np.ndarray, labels: np.ndarray, peak: int, shift: str | None, seed: int
) -> Examples:
    """Returns the images as they are, or shifted."""
    pixels = images / peak
    if shift is not None:
        pixels = SHIFTS[shift](pixels, np.random.default_rng(seed))
    return Examples(jnp.asarray(pixels, jnp.float32), jnp.asarray(labels, jnp.int32))


class Trainer:
    """A network with its training and evaluation, each compiled once for all seeds.

    Args:
      train: training examples, as they are and shifted.
      test: test examples, likewise.
      options: of the command line.
    """

    def __init__(self, train: dict[str, Examples], test: dict[str, Examples], options: Namespace):
        self.options, self.train, self.test = options, train, test
        style = networks.Style(normalize=True, activation="relu")
        self.network = (
            networks.inception(style) if options.data == "cifar10" else networks.mlp(style)
        )
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps, self._evaluate = jax.jit(self._take_steps), jax.jit(self._accuracy)

    def run(self, seed: int, evaluated: session.Evaluated) -> Run:
        """Trains, and evaluates every so many steps, and after the last."""
        state, done, points, curves = self._init(seed), 0, [], {}
        for rows in self._batches(seed):
            state = self._steps(state, self.train["as they are"], rows)
            points.append(done := done + len(rows))
            now = self.evaluate(state, {"recalibrated": {}})
            for name, accuracy in now.items():
                curves.setdefault(name, []).append(accuracy)
            evaluated(len(rows), now[key("as they are", "trained", "running")])
        return Run(seed, points, curves, self.evaluate(state, WAYS))

    def evaluate(self, state: State, ways: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Returns test accuracies with running statistics, and with each recalibration."""
        ema, average = state.average
        trained = state.params
        variables = {("as they are", "trained", "running"): (trained, state.batch_stats)}
        variables["as they are", "EMA", "running"] = ema, state.batch_stats
        variables["as they are", "EMA", "EMA of running"] = ema, average
        variables[self.options.shift, "trained", "running"] = trained, state.batch_stats
        for name, settings in ways.items():
            for images, weights, params in (
                ("as they are", "EMA", ema),
                (self.options.shift, "trained", trained),
            ):
                batches = self._calibration(images)
                variables[images, weights, name] = nj.recalibrate(
                    self._forward, (params, state.batch_stats), batches, **settings
                )
        return {
            key(*which): float(self._evaluate(*given, self.test[which[0]]))
            for which, given in variables.items()
        }

    def _forward(self, variables: tuple[Tree, Tree], images: Array) -> tuple[Array, Tree]:
        return self.network.apply(*variables, images, True)

    def _calibration(self, name: str) -> list[Array]:
        images = self.train[name].images[: self.options.calibrate]
        return [
            images[start : start + CALIBRATION_BATCH]
            for start in range(0, len(images), CALIBRATION_BATCH)
        ]

    def _init(self, seed: int) -> State:
        shape = self.train["as they are"].images.shape[1:]
        params, batch_stats = self.network.init(jax.random.key(seed), shape, data.CLASSES)
        return State(params, batch_stats, (params, batch_stats), self.optimizer.init(params))

    def _batches(self, seed: int) -> Iterator[np.ndarray]:
        """Yields rows `(steps, batch)`."""
        rng, count = np.random.default_rng(seed), len(self.train["as they are"].labels)
        for done in range(0, self.options.steps, self.options.eval_every):
            size = min(self.options.eval_every, self.options.steps - done), self.options.batch_size
            yield rng.integers(count, size=size, dtype=np.int32)

    def _take_steps(self, state: State, train: Examples, rows: Array) -> State:
        def loss(params: Tree, batch_stats: Tree, rows: Array) -> tuple[Array, Tree]:
            logits, batch_stats = self.network.apply(params, batch_stats, train.images[rows], True)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, train.labels[rows]
            ).mean(), batch_stats

        def step(state: State, rows: Array) -> tuple[State, None]:
            gradients, batch_stats = jax.grad(loss, has_aux=True)(
                state.params, state.batch_stats, rows
            )
            updates, optimizer = self.optimizer.update(gradients, state.optimizer)
            params: Tree = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
            average = optax.incremental_update(
                (params, batch_stats), state.average, 1 / self.options.ema
            )
            return State(params, batch_stats, average, optimizer), None  # pyright: ignore[reportArgumentType]

        return lax.scan(step, state, rows)[0]

    def _accuracy(self, params: Tree, batch_stats: Tree, test: Examples) -> Array:
        def correct(batch: Examples) -> Array:
            logits, _ = self.network.apply(params, batch_stats, batch.images[None], False)
            return logits.argmax(-1)[0] == batch.labels

        return lax.map(correct, test, batch_size=EVALUATION_BATCH).mean()


def key(*parts: str) -> str:
    """Returns the name under which JSON has an accuracy."""
    return " / ".join(parts)


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains and reports; returns the exit status."""
    return session.guard(
        "recalibrate.py", options.out, lambda: Comparison(options).run(interrupt, Console())
    )


class Comparison:
    """The runs of one command line, and what is finished of them."""

    def __init__(self, options: Namespace):
        self.options = options
        images = data.selected(options)
        shifts = {"as they are": None, options.shift: options.shift}
        train, test = images.train_images, images.test_images
        self.trainer = Trainer(
            {
                name: examples(train, images.train_labels, images.peak, shift, 0)
                for name, shift in shifts.items()
            },
            {
                name: examples(test, images.test_labels, images.peak, shift, 1)
                for name, shift in shifts.items()
            },
            options,
        )
        self.runs: list[Run] = []
        options.out.mkdir(parents=True, exist_ok=True)

    def run(self, interrupt: Interrupt, console: Console) -> bool:
        """Trains, shows and returns whether all is trained."""
        options = self.options
        variants = {f"seed {seed}": partial(self._train, seed) for seed in range(options.seeds)}
        self.save("running")
        finished = session.train_all(variants, 1, options.steps, interrupt, console, self._finished)
        self.save("finished" if finished else "interrupted")
        self.show(console, finished)
        return finished

    def _train(self, seed: int, _: int, evaluated: session.Evaluated) -> Run:
        return self.trainer.run(seed, evaluated)

    def _finished(self, name: str, runs: list[Run]) -> None:
        self.runs += runs
        self.save("running")

    def save(self, status: str) -> None:
        """Writes all there is so far as JSON."""
        config = session.settings(vars(self.options))
        content = {"status": status, "config": config, **session.environment()}
        report.write_json(
            self.options.out / "recalibrate.json",
            content | {"runs": [run._asdict() for run in self.runs]},
        )

    def show(self, console: Console, finished: bool) -> None:
        """Prints the table and writes the plot."""
        if not finished:
            console.print(
                f"Interrupted: {len(self.runs)} of {self.options.seeds} seeds are finished."
            )
        if self.runs:
            console.print(self._table())
            path = self.options.out / "recalibrate.png"
            title = f"{data.TITLES[self.options.data]}: statistics that fit, and that do not"
            report.write_panels(path, title, "test accuracy (%)", self._panels(), CAPTION)
            console.print(f"Plot: {path.resolve()}", soft_wrap=True)
        console.print(
            f"Results: {(self.options.out / 'recalibrate.json').resolve()}", soft_wrap=True
        )

    def _table(self) -> rich.table.Table:
        title = f"Test accuracy after step {self.options.steps}, median of {len(self.runs)} seed(s)"
        shown = rich.table.Table(
            title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False
        )
        for heading in ("test images", "weights", "batch_stats"):
            shown.add_column(heading, no_wrap=True)
        shown.add_column("accuracy", justify="right")
        for name in sorted(self.runs[0].last, key=lambda name: name.startswith(self.options.shift)):
            shown.add_row(*name.split(" / "), f"{median(run.last[name] for run in self.runs):.1%}")
        return shown

    def _panels(self) -> dict[str, dict[str, report.Curve]]:
        """Returns the curves, medians over the seeds, for each kind of test images."""
        panels: dict[str, dict[str, report.Curve]] = {}
        for images, lines in (("as they are", AS_THEY_ARE), (self.options.shift, SHIFTED)):
            panels[f"test images {images}"] = {
                line: (self.runs[0].steps, self._curve(key(images, *which)))
                for line, which in lines.items()
            }
        return panels

    def _curve(self, name: str) -> list[float]:
        return [
            median(values) for values in zip(*(run.curves[name] for run in self.runs), strict=True)
        ]
