"""The landscape that a VGG trains in, for `landscape.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from jax import Array
from rich.table import Table

import normjax as nj
from common import data, report
from common.interrupt import Interrupt
from common.session import Advance, Part
from common.study import Claim, Study, conduct
from common.training import Examples, State, Trainer, examples
from common.units import UNITS
from common.vgg import vgg

WIDTHS = ((16, 16), (32, 32), (32, 32))
NORMS = {"no normalization": "none", "batch norm": "batch"}
STEP_SIZES = (0.05, 0.1, 0.2, 0.4)  # times the gradient; the paper's figure 4 goes as far as 0.4
ITERATIONS = 40  # of Lanczos
MEASURES: Mapping[str, Callable[[nj.diagnostics.Landscape], Array]] = {
    "variation of the loss": lambda seen: seen.variation,
    "change of the gradient": lambda seen: seen.gradient_range[1],
    "effective beta-smoothness": lambda seen: seen.smoothness,
}
HIGHEST = 100.0  # of losses in the plot: what diverges goes beyond
COLORS = {name: f"C{i}" for i, name in enumerate(NORMS)}


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains each network and reports; returns the exit status."""
    return conduct(Landscapes(options), interrupt)


class Landscapes(Study):
    """Each network at each learning rate, over several seeds."""

    name = "landscape"
    source = "Santurkar et al. (2018)"
    caption = (
        "What to see: at each step, the range of the loss along the gradient of a training batch,"
        " up to 0.4 times the gradient, and how far gradients there are from the first: with batch"
        " norm both bands are low, and the loss's is narrow. Third, the largest ratio of that"
        " change to the distance moved. Last, the largest eigenvalue of the Hessian, over all"
        " directions: gradient descent on a quadratic is stable below the dashed line, 2 / rate."
    )

    def parts(self) -> Mapping[str, Part]:
        """Returns a part for each network and learning rate."""
        options = self.options
        images = data.selected(options)
        self.data = examples(images, standardize=True)
        steps = options.seeds * options.steps
        return {
            key(name, rate): Part(steps, partial(self._train, norm, rate))
            for rate in options.learning_rates
            for name, norm in NORMS.items()
        }

    def _train(self, norm: str, rate: float, advance: Advance) -> list[dict[str, Any]]:
        network = vgg(UNITS[norm], WIDTHS)
        trainer = Trainer(network, self.data, self.options.batch_size)
        walk, sharpness = instruments(network.apply)
        return [
            self._run(trainer, walk, sharpness, seed, rate, advance)
            for seed in range(self.options.seeds)
        ]

    def _run(
        self,
        trainer: Trainer,
        walk: Callable,
        sharpness: Callable,
        seed: int,
        rate: float,
        advance: Advance,
    ) -> dict[str, Any]:
        options, walks, eigenvalues, accuracies = self.options, [], {}, []
        evaluations = -(-options.steps // options.eval_every)
        checkpoints = set(np.linspace(0, evaluations - 1, options.checkpoints).astype(int).tolist())
        steps = []
        for i, (step, state, order) in enumerate(
            trainer.states(seed, rate, options.steps, options.eval_every)
        ):
            rows = order[-1]
            walks.append(jax.device_get(walk(state, trainer.train, rows)))
            if i in checkpoints:
                eigenvalues[step] = jax.device_get(sharpness(state, trainer.train, rows))
            accuracies.append(trainer.accuracy(state, trainer.test))
            advance(len(order), f"{accuracies[-1]:.1%}")
            steps.append(step)
        history = jax.tree.map(lambda *leaves: np.stack(leaves), *walks)
        return {
            "seed": seed,
            "steps": steps,
            "accuracy": accuracies,
            "landscape": {field: listed(value) for field, value in history._asdict().items()},
            "checkpoints": list(eigenvalues),
            "eigenvalues": [number(found.value) for found in eigenvalues.values()],
            "converged": [bool(found.converged) for found in eigenvalues.values()],
        }

    def tables(self) -> list[Table]:
        """Returns the medians over steps and seeds."""
        title = (
            "Along the gradient (medians over the steps), in the sharpest direction, and in the end"
        )
        table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("", *MEASURES, "largest eigenvalue, first to last", "test accuracy"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, runs in self.results.items():
            measured = [shown(typical(runs, of)) for of in MEASURES.values()]
            sharpness = " ".join(map(shown, eigenvalues(runs)))
            table.add_row(name, *measured, sharpness, f"{accuracy(runs):.1%}")
        return [table]

    def claims(self) -> list[Claim]:
        """Returns the paper's claims, and batch norm's effect in finished runs that converged."""

        def each(
            of: Callable[[list[dict[str, Any]]], float],
            compare: Callable[[float, float], str] = compared,
        ) -> str:
            found = []
            for rate in self.options.learning_rates:
                if all(key(name, rate) in self.results for name in NORMS):
                    values = [of(self.results[key(name, rate)]) for name in NORMS]
                    found.append(f"at rate {rate:g} {compare(*values)}")
            return "; ".join(found)

        reported = (
            "varies far less (figure 4a)",
            "changes far less, most of all early (4b)",
            "less (4c)",
        )
        along = [
            Claim(f"{what}, with batch norm", said, each(partial(typical, of=of)))
            for (what, of), said in zip(MEASURES.items(), reported, strict=True)
        ]
        return [
            *along,
            Claim("largest eigenvalue, with batch norm",
                  "no figure; less curvature along the gradient (theorem)",
                  each(lambda runs: float(np.median(finite(eigenvalues(runs)))))),
            Claim("test accuracy, with batch norm", "higher, and sooner (figure 1)",
                  each(accuracy, lambda plain, norm: f"{norm:.1%} instead of {plain:.1%}")),
        ]  # fmt: skip

    def draw(self, path: Path) -> None:
        """Draws a row for each learning rate."""
        rates = [
            rate
            for rate in self.options.learning_rates
            if any(key(name, rate) in self.results for name in NORMS)
        ]
        images = data.TITLES[self.options.data]
        title = f"{images}: the landscape that a VGG trains in, along the gradient"
        size = 13.0, 1.2 + 2.9 * len(rates)
        with report.figure(path, title, self.caption, (len(rates), 4), size) as grid:
            for row, rate in zip(grid, rates, strict=True):
                self._draw_row(row, rate)
            for panel in grid[:-1].flat:
                panel.set_xlabel("")

    def _draw_row(self, row: np.ndarray, rate: float) -> None:
        runs = {
            name: self.results[key(name, rate)] for name in NORMS if key(name, rate) in self.results
        }
        steps = next(iter(runs.values()))[0]["steps"]
        nj.diagnostics.plot.landscape(
            {name: history(runs[name]) for name in runs}, steps, axes=row[:3]
        )
        for name in runs:
            at = runs[name][0]["checkpoints"]
            row[3].plot(at, eigenvalues(runs[name]), "o-", color=COLORS[name], label=name)
        row[3].axhline(2 / rate, color="0.4", linestyle="--", linewidth=1)
        row[3].set(yscale="log", xlabel="step")
        row[3].set_title("largest eigenvalue of the Hessian", fontsize="medium")
        row[3].grid(alpha=0.3)
        row[0].set_ylabel(f"learning rate {rate:g}")
        row[0].set_ylim(top=min(row[0].get_ylim()[1], HIGHEST))


def instruments(apply: Callable) -> tuple[Callable, Callable]:
    """Returns compiled functions for the landscape and the sharpest direction, on one batch."""

    def on_batch(state: State, train: Examples, rows: Array) -> Callable[[Any], Array]:
        images, labels = train.pick(rows)

        def loss(params: Any) -> Array:
            logits, _ = apply(params, state.batch_stats, images, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return loss

    @jax.jit
    def walk(state: State, train: Examples, rows: Array) -> nj.diagnostics.Landscape:
        return nj.diagnostics.landscape(
            on_batch(state, train, rows), state.params, step_sizes=STEP_SIZES
        )

    @jax.jit
    def sharpness(state: State, train: Examples, rows: Array) -> nj.diagnostics.Eigenvalue:
        loss = on_batch(state, train, rows)
        return nj.diagnostics.hessian_eigenvalue(
            loss, state.params, iterations=ITERATIONS
        )._replace(vector=())

    return walk, sharpness


def key(name: str, rate: float) -> str:
    """Returns the name of a part."""
    return f"{name}, rate {rate:g}"


def history(runs: list[dict[str, Any]]) -> nj.diagnostics.Landscape:
    """Returns the landscape over the steps, the median over the seeds."""
    fields = nj.diagnostics.Landscape._fields
    return nj.diagnostics.Landscape(
        *(
            jnp.asarray(np.median([np.asarray(run["landscape"][field], float) for run in runs], 0))
            for field in fields
        )
    )


def eigenvalues(runs: list[dict[str, Any]]) -> np.ndarray:
    """Returns the largest eigenvalue at each checkpoint, the median over the seeds."""
    return np.median([np.asarray(run["eigenvalues"], float) for run in runs], 0)


def number(value: Any) -> float | None:
    """Returns a number as JSON has it: None where training diverged."""
    return float(value) if np.isfinite(value) else None


def listed(values: np.ndarray) -> list:
    """Returns an array as JSON has it."""
    return [listed(value) if np.ndim(value) else number(value) for value in values]


def typical(runs: list[dict[str, Any]], of: Callable[[nj.diagnostics.Landscape], Array]) -> float:
    """Returns the median over the steps of a measure of the landscape, until training diverged."""
    return float(np.median(finite(np.asarray(of(history(runs))))))


def accuracy(runs: list[dict[str, Any]]) -> float:
    """Returns the median test accuracy after the last step."""
    return float(np.median([run["accuracy"][-1] for run in runs]))


def finite(values: np.ndarray) -> np.ndarray:
    """Returns those that are; infinity if there are none."""
    return values[np.isfinite(values)] if np.isfinite(values).any() else np.asarray([np.inf])


def compared(plain: float, normalized: float) -> str:
    """Returns how many times less or more the second is."""
    if normalized <= plain:
        return f"{plain / normalized:.3g} times less"
    return f"{normalized / plain:.3g} times more"


def shown(value: float) -> str:
    """Returns a number for the table."""
    return f"{value:.3g}" if np.isfinite(value) else "diverged"
