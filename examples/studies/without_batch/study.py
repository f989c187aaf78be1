"""Trains a VGG with substitutes for batch norm at several rates."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from common import data, report, training
from common.networks import UNITS, Network, Tree, Unit, from_features, linear, vgg
from common.study import Advance, Claim, Part, Study, table
from common.training import Plan, Trainer, check_batch
from jax import Array
from jax.nn.initializers import constant
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

import normjax as nj

WIDTHS = ((16, 16), (32, 32), (64, 64))
MOMENTUM = 0.9  # of SGD
EVALUATIONS = 5  # of each run, for the progress bar
INITIALIZING = 100  # images that a data-dependent initialization sees
# of ReLU: what it takes from the variance that standardized kernels see
GAIN = math.sqrt(2 / (1 - 1 / math.pi))
NEAR = 0.05  # rates whose accuracy is within so much of the best count as those that work
# What each source reports of its substitute beside batch norm, or beside the normalization that it
# replaces.
REPORTED = {
    "none": (
        "Salimans & Kingma 2016, CIFAR-10",
        "learns more slowly than with batch norm, catches up late",
    ),
    "group": ("Wu & He 2018, ImageNet", "error 24.1%, batch norm's 23.6%"),
    "weight norm": (
        "Salimans & Kingma 2016, CIFAR-10",
        "learns as fast as with batch norm, ends as well",
    ),
    "weight standardization": (
        "Brock et al. 2021, ImageNet",
        "competitive with the best with batch norm",
    ),
    "dynamic tanh": ("Zhu et al. 2025, ViT-B, ImageNet", "accuracy 82.5%, layer norm's 82.3%"),
}


def units() -> dict[str, Unit]:
    """Returns the units: weight standardization with ReLU's gain, dynamic tanh with slope 1.

    The paper's slope of 0.5 is for residual branches. Layers in sequence would each halve the
    signal.
    """
    init = partial(nj.weights.weight_standardization_init, scale_init=constant(GAIN))
    makers = {
        "weight standardization": from_features(init),
        "dynamic tanh": from_features(partial(nj.dynamic_tanh_init, alpha=1.0)),
    }
    return UNITS | {name: UNITS[name]._replace(make=make) for name, make in makers.items()}


class InitializingUnit(Unit):
    """Weight norm that computes scale and bias from a first batch, as its new statistics."""

    def apply(
        self, params: Tree, batch_stats: Tree, x: Array, train: bool, *, stride: int = 1
    ) -> tuple[Array, Tree]:
        """Returns the output, of mean 0 and variance 1, and the parameters that give it."""

        def at(kernel):
            return linear({"kernel": kernel}, x, stride)

        norm, _, bias = nj.weights.weight_norm_init_from_data(at, params["kernel"])
        params = params | {"norm": norm, "bias": bias}
        y, _ = super().apply(params, batch_stats, x, train, stride=stride)
        return y, params


def initialized_from(images: Array, make: Callable[[Unit], Network]) -> Network:
    """Returns a network with weight norm whose scales and biases fit the images when it starts."""
    unit = UNITS["weight norm"]
    network, initializing = make(unit), make(InitializingUnit(*unit))

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        params, batch_stats = network.init(key, image_shape, num_classes)
        _, found = jax.jit(initializing.apply, static_argnums=3)(params, batch_stats, images, True)
        return params | found, batch_stats

    return Network(init, network.apply)


def influence(network: Network, images: Array) -> float:
    """Returns how far the first image's logits move, in training, if all others are replaced."""
    params, batch_stats = network.init(jax.random.key(0), images.shape[1:], data.CLASSES)
    half = len(images) // 2
    replaced = jnp.concatenate([images[:1], images[half + 1 : 2 * half]])

    @jax.jit
    def logits(batch: Array) -> Array:
        return network.apply(params, batch_stats, batch, True)[0][0]

    return float(jnp.abs(logits(images[:half]) - logits(replaced)).max())


