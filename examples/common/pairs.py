"""Trains on clean and adversarial images, for `adversarial_pairs.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from jax import Array, lax
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from common import data, report
from common.adversarial import ATTACKED, CLEAN, WAYS, Way, attack
from common.interrupt import Interrupt
from common.networks import Tree
from common.session import Advance, Part
from common.study import Claim, Study, conduct
from common.training import State
from common.units import UNITS
from common.vgg import vgg

WIDTHS = {
    "digits": ((16,), (16, 16), (32,)),
    "mnist": ((16,), (16, 16), (32,)),
    "cifar10": ((32, 32), (64, 64), (128, 128)),
}
MOMENTUM = 0.9  # of SGD
TEST_ATTACK = 2  # times as many steps as in training
CHUNK = 250  # test images at once
SETS = ("clean set", "attacked set")
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Trainer:
    """A way, with its training and evaluation, each compiled once for all seeds."""

    def __init__(self, way: Way, images: data.Dataset, options: Namespace):
        self.way, self.options = way, options
        self.train, self.test = (
            (jnp.asarray(pixels / images.peak, jnp.float32), jnp.asarray(labels, jnp.int32))
            for pixels, labels in (
                (images.train_images, images.train_labels),
                (images.test_images, images.test_labels),
            )
        )
        self.network = vgg(UNITS["batch"], WIDTHS[options.data])
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps = jax.jit(self._take_steps)
        self._correct = jax.jit(self._count_correct, static_argnames=("kind", "attacked"))

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and returns accuracies with either set of statistics, and their distance."""
        state = self.init(seed)
        for rows, key in self._batches(seed):
            state = self._steps(state, self.train, rows, key)
            advance(len(rows), f"{self.accuracy(state, CLEAN, False):.1%}")
        kinds = (CLEAN, ATTACKED) if self.way.own_statistics else (CLEAN,)
        by_set = {
            SETS[kind]: [self.accuracy(state, kind, attacked) for attacked in (False, True)]
            for kind in kinds
        }
        return {"seed": seed, "accuracies": by_set, "gaps": gaps(*state.batch_stats)}

    def init(self, seed: int) -> State:
        """Returns the state that training starts from: the same kernels for each way."""
        params, batch_stats = self.way.init(
            self.network, jax.random.key(seed), self.train[0].shape[1:]
        )
        return State(params, batch_stats, self.optimizer.init(params))

    def accuracy(self, state: State, kind: int, attacked: bool) -> float:
        """Returns the accuracy on test images, clean or attacked through the same statistics."""
        images, labels = self.test
        starts = range(0, len(labels), CHUNK)
        correct = [
            self._correct(
                state, images[i : i + CHUNK], labels[i : i + CHUNK], kind=kind, attacked=attacked
            )
            for i in starts
        ]
        return float(sum(correct) / len(labels))

    def _batches(self, seed: int) -> Iterator[tuple[np.ndarray, Array]]:
        """Yields rows `(steps, batch)`, the same for each way, and a key for the adversary."""
        rng, steps = np.random.default_rng(seed), self.options.steps
        for done in range(0, steps, self.options.eval_every):
            size = min(self.options.eval_every, steps - done), self.options.batch_size
            key = jax.random.fold_in(jax.random.key(seed), done)
            yield rng.integers(len(self.train[1]), size=size, dtype=np.int32), key

    def _take_steps(
        self, state: State, examples: tuple[Array, Array], rows: Array, key: Array
    ) -> State:
        def step(state: State, drawn: tuple[Array, Array]) -> tuple[State, None]:
            rows, key = drawn
            images, labels = (values[rows] for values in examples)
            gradients, batch_stats = jax.grad(self._loss, has_aux=True)(
                state.params,
                state.batch_stats,
                images,
                self._attacked(state, images, labels, key),
                labels,
            )
            updates, optimizer = self.optimizer.update(gradients, state.optimizer)
            return State(optax.apply_updates(state.params, updates), batch_stats, optimizer), None

        return lax.scan(step, state, (rows, jax.random.split(key, len(rows))))[0]

    def _loss(
        self, params: Tree, batch_stats: list[Tree], clean: Array, attacked: Array, labels: Array
    ) -> Any:
        logits, batch_stats = self.way.train(self.network, params, batch_stats, clean, attacked)
        return cross_entropy(
            logits, jnp.tile(labels, len(logits) // len(labels))
        ).mean(), batch_stats

    def _attacked(self, state: State, images: Array, labels: Array, key: Array) -> Array:
        """Returns attacked images for a training step; the attack does not change statistics."""
        if not self.way.attacked:
            return images
        apply = partial(
            self.way.apply, self.network, state.params, state.batch_stats, kind=ATTACKED, train=True
        )
        options = self.options
        return attack(
            lambda x: cross_entropy(apply(x)[0], labels).sum(),
            images,
            key,
            options.radius,
            options.attack_steps,
        )

    def _count_correct(
        self, state: State, images: Array, labels: Array, kind: int, attacked: bool
    ) -> Array:
        apply = partial(
            self.way.apply, self.network, state.params, state.batch_stats, kind=kind, train=False
        )
        if attacked:
            steps = TEST_ATTACK * self.options.attack_steps
            images = attack(
                lambda x: cross_entropy(apply(x)[0], labels).sum(),
                images,
                jax.random.key(0),
                self.options.radius,
                steps,
            )
        return (apply(images)[0].argmax(-1) == labels).sum()


def gaps(clean: Tree, attacked: Tree) -> dict[str, float]:
    """Returns each layer's distance of two sets' running means: deviations, mean over channels."""
    return {
        layer: float(
            (jnp.abs(attacked[layer]["mean"] - of_clean["mean"]) / jnp.sqrt(of_clean["var"])).mean()
        )
        for layer, of_clean in clean.items()
    }


class Pairs(Study):
    """The ways of one command line, and what is finished of them."""

    name = "adversarial_pairs"
    source = "Xie & Yuille 2020 (mixture BN), Xie et al. 2020 (AdvProp), and Zhang et al. 2024"
    caption = (
        "What to see: up is robust, right is accurate. A network with two sets of statistics is two"
        " points, joined by a line: the effect of choosing a set at inference, without any"
        " training. Right: while they share scales and biases, the two kinds hardly differ in their"
        " statistics."
    )

    def parts(self) -> Mapping[str, Part]:
        """Returns a run for each way."""
        options = self.options
        images = data.selected(options)
        return {
            name: Part(options.seeds * options.steps, partial(self._run, way, images))
            for name, way in WAYS.items()
        }

    def _run(self, way: Way, images: data.Dataset, advance: Advance) -> list[dict[str, Any]]:
        trainer = Trainer(way, images, self.options)
        return [trainer.run(seed, advance) for seed in range(self.options.seeds)]

    def accuracy(self, way: str, kind: int, attacked: bool) -> float:
        """Returns the median over seeds."""
        return median(run["accuracies"][SETS[kind]][attacked] for run in self.results[way])

    def tables(self) -> Sequence[Table]:
        """Returns accuracies by way and set."""
        shown = Table(
            title=f"Test accuracy, median of {self.options.seeds} seed(s)", title_justify="left"
        )
        shown.box, shown.pad_edge = rich.box.SIMPLE_HEAD, False
        for heading in ("trained with", "inference with"):
            shown.add_column(heading, no_wrap=True)
        for heading in ("clean images", "attacked images"):
            shown.add_column(heading, justify="right")
        for name in self.results:
            for kind, of_set in self._sets(name):
                accuracies = (self.accuracy(name, kind, attacked) for attacked in (False, True))
                shown.add_row(name, of_set, *(f"{accuracy:.1%}" for accuracy in accuracies))
        return [shown]

    def _sets(self, name: str) -> list[tuple[int, str]]:
        return list(enumerate(SETS)) if WAYS[name].own_statistics else [(CLEAN, "the one set")]

    def claims(self) -> Sequence[Claim]:
        """Returns what can be said so far."""
        said = [
            (
                "clean accuracy, against training on clean images only",
                "lower with one set; higher with two "
                "(AdvProp: +0.7 points on ImageNet, EfficientNet-B7)",
                [("shared", CLEAN), ("two sets, two scales", CLEAN)],
                False,
            ),
            (
                "robust accuracy, against clean images only",
                "one set for both kinds costs robustness, which a second one restores "
                "(Xie & Yuille)",
                [("shared", CLEAN), ("two sets", ATTACKED), ("two sets, two scales", ATTACKED)],
                True,
            ),
            (
                "robust accuracy through the clean set",
                "robustness depends on scales and biases, less on statistics (Zhang et al.)",
                [("two sets", CLEAN), ("two sets, two scales", CLEAN)],
                True,
            ),
        ]
        return [
            Claim(what, reported, self._against_clean(runs, attacked))
            for what, reported, runs, attacked in said
        ]

    def _against_clean(self, runs: Sequence[tuple[str, int]], attacked: bool) -> str:
        if "clean only" not in self.results:
            return "not run"
        base = self.accuracy("clean only", CLEAN, attacked)
        return f"{base:.1%}; " + ", ".join(
            f"{name} {100 * (self.accuracy(name, kind, attacked) - base):+.1f}"
            for name, kind in runs
            if name in self.results
        )

    def draw(self, path: Path) -> None:
        """Writes robust against clean accuracy, and how far apart the statistics are."""
        images, radius = data.TITLES[self.options.data], self.options.radius
        title = f"{images}, clean and attacked by up to {radius:.3g} a pixel"
        with report.figure(path, title, self.caption) as grid:
            self._draw_accuracies(grid[0, 0])
            self._draw_gaps(grid[0, 1])

    def _draw_accuracies(self, axes: Axes) -> None:
        for i, name in enumerate(self.results):
            points = [
                [100 * self.accuracy(name, kind, attacked) for attacked in (False, True)]
                for kind, _ in self._sets(name)
            ]
            axes.plot(*zip(*points, strict=True), color=f"C{i}", linewidth=1.5, alpha=0.6)
            for kind, (x, y) in enumerate(points):
                label = f"{name}: {SETS[kind]}" if len(points) > 1 else f"{name}: its one set"
                face = "white" if kind == CLEAN and len(points) > 1 else f"C{i}"
                axes.plot(
                    x, y, "os^D"[i], color=f"C{i}", markerfacecolor=face, markersize=9, label=label
                )
        axes.set(xlabel="accuracy on clean images (%)", ylabel="accuracy on attacked images (%)")
        axes.set_title("Robust against accurate")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")

    def _draw_gaps(self, axes: Axes) -> None:
        for i, (name, runs) in enumerate(self.results.items()):
            if WAYS[name].own_statistics:
                layers = list(runs[0]["gaps"])
                values = [median(run["gaps"][layer] for run in runs) for layer in layers]
                axes.plot(range(1, len(layers) + 1), values, "o-", color=f"C{i}", label=name)
        axes.set(
            ylabel="standard deviations",
            title="How far apart the two running means are",
            ylim=(0, None),
        )
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains each way and reports; returns the exit status."""
    return conduct(Pairs(options), interrupt)
