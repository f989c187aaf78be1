"""Trains the variants, the baseline's sweep, and networks of growing depth; resumes."""

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import rich.table
from common import data, report
from common.networks import BATCH_NORM_MOMENTUM, mlp, style
from common.results import Result, Run
from common.study import Advance, Part, Study
from common.training import Plan, State, Trainer, check_batch, examples
from flax import serialization
from matplotlib.axes import Axes
from studies.speedup import inception, tables
from studies.speedup.tables import PAPER, Depth, best_of_sweep, compare

DEPTH_FACTORS = (5, 30)  # of the learning rate, as of BN-x5 and BN-x30; the better one counts
DEPTH_SHARE = 8  # networks of growing depth get an eighth of the steps
KEEP_EVERY = 20.0  # seconds between two copies of what is needed to go on
MOMENTUM = {"mlp": None, "inception": 0.9}  # of SGD: none for the MLP, as in the paper's 4.1


class Variant(NamedTuple):
    """A row of the paper's figure 3: a network; `factor` multiplies the baseline's rate."""

    name: str
    normalize: bool
    factor: float
    activation: str
    depth: int | None = None  # of the networks of growing depth


def variants(activation: str) -> list[Variant]:
    """Returns the variants of a network; the first is the baseline."""
    return [
        Variant("Baseline", normalize=False, factor=1, activation=activation),
        Variant("BN-Baseline", normalize=True, factor=1, activation=activation),
        Variant("BN-x5", normalize=True, factor=5, activation=activation),
        Variant("BN-x30", normalize=True, factor=30, activation=activation),
    ]


# The paper's MLP has sigmoids only, so that there the variants with sigmoids are the variants; the
# Inception has ReLUs, and the two with sigmoids show what normalization does for a saturating
# network.
VARIANTS = {
    "mlp": variants("sigmoid"),
    "inception": [
        *variants("relu"),
        Variant("BN-x5-Sigmoid", normalize=True, factor=5, activation="sigmoid"),
        Variant("Baseline-Sigmoid", normalize=False, factor=1, activation="sigmoid"),
    ],
}


