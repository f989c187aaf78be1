"""Trains a network on two domains."""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.table
from common import data, report
from common.results import medians
from common.study import Advance, Part, Study, table
from common.training import State, chunks, cross_entropy, descend
from jax import Array
from studies.domains.ways import SHIFTS, WAYS, Way

MOMENTUM = 0.9  # of SGD


class Images(NamedTuple):
    """Images `(domains, count, pixels)`, the same in each domain, and labels `(count,)`."""

    images: Array
    labels: Array


def make_domains(
    images: np.ndarray, labels: np.ndarray, peak: int, shift: str, seed: int
) -> Images:
    """Returns the images as they are, and shifted."""
    pixels = images.reshape(len(images), -1) / peak
    both = np.stack([pixels, SHIFTS[shift](pixels, np.random.default_rng(seed))])
    return Images(jnp.asarray(both, jnp.float32), jnp.asarray(labels, jnp.int32))


class Trainer:
    """A way to share, with its training and evaluation, each compiled once for all seeds."""

    def __init__(self, way: Way, train: Images, test: Images, options: Namespace):
        self.way, self.train, self.test, self.options = way, train, test, options
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps, self._evaluate = jax.jit(self._take_steps), jax.jit(self._accuracies)

    def run(self, names: list[str], seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and evaluates every so many steps, and after the last."""
        domains, count, pixels = self.train.images.shape
        params, batch_stats = self.way.init(jax.random.key(seed), pixels, domains)
        state = State(params, batch_stats, self.optimizer.init(params))
        rng, points, accuracies = np.random.default_rng(seed), [], []
        for done, steps in chunks(self.options.steps, self.options.eval_every):
            # Each domain has its own rows, the same for each way.
            rows = rng.integers(count, size=(steps, domains, self.options.batch_size))
            state = self._steps(state, self.train, rows.astype(np.int32))
            accuracies.append(self._evaluate(state, self.test).tolist())
            points.append(done + steps)
            advance(steps, f"{np.mean(accuracies[-1]):.1%}")
        by_domain = dict(zip(names, map(list, zip(*accuracies, strict=True)), strict=True))
        return {"seed": seed, "steps": points, "accuracies": by_domain}

    def _take_steps(self, state: State, train: Images, rows: Array) -> State:
        def loss(params: Any, batch_stats: Any, rows: Array) -> tuple[Array, Any]:
            images = jax.vmap(lambda images, rows: images[rows])(train.images, rows)
            logits, batch_stats = self.way.train(params, batch_stats, images)
            return cross_entropy(logits, train.labels[rows]).mean(), (batch_stats, None)

        return descend(loss, self.optimizer, state, (rows,))[0]

    def _accuracies(self, state: State, test: Images) -> Array:
        logits = [
            self.way.infer(state.params, state.batch_stats, images, domain)
            for domain, images in enumerate(test.images)
        ]
        return (jnp.stack(logits).argmax(-1) == test.labels).mean(1)


class Domains(Study):
    """The ways of one command line, and what is finished of them."""

    name = "domains"
    caption = (
        "What to see: 'in turn' and 'own' train the same params, and only differ in the statistics"
        " at inference: one batch_stats for both domains fits neither. 'mixed' and 'conditional'"
        " normalize both domains together."
    )

    def parts(self) -> Mapping[str, Part]:
        options, images = self.options, data.selected(self.options)
        peak, shift = images.peak, options.shift
        self.domains = ["as they are", shift]
        train = make_domains(images.train_images, images.train_labels, peak, shift, seed=0)
        test = make_domains(images.test_images, images.test_labels, peak, shift, seed=1)
        trainers = {name: Trainer(way, train, test, options) for name, way in WAYS.items()}
        return {
            name: self.each_seed(partial(trainer.run, self.domains))
            for name, trainer in trainers.items()
        }

    def content(self) -> dict[str, Any]:
        return {"ways": self.results}

    def interrupted(self, parts: int) -> str:
        return f"{len(self.results)} of {parts} ways are finished."

    def tables(self) -> list[rich.table.Table]:
        seeds = f"median of {self.options.seeds} seed(s)"
        title = f"Test accuracy after step {self.options.steps}, {seeds}"
        made = table(("way", "batch_stats", *self.domains), left=2, title=title)
        for name, runs in self.results.items():
            curves = [[run["accuracies"][domain] for run in runs] for domain in self.domains]
            last = (f"{medians(curve)[-1]:.1%}" for curve in curves)
            made.add_row(name, WAYS[name].batch_stats, *last)
        return [made]

    def draw(self, path: Path) -> None:
        images = f"{data.TITLES[self.options.data]}, as they are and {self.options.shift}"
        panels: dict[str, dict[str, report.Curve]] = {domain: {} for domain in self.domains}
        for domain, curves in panels.items():
            for name, runs in self.results.items():
                accuracies = [run["accuracies"][domain] for run in runs]
                curves[name] = runs[0]["steps"], medians(accuracies)
        title = f"{images}: who shares statistics"
        report.draw_panels(path, title, "test accuracy (%)", panels, self.caption)
