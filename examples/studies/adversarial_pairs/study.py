"""Trains on clean and adversarial images."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, report
from common.networks import UNITS, Tree, vgg
from common.study import Advance, Claim, Part, Study, table
from common.training import State, chunks, cross_entropy, descend
from jax import Array
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from studies.adversarial_pairs.ways import ATTACKED, CLEAN, WAYS, Way, attack

WIDTHS = {
    "digits": ((16,), (16, 16), (32,)),
    "mnist": ((16,), (16, 16), (32,)),
    "cifar10": ((32, 32), (64, 64), (128, 128)),
}
MOMENTUM = 0.9  # of SGD
TEST_ATTACK = 2  # times as many steps as in training
CHUNK = 250  # test images at once
SETS = ("clean set", "attacked set")
BOTH = "two sets, two scales"
# What, by whom it is reported, the ways and the sets at inference, and whether images are attacked.
CLAIMS = [
    (
        "clean accuracy, against training on clean images only",
        "lower with one set; higher with two (AdvProp: +0.7 points on ImageNet, EfficientNet-B7)",
        [("shared", CLEAN), (BOTH, CLEAN)],
        False,
    ),
    (
        "robust accuracy, against clean images only",
        "one set for both kinds costs robustness, which a second one restores (Xie & Yuille)",
        [("shared", CLEAN), ("two sets", ATTACKED), (BOTH, ATTACKED)],
        True,
    ),
    (
        "robust accuracy through the clean set",
        "robustness depends on scales and biases, less on statistics (Zhang et al.)",
        [("two sets", CLEAN), (BOTH, CLEAN)],
        True,
    ),
]


class Trainer:
    """A way, with its training and evaluation, each compiled once for all seeds."""

    def __init__(self, way: Way, images: data.Dataset, options: Namespace):
        self.way, self.options = way, options
        self.train = _on_device(images.train_images / images.peak, images.train_labels)
        self.test = _on_device(images.test_images / images.peak, images.test_labels)
        self.network = vgg(UNITS["batch"], WIDTHS[options.data])
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps = jax.jit(self._take_steps)
        self._correct = jax.jit(self._count_correct, static_argnames=("kind", "attacked"))

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and returns accuracies with either set of statistics, and their distance."""
        # The same kernels, and the same images, for each way.
        start, shape = jax.random.key(seed), self.train[0].shape[1:]
        params, batch_stats = self.way.init(self.network, start, shape)
        state = State(params, batch_stats, self.optimizer.init(params))
        rng, options = np.random.default_rng(seed), self.options
        for done, steps in chunks(options.steps, options.eval_every):
            size = steps, options.batch_size
            rows = rng.integers(len(self.train[1]), size=size, dtype=np.int32)
            state = self._steps(state, self.train, rows, jax.random.fold_in(start, done))
            advance(steps, f"{self.accuracy(state, CLEAN, False):.1%}")
        kinds = (CLEAN, ATTACKED) if self.way.own_statistics else (CLEAN,)
        by_set = {
            SETS[kind]: [self.accuracy(state, kind, attacked) for attacked in (False, True)]
            for kind in kinds
        }
        return {"seed": seed, "accuracies": by_set, "gaps": gaps(*state.batch_stats)}

    def accuracy(self, state: State, kind: int, attacked: bool) -> float:
        """Returns the accuracy on test images, clean or attacked through the same statistics."""
        images, labels = self.test
        correct = 0
        for i in range(0, len(labels), CHUNK):
            chunk = images[i : i + CHUNK], labels[i : i + CHUNK]
            correct += self._correct(state, *chunk, kind=kind, attacked=attacked)
        return float(correct / len(labels))

    def _take_steps(
        self, state: State, train: tuple[Array, Array], rows: Array, key: Array
    ) -> State:
        def loss(
            params: Tree, batch_stats: list[Tree], rows: Array, key: Array
        ) -> tuple[Array, Any]:
            images, labels = (values[rows] for values in train)
            attacked = images
            if self.way.attacked:  # which changes no statistics
                fixed = jax.lax.stop_gradient(params), batch_stats
                steps = self.options.attack_steps
                attacked = self._attacked(fixed, images, labels, key, ATTACKED, True, steps)
            logits, new = self.way.train(self.network, params, batch_stats, images, attacked)
            twice = jnp.tile(labels, len(logits) // len(labels))
            return cross_entropy(logits, twice).mean(), (new, None)

        inputs = rows, jax.random.split(key, len(rows))
        return descend(loss, self.optimizer, state, inputs)[0]

    def _attacked(
        self,
        variables: tuple[Tree, list[Tree]],
        images: Array,
        labels: Array,
        key: Array,
        kind: int,
        train: bool,
        steps: int,
    ) -> Array:
        def loss(images: Array) -> Array:
            logits, _ = self.way.apply(self.network, *variables, images, kind, train)
            return cross_entropy(logits, labels).sum()

        return attack(loss, images, key, self.options.radius, steps)

    def _count_correct(
        self, state: State, images: Array, labels: Array, kind: int, attacked: bool
    ) -> Array:
        variables, key = state[:2], jax.random.key(0)
        if attacked:
            steps = TEST_ATTACK * self.options.attack_steps
            images = self._attacked(variables, images, labels, key, kind, False, steps)
        logits, _ = self.way.apply(self.network, *variables, images, kind, False)
        return (logits.argmax(-1) == labels).sum()


def _on_device(pixels: np.ndarray, labels: np.ndarray) -> tuple[Array, Array]:
    return jnp.asarray(pixels, jnp.float32), jnp.asarray(labels, jnp.int32)


def gaps(clean: Tree, attacked: Tree) -> dict[str, float]:
    """Returns each layer's distance of two sets' running means: deviations, mean over channels."""
    found = {}
    for layer, stats in clean.items():
        distance = jnp.abs(attacked[layer]["mean"] - stats["mean"]) / jnp.sqrt(stats["var"])
        found[layer] = float(distance.mean())
    return found


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
        images = data.selected(self.options)
        trainers = {name: Trainer(way, images, self.options) for name, way in WAYS.items()}
        return {name: self.each_seed(trainer.run) for name, trainer in trainers.items()}

    def accuracy(self, way: str, kind: int, attacked: bool) -> float:
        """Returns the median over seeds."""
        return median(run["accuracies"][SETS[kind]][attacked] for run in self.results[way])

    def tables(self) -> list[Table]:
        title = f"Test accuracy, median of {self.options.seeds} seed(s)"
        headings = "trained with", "inference with", "clean images", "attacked images"
        made = table(headings, left=2, title=title)
        for name in self.results:
            for kind, of_set in self._sets(name):
                accuracies = (self.accuracy(name, kind, attacked) for attacked in (False, True))
                made.add_row(name, of_set, *(f"{accuracy:.1%}" for accuracy in accuracies))
        return [made]

    def _sets(self, name: str) -> list[tuple[int, str]]:
        return list(enumerate(SETS)) if WAYS[name].own_statistics else [(CLEAN, "the one set")]

    def claims(self) -> list[Claim]:
        return [
            Claim(what, reported, self._against_clean(runs, attacked))
            for what, reported, runs, attacked in CLAIMS
        ]

    def _against_clean(self, runs: Sequence[tuple[str, int]], attacked: bool) -> str:
        if "clean only" not in self.results:
            return "not run"
        base = self.accuracy("clean only", CLEAN, attacked)
        gains = {
            name: 100 * (self.accuracy(name, kind, attacked) - base)
            for name, kind in runs
            if name in self.results
        }
        return f"{base:.1%}; " + ", ".join(f"{name} {gain:+.1f}" for name, gain in gains.items())

    def draw(self, path: Path) -> None:
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
            for kind, point in enumerate(points):
                two = len(points) > 1
                style = {
                    "label": f"{name}: {SETS[kind] if two else 'its one set'}",
                    "markersize": 9,
                }
                face = "white" if kind == CLEAN and two else f"C{i}"
                axes.plot(*point, "os^D"[i], color=f"C{i}", markerfacecolor=face, **style)
        labels = {
            "xlabel": "accuracy on clean images (%)",
            "ylabel": "accuracy on attacked images (%)",
        }
        report.dress(axes, "x-small", title="Robust against accurate", **labels)

    def _draw_gaps(self, axes: Axes) -> None:
        for i, (name, runs) in enumerate(self.results.items()):
            if WAYS[name].own_statistics:
                layers = list(runs[0]["gaps"])
                values = [median(run["gaps"][layer] for run in runs) for layer in layers]
                axes.plot(range(1, len(layers) + 1), values, "o-", color=f"C{i}", label=name)
        title = "How far apart the two running means are"
        report.dress(
            axes, title=title, xlabel="layer", ylabel="standard deviations", ylim=(0, None)
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
