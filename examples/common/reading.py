"""Trains recurrent cells to read images row by row, for `recurrent.py`."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import optax
import rich.box
import rich.table
from jax import Array, lax
from jax.nn import initializers
from rich.console import Console

from common import data, report, session, training
from common.cells import BATCH, LAYER, PLAIN, Cell, Tree, gru, lstm, unroll
from common.interrupt import Interrupt
from common.networks import Network
from common.tables import Result, Run

CELLS = {"lstm": lstm, "gru": gru}
NORMS = {"": ("plain", PLAIN), "ln": ("layer norm", LAYER), "bn": ("batch norm", BATCH)}  # by prefix
GOALS = (0.9, 0.97)  # accuracies to which the table counts the steps
CLIP = 1.0  # of the gradient's norm, as Cooijmans et al. have it
CAPTION = (
    "What to see: how far left a curve rises, and whether it does at both learning rates. What a normalized cell saves"
    " at the low one, the plain cell may save by the high one. Batch norm starts late: its running statistics have to"
    " forget their start first."
)


def classifier(cell: Cell, units: int, max_steps: int | None) -> Network:
    """Returns a network that reads an image row by row, without the blank rows around it, and names what it shows."""

    def init(key: Array, image_shape: Sequence[int], num_classes: int) -> tuple[Tree, Tree]:
        height, width, channels = image_shape
        cell_key, key = jax.random.split(key)
        params, batch_stats = cell.init(cell_key, width * channels, units, max_steps or height)
        kernel = initializers.glorot_normal()(key, (units, num_classes), jnp.float32)
        return {"cell": params, "logits": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}, batch_stats

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        rows = images.reshape(*images.shape[:2], -1)
        _, state, batch_stats = unroll(cell, params["cell"], batch_stats, rows, train, mask=with_ink(rows))
        return state[0] @ params["logits"]["kernel"] + params["logits"]["bias"], batch_stats

    return Network(init, apply)


def with_ink(rows: Array) -> Array:
    """Returns `(batch, rows)`: True from the first row of an image that is not blank to the last.

    The blank ones at the end do no more than take time. Those at the start would do harm: the state stays zero, so that
    what is normalized has variance 0, and the gradient grows by `scale / sqrt(epsilon)`, some 300, at each of them.
    """
    ink = (rows > 0).any(-1).astype(jnp.int8)
    return (lax.cummax(ink, axis=1) & lax.cummax(ink, axis=1, reverse=True)) > 0


def optimizer(learning_rate: Array | float) -> optax.GradientTransformation:
    """Returns Adam on gradients whose norm is clipped."""
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(learning_rate))


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains the cells of the command line and reports; returns the exit status."""
    return session.guard("recurrent.py", options.out, lambda: Reading(options).run(interrupt, Console()))


class Reading:
    """The cells of one command line, and what is finished of them."""

    def __init__(self, options: Namespace):
        self.options = options
        images = data.load(options.data, options.data_dir).limit(options.train_examples, options.test_examples)
        if options.batch_size > len(images.train_labels):
            raise data.DataError(f"--batch-size {options.batch_size}: there are {len(images.train_labels)} examples")
        # Pixels from 0 to 1, where blank is 0.
        self.examples = training.examples(images, standardize=False)
        self.runs: dict[str, list[Run]] = {}
        options.out.mkdir(parents=True, exist_ok=True)

    def run(self, interrupt: Interrupt, console: Console) -> bool:
        """Trains, shows and returns whether all is trained."""
        options, variants = self.options, {}
        for cell in options.cells:
            trainer = cache(partial(self._trainer, cell))
            for rate in options.learning_rates:
                variants[_name(cell, rate)] = partial(self._train, trainer, rate)
        self.save("running")
        finished = session.train_all(variants, options.seeds, options.steps, interrupt, console, self._finished)
        self.save("finished" if finished else "interrupted")
        self.show(console, finished)
        return finished

    def _trainer(self, cell: str) -> training.Trainer:
        prefix, _, kind = cell.rpartition("-")
        network = classifier(CELLS[kind](NORMS[prefix][1]), self.options.units, self.options.max_steps)
        return training.Trainer(network, self.examples, self.options.batch_size, optimizer=optimizer)

    def _train(
        self, trainer: Callable[[], training.Trainer], rate: float, seed: int, evaluated: session.Evaluated
    ) -> Run:
        return trainer().run(seed, rate, self.options.steps, self.options.eval_every, evaluated)

    def _finished(self, name: str, runs: list[Run]) -> None:
        self.runs[name] = runs
        self.save("running")

    @property
    def results(self) -> dict[tuple[str, float], Result]:
        """What is finished, by cell and learning rate."""
        asked = [(cell, rate) for cell in self.options.cells for rate in self.options.learning_rates]
        runs = {(cell, rate): self.runs.get(_name(cell, rate)) for cell, rate in asked}
        return {(cell, rate): Result(cell.upper(), rate, of) for (cell, rate), of in runs.items() if of}

    def save(self, status: str) -> None:
        """Writes all there is so far as JSON."""
        config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.options).items()}
        content = {"status": status, "config": config, **session.environment()}
        content["cells"] = [report.result_content(result) for result in self.results.values()]
        report.write_json(self.options.out / "recurrent.json", content)

    def show(self, console: Console, finished: bool) -> None:
        """Prints the tables and writes the plot."""
        console.print(_table(list(self.results.values())))
        if not finished:
            asked = len(self.options.cells) * len(self.options.learning_rates)
            console.print(f"Interrupted: {len(self.runs)} of {asked} lines are finished.")
        if self.runs:
            path, seeds = self.options.out / "recurrent.png", self.options.seeds
            title = f"{data.TITLES[self.options.data]} read row by row" + (
                f", median of {seeds} seeds" if seeds > 1 else ""
            )
            report.write_panels(path, title, "validation accuracy (%)", self._panels(), CAPTION, "log")
            console.print(f"Plot: {path.resolve()}", soft_wrap=True)
        console.print(f"Results: {(self.options.out / 'recurrent.json').resolve()}", soft_wrap=True)

    def _panels(self) -> dict[str, dict[str, report.Curve]]:
        """Returns the curves by normalization, for each cell and learning rate."""
        panels: dict[str, dict[str, report.Curve]] = {}
        for (cell, rate), result in self.results.items():
            prefix, _, kind = cell.rpartition("-")
            panels.setdefault(f"{kind.upper()}, learning rate {rate:.3g}", {})[NORMS[prefix][0]] = result.curve
        return panels


def _table(results: Sequence[Result]) -> rich.table.Table:
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("cell", no_wrap=True)
    for heading in ("rate", *(f"steps to {goal:.0%}" for goal in GOALS), "best accuracy", "seconds"):
        shown.add_column(heading, justify="right")
    for result in results:
        steps = [median(run.steps_to(goal) for run in result.runs) for goal in GOALS]
        reached = [f"{value:,.0f}" if math.isfinite(value) else "not reached" for value in steps]
        shown.add_row(
            result.name, f"{result.learning_rate:.3g}", *reached, f"{result.best:.1%}", f"{result.seconds:.1f}"
        )
    return shown


def _name(cell: str, rate: float) -> str:
    return f"{cell.upper():<7} rate {rate:<6.3g}"
