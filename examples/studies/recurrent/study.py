"""Trains recurrent cells to read images in pieces."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, report, training
from common.networks import Network, linear
from common.results import Result, in_words
from common.study import Advance, Claim, Part, Study, table
from jax import Array, lax
from jax.nn import initializers
from rich.table import Table
from studies.recurrent.cells import BATCH, LAYER, PLAIN, Cell, Tree, gru, lstm, unroll

CELLS = {"lstm": lstm, "gru": gru}
# by prefix
NORMS = {"": ("plain", PLAIN), "ln": ("layer norm", LAYER), "bn": ("batch norm", BATCH)}
READ = {"rows": "row by row", "pixels": "pixel by pixel", "permuted": "pixel by pixel, permuted"}
GOALS = (0.9, 0.97)  # accuracies to which the table counts the steps
REPORTED = {
    "LSTM": "98.9% of MNIST pixel by pixel, 90.2% permuted",
    "BN-LSTM": "99.0% of MNIST pixel by pixel, 95.4% permuted",
}
COMPARED = {
    "LSTM": "",
    "LN-LSTM": "needs fewer steps than LSTM and BN-LSTM (other tasks)",
    "BN-LSTM": "needs fewer steps than LSTM",
}
CLIP = 1.0  # of the gradient's norm, as Cooijmans et al. have it


def pieces(images: Array, sequence: str) -> Array:
    """Returns images `(batch, height, width, channels)` as sequences `(batch, time, inputs)`.

    A step has a row, or a pixel; "permuted" brings the pixels of all images in one random order.
    """
    batch, height, width, channels = images.shape
    if sequence == "rows":
        return images.reshape(batch, height, width * channels)
    pixels = images.reshape(batch, height * width, channels)
    if sequence == "permuted":
        pixels = pixels[:, np.random.default_rng(0).permutation(height * width)]
    return pixels


def classifier(cell: Cell, units: int, max_steps: int | None, sequence: str = "rows") -> Network:
    """Returns a network that reads an image, without blank ends, and classifies it."""

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        _, time, inputs = pieces(jnp.zeros((1, *image_shape)), sequence).shape
        cell_key, key = jax.random.split(key)
        params, batch_stats = cell.init(cell_key, inputs, units, max_steps or time)
        kernel = initializers.glorot_normal()(key, (units, num_classes), jnp.float32)
        logits = {"kernel": kernel, "bias": jnp.zeros(num_classes)}
        return {"cell": params, "logits": logits}, batch_stats

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        x = pieces(images, sequence)
        mask = with_ink(x)
        _, state, batch_stats = unroll(cell, params["cell"], batch_stats, x, train, mask=mask)
        return linear(params["logits"], state[0]), batch_stats

    return Network(init, apply)


def with_ink(steps: Array) -> Array:
    """Returns `(batch, time)`: True from the first to the last row, or pixel, that is not blank.

    Blank steps at the end only take time. At the start they would do harm: the state stays zero, so
    that the variance is 0, and the gradient grows by `scale / sqrt(epsilon)`, some 300, at each of
    them.
    """
    ink = (steps > 0).any(-1).astype(jnp.int8)
    return (lax.cummax(ink, axis=1) & lax.cummax(ink, axis=1, reverse=True)) > 0


def optimizer(learning_rate: Array | float) -> optax.GradientTransformation:
    """Returns Adam on gradients whose norm is clipped."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(learning_rate))


class Reading(Study):
    """Cells, each at each learning rate: how soon they read well, and how well."""

    name = "recurrent"
    source = "Cooijmans et al. 2016 (batch norm) and Ba et al. 2016 (layer norm)"
    caption = (
        "What to see: how far left a curve rises, and whether it does at both learning rates. The"
        " steps that a normalized cell saves at the low rate, the plain cell may save by the high"
        " one. Batch norm starts late: its running statistics have to forget their start first."
    )

    def parts(self) -> Mapping[str, Part]:
        options = self.options
        images = data.selected(options)
        training.check_batch(options.batch_size, len(images.train_labels))
        # Pixels from 0 to 1, where blank is 0.
        examples, parts = training.examples(images, standardize=False), {}
        for cell in options.cells:
            prefix, _, kind = cell.rpartition("-")
            made = CELLS[kind](NORMS[prefix][1])
            network = classifier(made, options.units, options.max_steps, options.sequence)
            trainer = training.Trainer(network, examples, optimizer)
            for rate in options.learning_rates:
                work = partial(self._train, cell, rate, trainer)
                name = f"{cell.upper():<7} rate {rate:<6.3g}"
                parts[name] = Part(options.seeds * options.steps, work)
        return parts

    def _train(self, cell: str, rate: float, trainer: training.Trainer, advance: Advance) -> Result:
        plans = (training.Plan.of(self.options, seed, rate) for seed in range(self.options.seeds))
        runs = [trainer.finish(plan, advance)[0] for plan in plans]
        return Result(cell.upper(), rate, runs)

    def content(self) -> dict[str, Any]:
        content = super().content()
        return content | {"cells": [each.content() for each in content.pop("results").values()]}

    def claims(self) -> Sequence[Claim]:
        best: dict[str, Result] = {}
        for result in self.results.values():
            if result.name not in best or result.best > best[result.name].best:
                best[result.name] = result
        what = f"{data.TITLES[self.options.data]} {READ[self.options.sequence]}"
        claims = [
            Claim(f"best accuracy, {name}", reported, f"{best[name].best:.1%} of {what}")
            for name, reported in REPORTED.items()
            if name in best
        ]
        steps = {name: _steps(best[name], GOALS[0]) for name in COMPARED if name in best}
        measured = ", ".join(f"{taken} ({name})" for name, taken in steps.items())
        for name in ("BN-LSTM", "LN-LSTM"):
            if name in steps and "LSTM" in steps:
                goal = f"steps to {GOALS[0]:.0%} at the best rate, {name}"
                claims.append(Claim(goal, COMPARED[name], measured))
        return claims

    def tables(self) -> Sequence[Table]:
        rows = []
        for result in self.results.values():
            steps = [_steps(result, goal) for goal in GOALS]
            last = f"{result.best:.1%}", f"{result.seconds:.1f}"
            rows.append((result.name, f"{result.learning_rate:.3g}", *steps, *last))
        goals = [f"steps to {goal:.0%}" for goal in GOALS]
        return [table(("cell", "rate", *goals, "best accuracy", "seconds"), rows)]

    def draw(self, path: Path) -> None:
        seeds = self.options.seeds
        title = f"{data.TITLES[self.options.data]} read {READ[self.options.sequence]}"
        title += f", median of {seeds} seeds" if seeds > 1 else ""
        panels: dict[str, dict[str, report.Curve]] = {}
        for result in self.results.values():
            prefix, _, kind = result.name.rpartition("-")
            panel = panels.setdefault(f"{kind}, learning rate {result.learning_rate:.3g}", {})
            panel[NORMS[prefix.lower()][0]] = result.curve
        report.draw_panels(path, title, "validation accuracy (%)", panels, self.caption, "log")


def _steps(result: Result, goal: float) -> str:
    """Returns the median of the steps to an accuracy, in words."""
    return in_words(median(run.steps_to(goal) for run in result.runs))
