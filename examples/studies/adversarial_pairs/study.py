"""Trains on clean and adversarial images."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
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
from common.training import Examples, State, chunks, cross_entropy, descend, examples
from jax import Array
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from studies.adversarial_pairs.ways import ATTACKED, CLEAN, WAYS, attack

WIDTHS = {
    "digits": ((16,), (16, 16), (32,)),
    "mnist": ((16,), (16, 16), (32,)),
    "cifar10": ((32, 32), (64, 64), (128, 128)),
}
MOMENTUM = 0.9  # of SGD
TEST_ATTACK = 2  # times as many steps as in training
CHUNK = 250  # test images at once
Variables = tuple[Tree, Any]  # params and batch_stats
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

    def __init__(self, name: str, images: data.Dataset, options: Namespace):
        self.way, self.options, self.attacks = WAYS[name], options, name != "clean only"
        self.train, self.test = examples(images, standardize=False)
        self.network = vgg(UNITS["batch"], WIDTHS[options.data])
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps = jax.jit(partial(descend, self._loss, self.optimizer))
        self._correct = jax.jit(self._count_correct, static_argnames=("kind", "attacked"))

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and returns accuracies with either set of statistics, and their distance."""
        # The same kernels, and the same images, for each way.
        start, shape = jax.random.key(seed), self.train.images.shape[1:]
        params, batch_stats = self.way.init(self.network, start, shape, 2)
        state = State(params, batch_stats, self.optimizer.init(params))
        rng, options = np.random.default_rng(seed), self.options
        for done, steps in chunks(options.steps, options.eval_every):
            size = steps, options.batch_size
            rows = rng.integers(len(self.train.labels), size=size, dtype=np.int32)
            keys = jax.random.split(jax.random.fold_in(start, done), steps)
            state, _ = self._steps(state, (rows, keys), self.train)
            advance(steps, f"{self.accuracy(state, CLEAN, False):.1%}")
        kinds = (CLEAN, ATTACKED) if self.way.own_statistics else (CLEAN,)
        by_set = {
            SETS[kind]: [self.accuracy(state, kind, attacked) for attacked in (False, True)]
            for kind in kinds
        }
        both = state.batch_stats if self.way.own_statistics else (state.batch_stats,) * 2
        return {"seed": seed, "accuracies": by_set, "gaps": gaps(*both)}

    def accuracy(self, state: State, kind: int, attacked: bool) -> float:
        """Returns the accuracy on test images, clean or attacked through the same statistics."""
        correct, count = 0, len(self.test.labels)
        for i in range(0, count, CHUNK):
            chunk = self.test.pick(slice(i, i + CHUNK))
            correct += self._correct(state, chunk, kind=kind, attacked=attacked)
        return float(correct / count)

    def _loss(
        self, params: Tree, batch_stats: Any, rows: Array, key: Array, train: Examples
    ) -> tuple[Array, tuple[Any, None]]:
        images, labels = train.pick(rows)
        kinds = [images]
        if self.attacks:  # which changes no statistics
            fixed = jax.lax.stop_gradient(params), batch_stats
            kinds.append(self._attacked(fixed, images, labels, key, ATTACKED, True))
        logits, new = self.way.train(self.network, params, batch_stats, jnp.stack(kinds))
        labels = jnp.tile(labels, (len(kinds), 1))
        return cross_entropy(logits, labels).mean(), (new, None)

    def _attacked(
        self, fixed: Variables, images: Array, labels: Array, key: Array, kind: int, train: bool
    ) -> Array:
        def loss(images: Array) -> Array:
            logits, _ = self.way.apply(self.network, *fixed, images, kind, train)
            return cross_entropy(logits, labels).sum()

        steps = self.options.attack_steps * (1 if train else TEST_ATTACK)
        return attack(loss, images, key, self.options.radius, steps)

    def _count_correct(
        self, state: State, chunk: tuple[Array, Array], kind: int, attacked: bool
    ) -> Array:
        variables, (images, labels) = state[:2], chunk
        if attacked:
            images = self._attacked(variables, images, labels, jax.random.key(0), kind, False)
        logits, _ = self.way.apply(self.network, *variables, images, kind, False)
        return (logits.argmax(-1) == labels).sum()


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
        trainers = {name: Trainer(name, images, self.options) for name in WAYS}
        return {name: self.each_seed(trainer.run) for name, trainer in trainers.items()}

    def by_set(self, way: str) -> dict[str, list[float]]:
        """Returns the accuracies on clean and attacked images, by the set at inference."""
        sets = self.results[way][0]["accuracies"]
        return {of_set: self.curve(way, "accuracies", of_set) for of_set in sets}

    def tables(self) -> list[Table]:
        rows = []
        for name in self.results:
            found = self.by_set(name)
            for of_set, accuracies in found.items():
                shown = of_set if len(found) > 1 else "the one set"
                rows.append((name, shown, *(f"{accuracy:.1%}" for accuracy in accuracies)))
        title = f"Test accuracy, median of {self.options.seeds} seed(s)"
        headings = "trained with", "inference with", "clean images", "attacked images"
        return [table(headings, rows, 2, title)]

    def claims(self) -> list[Claim]:
        return [
            Claim(what, reported, self._against_clean(runs, attacked))
            for what, reported, runs, attacked in CLAIMS
        ]

    def _against_clean(self, runs: Sequence[tuple[str, int]], attacked: bool) -> str:
        if "clean only" not in self.results:
            return "not run"
        base = self.by_set("clean only")[SETS[CLEAN]][attacked]
        found = {name: self.by_set(name)[SETS[kind]] for name, kind in runs if name in self.results}
        gains = (f"{name} {100 * (of[attacked] - base):+.1f}" for name, of in found.items())
        return f"{base:.1%}; " + ", ".join(gains)

    def draw(self, path: Path) -> None:
        images, radius = data.TITLES[self.options.data], self.options.radius
        title = f"{images}, clean and attacked by up to {radius:.3g} a pixel"
        with report.figure(path, title, self.caption) as grid:
            self._draw_accuracies(grid[0, 0])
            self._draw_gaps(grid[0, 1])

    def _draw_accuracies(self, axes: Axes) -> None:
        for i, name in enumerate(self.results):
            found, color = self.by_set(name), f"C{i}"
            points = {of: [100 * accuracy for accuracy in found[of]] for of in found}
            axes.plot(*zip(*points.values(), strict=True), color=color, linewidth=1.5, alpha=0.6)
            for of_set, point in points.items():
                label = f"{name}: {of_set if len(points) > 1 else 'its one set'}"
                hollow = len(points) > 1 and of_set == SETS[CLEAN]
                style: dict[str, Any] = {"color": color, "label": label, "markersize": 9}
                style["markerfacecolor"] = "white" if hollow else color
                axes.plot(*point, "os^D"[i], **style)
        report.dress(axes, "x-small", title="Robust against accurate")
        axes.set_xlabel("accuracy on clean images (%)")
        axes.set_ylabel("accuracy on attacked images (%)")

    def _draw_gaps(self, axes: Axes) -> None:
        for i, (name, runs) in enumerate(self.results.items()):
            if WAYS[name].own_statistics:
                layers = list(runs[0]["gaps"])
                values = [median(run["gaps"][layer] for run in runs) for layer in layers]
                axes.plot(range(1, len(layers) + 1), values, "o-", color=f"C{i}", label=name)
        title, ylabel = "How far apart the two running means are", "standard deviations"
        report.dress(axes, title=title, xlabel="layer", ylabel=ylabel, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
