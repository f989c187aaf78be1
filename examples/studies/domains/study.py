"""Trains a network on two domains."""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, report
from common.study import Advance, Part, Study, table
from common.training import State, chunks, cross_entropy, descend, examples
from jax import Array
from rich.table import Table
from studies.domains.ways import NETWORK, WAYS, Way, shifted

MOMENTUM = 0.9  # of SGD
Images = tuple[Array, Array]  # (domains, count, pixels), the same in each, and labels (count,)


def make_domains(images: data.Dataset, shift: str) -> tuple[Images, Images]:
    """Returns training and test images, as they are and shifted."""
    plain, other = (examples(each, False) for each in (images, shifted(images, shift)))

    def both(part: int) -> Images:
        (pixels, labels), (moved, _) = plain[part].pick(), other[part].pick()
        return jnp.stack([pixels, moved]).reshape(2, len(labels), -1), labels

    return both(0), both(1)


class Trainer:
    """A way to share, with its training and evaluation, each compiled once for all seeds."""

    def __init__(self, way: Way, train: Images, test: Images, options: Namespace):
        self.way, self.train, self.test, self.options = way, train, test, options
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps = jax.jit(partial(descend, self._loss, self.optimizer))
        self._evaluate = jax.jit(self._accuracies)

    def run(self, names: list[str], seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and evaluates every so many steps, and after the last."""
        domains, count, pixels = self.train[0].shape
        start, shape = jax.random.key(seed), (1, pixels, 1)
        params, batch_stats = self.way.init(NETWORK, start, shape, domains)
        state = State(params, batch_stats, self.optimizer.init(params))
        rng, points, accuracies = np.random.default_rng(seed), [], []
        for done, steps in chunks(self.options.steps, self.options.eval_every):
            # Each domain has its own rows, the same for each way.
            rows = rng.integers(count, size=(steps, domains, self.options.batch_size))
            state, _ = self._steps(state, (rows.astype(np.int32),), self.train)
            accuracies.append(self._evaluate(state, self.test).tolist())
            points.append(done + steps)
            advance(steps, f"{np.mean(accuracies[-1]):.1%}")
        by_domain = dict(zip(names, map(list, zip(*accuracies, strict=True)), strict=True))
        return {"seed": seed, "steps": points, "accuracies": by_domain}

    def _loss(
        self, params: Any, batch_stats: Any, rows: Array, train: Images
    ) -> tuple[Array, tuple[Any, None]]:
        images = jax.vmap(lambda images, rows: images[rows])(train[0], rows)
        logits, batch_stats = self.way.train(NETWORK, params, batch_stats, images)
        return cross_entropy(logits, train[1][rows]).mean(), (batch_stats, None)

    def _accuracies(self, state: State, test: Images) -> Array:
        logits = [
            self.way.apply(NETWORK, *state[:2], images, domain, False)[0]
            for domain, images in enumerate(test[0])
        ]
        return (jnp.stack(logits).argmax(-1) == test[1]).mean(1)


class Domains(Study):
    """The ways of one command line, and what is finished of them."""

    name, unit = "domains", "ways"
    caption = (
        "What to see: 'in turn' and 'own' train the same params, and only differ in the statistics"
        " at inference: one batch_stats for both domains fits neither. 'mixed' and 'conditional'"
        " normalize both domains together."
    )

    def parts(self) -> Mapping[str, Part]:
        options = self.options
        self.domains = ["as they are", options.shift]
        parts = make_domains(data.selected(options), options.shift)
        trainers = {name: Trainer(way, *parts, options) for name, way in WAYS.items()}
        return {
            name: self.each_seed(partial(trainer.run, self.domains))
            for name, trainer in trainers.items()
        }

    def content(self) -> dict[str, Any]:
        return {"ways": self.results}

    def tables(self) -> list[Table]:
        seeds = f"median of {self.options.seeds} seed(s)"
        title = f"Test accuracy after step {self.options.steps}, {seeds}"
        rows = []
        for name in self.results:
            curves = (self.curve(name, "accuracies", domain) for domain in self.domains)
            rows.append((name, WAYS[name].batch_stats, *(f"{curve[-1]:.1%}" for curve in curves)))
        return [table(("way", "batch_stats", *self.domains), rows, 2, title)]

    def draw(self, path: Path) -> None:
        images = f"{data.TITLES[self.options.data]}, as they are and {self.options.shift}"
        panels = {
            domain: {
                name: (runs[0]["steps"], self.curve(name, "accuracies", domain))
                for name, runs in self.results.items()
            }
            for domain in self.domains
        }
        title = f"{images}: who shares statistics"
        report.draw_panels(path, title, "test accuracy (%)", panels, self.caption)