class Speedup(Study):
    """The variants and the sweep of one command line, and what is finished of them."""

    name = "speedup"
    caption = (
        "What to see: where each curve crosses the dashed line, the baseline's best accuracy. For"
        " networks of growing depth: plain sigmoids stop training as layers are added, normalized"
        " ones do not."
    )

    def parts(self) -> Mapping[str, Part]:
        options = self.options
        images = data.selected(options)
        self.kept = Kept(options)
        options.train_examples = len(images.train_labels)
        options.test_examples = len(images.test_labels)
        options.momentum = MOMENTUM[options.network]
        options.batch_norm_momentum = BATCH_NORM_MOMENTUM
        check_batch(options.batch_size, options.train_examples)
        # The paper's MLP takes pixels in [0, 1]. For images in colour, standardized ones are what a
        # baseline deserves.
        self.examples = examples(images, standardize=options.network == "inception")
        self.trainer = cache(self._trainer)
        self.variants = VARIANTS[options.network]
        baseline = self.variants[0]
        self.sweep = [baseline._replace(factor=each) for each in options.sweep if each != 1]
        self.deep = list(self._deep())
        parts = {}
        for variant in (*self.variants, *self.sweep, *self.deep):
            steps, work = self.steps(variant), partial(self._train, variant)
            parts[self.key(variant)] = Part(options.seeds * steps, work)
        return parts

    def _deep(self) -> Iterator[Variant]:
        for depth in self.options.depths:
            for normalize in (False, True):
                name = f"{depth} layers{', BN' * normalize}"
                for factor in DEPTH_FACTORS:
                    yield Variant(name, normalize, factor, "sigmoid", depth)

    def key(self, variant: Variant) -> str:
        """Returns the name of a variant's runs."""
        return f"{variant.name:<16} rate {self.options.learning_rate * variant.factor:<7.3g}"

    def steps(self, variant: Variant) -> int:
        """Returns the budget of each of a variant's runs."""
        steps = self.options.steps
        return steps if variant.depth is None else max(1, steps // DEPTH_SHARE)

    def _trainer(self, normalize: bool, activation: str, depth: int | None) -> Trainer:
        """Returns the trainer of a network, compiled once for all rates and seeds."""
        unit = style(normalize, activation)
        if depth is not None:
            network = mlp(unit, depth)
        elif self.options.modules == 10:
            network = inception.inception_of_ten(unit)
        else:
            network = inception.inception(unit)
        optimizer = partial(optax.sgd, momentum=self.options.momentum)
        return Trainer(network, self.examples, optimizer)

    def _train(self, variant: Variant, advance: Advance) -> Result:
        runs = [self._run(variant, seed, advance) for seed in range(self.options.seeds)]
        return Result(variant.name, self.options.learning_rate * variant.factor, runs)

    def _run(self, variant: Variant, seed: int, advance: Advance) -> Run:
        """Trains with a seed, or goes on where that was interrupted."""
        key, steps = f"{self.key(variant)} seed {seed}", self.steps(variant)
        run = self.kept.run(key)
        if run is not None:
            advance(run.steps[-1], f"{run.accuracies[-1]:.1%}")
            if run.steps[-1] >= steps:
                return run
        depth = variant.depth or self.options.depth
        trainer = self.trainer(variant.normalize, variant.activation, depth)
        since = run and (run, self.kept.state(key, trainer.init(seed)))

        def keep(done: int, remark: str) -> None:
            try:
                advance(done, remark)
            except BaseException:
                self.kept.write(key, *trainer.latest)
                raise
            self.kept.write(key, *trainer.latest, KEEP_EVERY)

        rate = self.options.learning_rate * variant.factor
        plan = Plan.of(self.options, seed, rate)._replace(steps=steps)
        run, _ = trainer.finish(plan, keep, since)
        self.kept.write(key, run)
        return run

    def save(self, status: str) -> None:
        super().save(status)
        if status == "finished":
            self.kept.path.unlink(missing_ok=True)

    def finished(self, variants: Sequence[Variant]) -> list[Result]:
        """Returns those of the variants that are finished."""
        keys = map(self.key, variants)
        return [self.results[key] for key in keys if key in self.results]

    @property
    def best_baseline(self) -> Result | None:
        """The baseline at the best rate of its sweep, None unless the sweep is finished."""
        swept = self.finished(self.sweep)
        if not self.sweep or len(swept) < len(self.sweep):
            return None
        return best_of_sweep([*self.finished(self.variants[:1]), *swept])

    @property
    def depths(self) -> list[Depth]:
        """The finished networks of growing depth."""
        whole, found = len(DEPTH_FACTORS), []
        for depth in self.options.depths:
            results = self.finished([each for each in self.deep if each.depth == depth])
            if len(results) == 2 * whole:
                found.append(Depth(depth, results[:whole], results[whole:]))
        return found

    def comparisons(self) -> list[dict[str, Any]]:
        """Returns the tables that can be made from what is finished."""
        if not self.results:
            return []
        baseline, *others = self.finished(self.variants)
        title = "As in the paper: relative to the baseline's learning rate"
        made = [compare(title, baseline, others, data.CLASSES, PAPER)]
        if best := self.best_baseline:
            title = "Stricter than the paper: relative to the baseline at its best learning rate"
            best = best._replace(name="Baseline, best")
            made.append(compare(title, best, others, data.CLASSES))
        return made

    def content(self) -> dict[str, Any]:
        parts = {
            "variants": self.finished(self.variants),
            "sweep": self.finished(self.sweep),
            "depths": self.depths,
        }
        content = {name: [each.content() for each in found] for name, found in parts.items()}
        return content | {"tables": self.comparisons()}

    def tables(self) -> Iterator[rich.table.Table | str]:
        for made in self.comparisons():
            yield tables.shown(made)
        if best := self.best_baseline:
            results = [*self.finished(self.variants[:1]), *self.finished(self.sweep)]
            rates = sorted(result.learning_rate for result in results)
            shown = ", ".join(f"{rate:.3g}" for rate in rates)
            yield f"Sweep: {shown}; best {best.learning_rate:.3g}"
            if best.learning_rate in (rates[0], rates[-1]):
                end = "The best is at the end of the sweep"
                yield f"{end}: --sweep should go further for a strict comparison."
        if self.depths:
            yield tables.depths_table(self.depths, self.steps(self.deep[0]))

    def interrupted(self, parts: int) -> str:
        variants, swept = self.finished(self.variants), self.finished(self.sweep)
        return (
            f"{len(variants)} of {len(self.variants)} variants are finished, {len(swept)} of "
            f"{len(self.sweep)} other rates of the baseline's sweep and {len(self.depths)} of "
            f"{len(self.options.depths)} depths. The same command goes on from here."
        )

    def draw(self, path: Path) -> None:
        curves = self.finished(self.variants)
        if (best := self.best_baseline) and best is not curves[0]:
            curves.insert(1, best._replace(name="Baseline, best"))
        panels = 2 if self.depths else 1
        title, size = f"{self.options.network} on {self.options.data}", (2 + 5 * panels, 5.5)
        with report.figure(path, title, self.caption, (1, panels), size) as grid:
            _draw_curves(grid[0, 0], curves)
            if self.depths:
                _draw_depths(grid[0, 1], self.depths, self.steps(self.deep[0]))


def _draw_curves(axes: Axes, results: Sequence[Result]) -> None:
    """Draws accuracy against steps, a line for each result; dashed at the first one's best."""
    for result in results:
        steps, accuracies = result.curve
        label = f"{result.name} ({result.learning_rate:.3g})"
        axes.plot(steps, [100 * value for value in accuracies], label=label)
    best = 100 * results[0].best
    label = f"the baseline's best: {best:.1f}%"
    axes.axhline(best, color="C0", linestyle="--", linewidth=1, label=label)
    labels = {"xlabel": "training steps", "ylabel": "test accuracy (%)"}
    report.dress(axes, xscale="log", ylim=(0, 103), title="variants (learning rate)", **labels)
    axes.grid(alpha=0.3, which="both")


def _draw_depths(axes: Axes, depths: Sequence[Depth], steps: int) -> None:
    """Draws best accuracy against depth."""
    layers = [depth.layers for depth in depths]
    for kind in depths[0].best:
        axes.plot(layers, [100 * depth.best[kind].best for depth in depths], "o-", label=kind)
    report.dress(axes, xscale="log", ylim=(0, 103), title=f"best within {steps:,} steps")
    axes.set_xlabel("hidden layers of sigmoids")
    axes.set_xticks(layers, map(str, layers))
    axes.minorticks_off()


class Kept:
    """What a run of hours is resumed from, in a file: how far each run got, and the last's state.

    The file counts if it was written with the same options of the command line.
    """

    def __init__(self, options: Namespace):
        self.path = options.out / "speedup.state"
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        self.settings, self.written = repr(sorted(settings.items())), time.monotonic()
        self.runs: dict[str, Any] = {}
        if self.path.exists():
            stored: Any = serialization.msgpack_restore(self.path.read_bytes())
            self.runs = stored["runs"] if stored["settings"] == self.settings else {}

    def run(self, key: str) -> Run | None:
        """Returns how far a run got."""
        return Run(**self.runs[key]["run"]) if key in self.runs else None

    def state(self, key: str, like: State) -> State:
        """Returns the state of a run that is not finished, of the structure of another."""
        state = serialization.from_state_dict(like, self.runs[key]["state"])
        return jax.tree.map(jnp.asarray, state)

    def write(self, key: str, run: Run, state: State | None = None, every: float = 0) -> None:
        """Notes how far a run got, unless that was done in the last `every` seconds.

        A run needs no state if it is finished.
        """
        if time.monotonic() - self.written < every:
            return
        self.runs[key] = {"run": run._asdict(), "state": serialization.to_state_dict(state)}
        stored = {"settings": self.settings, "runs": self.runs}
        report.write(self.path, serialization.msgpack_serialize(jax.device_get(stored)))
        self.written = time.monotonic()
