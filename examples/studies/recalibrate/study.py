"""Trains a network, and evaluates it with old and recalibrated statistics."""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import optax
from common import data, report
from common.networks import UNITS, Tree, mlp
from common.results import medians
from common.study import Advance, Part, Study, table
from common.training import (
    Examples,
    State,
    batch_loss,
    chunks,
    descend,
    examples,
    share_correct,
)
from jax import Array, lax
from rich.table import Table
from studies.domains.ways import shifted
from studies.speedup.inception import inception

import normjax as nj

MOMENTUM = 0.9  # of SGD
CALIBRATION_BATCH = 100
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


class Trainer:
    """A network with its training and evaluation, each compiled once for all seeds.

    There are examples as they are and shifted ones. The state of its optimizer also has the average
    of params and batch_stats.
    """

    def __init__(self, train: dict[str, Examples], test: dict[str, Examples], options: Namespace):
        self.options, self.train, self.test = options, train, test
        network = inception if options.data == "cifar10" else mlp
        self.network = network(UNITS["batch"])
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM)
        self._steps = jax.jit(self._take_steps)
        self._evaluate = jax.jit(partial(share_correct, self.network))

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and evaluates every so many steps, and after the last."""
        state, train = self.init(seed), self.train["as they are"]
        rng, points, curves = np.random.default_rng(seed), [], {}
        for done, steps in chunks(self.options.steps, self.options.eval_every):
            rows = rng.integers(len(train.labels), size=(steps, self.options.batch_size))
            state = self._steps(state, train, rows.astype(np.int32))
            points.append(done + steps)
            now = self.evaluate(state, {"recalibrated": {}})
            for name, accuracy in now.items():
                curves.setdefault(name, []).append(accuracy)
            advance(steps, f"{now[key('as they are', 'trained', 'running')]:.1%}")
        last = self.evaluate(state, WAYS)
        return {"seed": seed, "steps": points, "curves": curves, "last": last}

    def init(self, seed: int) -> State:
        """Returns the state that training starts from."""
        shape = self.train["as they are"].images.shape[1:]
        params, batch_stats = self.network.init(jax.random.key(seed), shape, data.CLASSES)
        average = params, batch_stats
        return State(params, batch_stats, (self.optimizer.init(params), average))

    def evaluate(self, state: State, ways: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Returns test accuracies with running statistics, and with each recalibration."""
        (ema, average), trained, shift = state.optimizer[1], state.params, self.options.shift
        variables = {
            ("as they are", "trained", "running"): (trained, state.batch_stats),
            ("as they are", "EMA", "running"): (ema, state.batch_stats),
            ("as they are", "EMA", "EMA of running"): (ema, average),
            (shift, "trained", "running"): (trained, state.batch_stats),
        }

        def forward(variables: tuple[Tree, Tree], images: Array) -> tuple[Array, Tree]:
            return self.network.apply(*variables, images, True)

        for name, settings in ways.items():
            for which in (("as they are", "EMA"), (shift, "trained")):
                given = ema if which[1] == "EMA" else trained, state.batch_stats
                batches = self.calibration(which[0])
                variables[*which, name] = nj.recalibrate(forward, given, batches, **settings)
        return {
            key(*which): float(self._evaluate(*given, self.test[which[0]]))
            for which, given in variables.items()
        }

    def calibration(self, name: str) -> list[Array]:
        """Returns batches of the training images of a kind."""
        images, _ = self.train[name].pick(slice(self.options.calibrate))
        starts = range(0, len(images), CALIBRATION_BATCH)
        return [images[start : start + CALIBRATION_BATCH] for start in starts]

    def _take_steps(self, state: State, train: Examples, rows: Array) -> State:
        loss = partial(batch_loss, self.network, train)

        def step(state: State, rows: Array) -> tuple[State, None]:
            optimizer, average = state.optimizer
            state = State(state.params, state.batch_stats, optimizer)
            state, _ = descend(loss, self.optimizer, state, (rows[None],))
            new: Any = state.params, state.batch_stats
            average = optax.incremental_update(new, average, 1 / self.options.ema)
            return state._replace(optimizer=(state.optimizer, average)), None

        return lax.scan(step, state, rows)[0]


def key(*parts: str) -> str:
    """Returns the name under which JSON has an accuracy."""
    return " / ".join(parts)


class Recalibrate(Study):
    """The runs of one command line, and what is finished of them."""

    name, unit = "recalibrate", "seeds"
    caption = (
        "What to see: averaged weights have other activations, so the running statistics of the"
        " trained weights do not fit them; nor do statistics of clean images fit shifted images."
        " One pass over training images without labels finds statistics that fit. No weight is"
        " changed."
    )

    def parts(self) -> Mapping[str, Part]:
        images, shift = data.selected(self.options), self.options.shift
        kinds = {"as they are": images, shift: shifted(images, shift)}
        made = {name: examples(kind, standardize=False) for name, kind in kinds.items()}
        train, test = ({name: kind[part] for name, kind in made.items()} for part in (0, 1))
        return self.seeds_apart(Trainer(train, test, self.options).run)

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs of the finished seeds."""
        return list(self.results.values())

    def content(self) -> dict[str, Any]:
        return {"runs": self.runs}

    def tables(self) -> list[Table]:
        seeds = f"median of {len(self.runs)} seed(s)"
        title = f"Test accuracy after step {self.options.steps}, {seeds}"
        last = [run["last"] for run in self.runs]
        names = sorted(last[0], key=lambda name: name.startswith(self.options.shift))
        rows = [(*name.split(" / "), f"{median(run[name] for run in last):.1%}") for name in names]
        return [table(("test images", "weights", "batch_stats", "accuracy"), rows, 3, title)]

    def draw(self, path: Path) -> None:
        steps = self.runs[0]["steps"]
        panels: dict[str, dict[str, report.Curve]] = {}
        for images, lines in (("as they are", AS_THEY_ARE), (self.options.shift, SHIFTED)):
            panel = panels.setdefault(f"test images {images}", {})
            for line, which in lines.items():
                curves = [run["curves"][key(images, *which)] for run in self.runs]
                panel[line] = steps, medians(curves)
        title = f"{data.TITLES[self.options.data]}: statistics that fit, and that do not"
        report.draw_panels(path, title, "test accuracy (%)", panels, self.caption)