class WithoutBatch(Study):
    """Accuracies by normalization and learning rate."""

    name, source = "without_batch", "the sources"
    caption = (
        "What to see: how high each curve is, and how far to the right it stays there. Only batch"
        " norm's output for an example depends on other examples. The question is which of the rest"
        " come near its accuracy, and near the learning rates that it allows."
    )

    def parts(self) -> Mapping[str, Part]:
        options = self.options
        images = data.selected(options)
        check_batch(options.batch_size, len(images.train_labels))
        examples, known = training.examples(images, standardize=True), units()
        first, _ = examples[0].pick(slice(INITIALIZING))
        make, parts = partial(vgg, widths=WIDTHS, stride=2), {}
        for name in options.norms:
            network = initialized_from(first, make) if name == "weight norm" else make(known[name])
            trainer = Trainer(network, examples, partial(optax.sgd, momentum=MOMENTUM))
            others = cache(partial(influence, network, first))
            for rate in options.learning_rates:
                work = partial(self.train, trainer, others, rate)
                parts[f"{name}, {rate:g}"] = Part(options.seeds * options.steps, work)
        return parts

    def train(
        self, trainer: Trainer, others: Callable[[], float], rate: float, advance: Advance
    ) -> dict[str, Any]:
        """Returns the accuracies of each seed after the last step."""
        steps, found = self.options.steps, {"training": [], "test": []}
        for seed in range(self.options.seeds):
            every = max(1, steps // EVALUATIONS)
            plan = Plan(seed, rate, steps, every, self.options.batch_size)
            run, state = trainer.finish(plan, advance)
            found["training"].append(trainer.accuracy(state, trainer.train))
            found["test"].append(run.accuracies[-1])
        return found | {"others": others()}

    def by_rate(self, name: str, which: str) -> dict[float, float]:
        """Returns medians of "training" or "test" accuracies, by finished learning rates."""
        return self.along(name, sorted(self.options.learning_rates), which)

    def best(self) -> dict[str, tuple[float, float]]:
        """Returns the best rate of each finished normalization, and its test accuracy."""
        best = {}
        for name in self.options.norms:
            if found := self.by_rate(name, "test"):
                rate = max(found, key=found.__getitem__)
                best[name] = rate, found[rate]
        return best

    def claims(self) -> Sequence[Claim]:
        found = {name: f"{accuracy:.1%}" for name, (_, accuracy) in self.best().items()}
        return [
            Claim(f"{name} ({source})", reported, f"{found[name]}, batch norm's {found['batch']}")
            for name, (source, reported) in REPORTED.items()
            if name in found and "batch" in found
        ]

    def tables(self) -> Sequence[Table]:
        rows = []
        for name, (rate, test) in self.best().items():
            near = [
                rate for rate, found in self.by_rate(name, "test").items() if found >= test - NEAR
            ]
            accuracies = f"{self.by_rate(name, 'training')[rate]:.1%}", f"{test:.1%}"
            others = f"{self.results[f'{name}, {rate:g}']['others']:.1g}"
            span = f"{min(near):.3g} to {max(near):.3g}"
            rows.append((name, f"{rate:.3g}", *accuracies, span, others))
        title = f"After {self.options.steps} steps, median of {self.options.seeds} seed(s)"
        near = f"rates within {NEAR:.0%}"
        headings = "normalization", "best rate", "training", "test", near, "others"
        return [table(headings, rows, title=title)]

    def draw(self, path: Path) -> None:
        images, steps = data.TITLES[self.options.data], self.options.steps
        title = f"{images}: accuracy after {steps} steps, by learning rate"
        with report.figure(path, title, self.caption, size=(11, 4.8)) as (panels,):
            for axes, which in zip(panels, ("training", "test"), strict=True):
                self._draw_curves(axes, which)
            lines = panels[0].get_legend_handles_labels()
            panels[0].figure.legend(*lines, loc="outside right center", fontsize="small")

    def _draw_curves(self, axes: Axes, which: str) -> None:
        for i, name in enumerate(self.options.norms):
            if curve := self.by_rate(name, which):
                line = "o" + report.DASHES[i % len(report.DASHES)]
                values = [100 * value for value in curve.values()]
                axes.plot(list(curve), values, line, color=f"C{i}", label=name)
        title = f"{which} accuracy"
        report.dress(axes, None, xscale="log", xlabel="learning rate", title=title)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_xticks(sorted(self.options.learning_rates), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
