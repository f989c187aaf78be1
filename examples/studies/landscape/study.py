"""The landscape that a VGG trains in."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import data, report
from common.networks import UNITS, vgg
from common.study import Advance, Claim, Part, Study, table
from common.training import Examples, State, Trainer, cross_entropy, examples
from jax import Array
from rich.table import Table

import normjax as nj

WIDTHS = ((16, 16), (32, 32), (32, 32))
NORMS = {"no normalization": "none", "batch norm": "batch"}
STEP_SIZES = (0.05, 0.1, 0.2, 0.4)  # times the gradient; the paper's figure 4 goes as far as 0.4
ITERATIONS = 40  # of Lanczos
MEASURES: Mapping[str, Callable[[nj.diagnostics.Landscape], Array]] = {
    "variation of the loss": lambda seen: seen.variation,
    "change of the gradient": lambda seen: seen.gradient_range[1],
    "effective beta-smoothness": lambda seen: seen.smoothness,
}
REPORTED = (
    "varies far less (figure 4a)",
    "changes far less, most of all early (4b)",
    "less (4c)",
)
HIGHEST = 100.0  # of losses in the plot: what diverges goes beyond
Runs = list[dict[str, Any]]


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
        self.data = examples(data.selected(self.options), standardize=True)
        steps = self.options.seeds * self.options.steps
        return {
            f"{name}, rate {rate:g}": Part(steps, partial(self._train, norm, rate))
            for rate in self.options.learning_rates
            for name, norm in NORMS.items()
        }

    def _train(self, norm: str, rate: float, advance: Advance) -> Runs:
        network = vgg(UNITS[norm], WIDTHS)
        trainer = Trainer(network, self.data, self.options.batch_size)
        walk, sharpness = instruments(network.apply)
        evaluations = -(-self.options.steps // self.options.eval_every)
        checkpoints = np.linspace(0, evaluations - 1, self.options.checkpoints).astype(int)
        runs = []
        for seed in range(self.options.seeds):
            walks, steps, accuracies, eigenvalues = [], [], [], {}
            for i, (step, state, order) in enumerate(
                trainer.states(seed, rate, self.options.steps, self.options.eval_every)
            ):
                walks.append(jax.device_get(walk(state, trainer.train, order[-1])))
                if i in checkpoints:
                    eigenvalues[step] = jax.device_get(sharpness(state, trainer.train, order[-1]))
                steps.append(step)
                accuracies.append(trainer.accuracy(state, trainer.test))
                advance(len(order), f"{accuracies[-1]:.1%}")
            history = jax.tree.map(lambda *leaves: np.stack(leaves), *walks)
            run = {"seed": seed, "steps": steps, "accuracy": accuracies}
            run["landscape"] = {name: listed(value) for name, value in history._asdict().items()}
            run["checkpoints"] = list(eigenvalues)
            run["eigenvalues"] = [number(found.value) for found in eigenvalues.values()]
            run["converged"] = [bool(found.converged) for found in eigenvalues.values()]
            runs.append(run)
        return runs

    def at(self, rate: float) -> dict[str, Runs]:
        """Returns the finished runs at a learning rate, by network."""
        named = {name: self.results.get(f"{name}, rate {rate:g}") for name in NORMS}
        return {name: runs for name, runs in named.items() if runs}

    def tables(self) -> list[Table]:
        title = (
            "Along the gradient (medians over the steps), in the sharpest direction, and in the end"
        )
        headings = ("", *MEASURES, "largest eigenvalue, first to last", "test accuracy")
        made = table(headings, title=title)
        for name, runs in self.results.items():
            measured = [shown(typical(runs, of)) for of in MEASURES.values()]
            sharpness = " ".join(map(shown, eigenvalues(runs)))
            made.add_row(name, *measured, sharpness, f"{accuracy(runs):.1%}")
        return [made]

    def claims(self) -> list[Claim]:
        along = [
            Claim(f"{what}, with batch norm", reported, self._compared(partial(typical, of=of)))
            for (what, of), reported in zip(MEASURES.items(), REPORTED, strict=True)
        ]
        sharpest = self._compared(lambda runs: float(np.median(finite(eigenvalues(runs)))))
        theorem = "no figure; less curvature along the gradient (theorem)"
        accuracies = self._compared(
            accuracy, lambda plain, norm: f"{norm:.1%} instead of {plain:.1%}"
        )
        return [
            *along,
            Claim("largest eigenvalue, with batch norm", theorem, sharpest),
            Claim("test accuracy, with batch norm", "higher, and sooner (figure 1)", accuracies),
        ]

    def _compared(
        self, of: Callable[[Runs], float], compare: Callable[[float, float], str] | None = None
    ) -> str:
        """Returns batch norm's effect at each rate at which both networks are finished."""
        pairs = {rate: self.at(rate) for rate in self.options.learning_rates}
        return "; ".join(
            f"at rate {rate:g} {(compare or compared)(*map(of, runs.values()))}"
            for rate, runs in pairs.items()
            if len(runs) == len(NORMS)
        )

    def draw(self, path: Path) -> None:
        rates = [rate for rate in self.options.learning_rates if self.at(rate)]
        images = data.TITLES[self.options.data]
        title = f"{images}: the landscape that a VGG trains in, along the gradient"
        size = 13.0, 1.2 + 2.9 * len(rates)
        with report.figure(path, title, self.caption, (len(rates), 4), size) as grid:
            for row, rate in zip(grid, rates, strict=True):
                self._draw_row(row, rate)
            for panel in grid[:-1].flat:
                panel.set_xlabel("")

    def _draw_row(self, row: np.ndarray, rate: float) -> None:
        runs = self.at(rate)
        steps = next(iter(runs.values()))[0]["steps"]
        histories = {name: history(of_name) for name, of_name in runs.items()}
        nj.diagnostics.plot.landscape(histories, steps, axes=row[:3])
        for name, of_name in runs.items():
            color = f"C{list(NORMS).index(name)}"
            row[3].plot(of_name[0]["checkpoints"], eigenvalues(of_name), "o-", color=color)
        row[3].axhline(2 / rate, color="0.4", linestyle="--", linewidth=1)
        report.dress(row[3], yscale="log", xlabel="step")
        row[3].set_title("largest eigenvalue of the Hessian", fontsize="medium")
        row[0].set_ylabel(f"learning rate {rate:g}")
        row[0].set_ylim(top=min(row[0].get_ylim()[1], HIGHEST))


def instruments(apply: Callable) -> tuple[Callable, Callable]:
    """Returns compiled functions for the landscape and the sharpest direction, on one batch."""

    def on_batch(state: State, train: Examples, rows: Array) -> Callable[[Any], Array]:
        images, labels = train.pick(rows)

        def loss(params: Any) -> Array:
            return cross_entropy(apply(params, state.batch_stats, images, True)[0], labels).mean()

        return loss

    @jax.jit
    def walk(state: State, train: Examples, rows: Array) -> nj.diagnostics.Landscape:
        loss = on_batch(state, train, rows)
        return nj.diagnostics.landscape(loss, state.params, step_sizes=STEP_SIZES)

    @jax.jit
    def sharpness(state: State, train: Examples, rows: Array) -> nj.diagnostics.Eigenvalue:
        loss = on_batch(state, train, rows)
        found = nj.diagnostics.hessian_eigenvalue(loss, state.params, iterations=ITERATIONS)
        return found._replace(vector=())

    return walk, sharpness


def history(runs: Runs) -> nj.diagnostics.Landscape:
    """Returns the landscape over the steps, the median over the seeds."""
    landscapes = [run["landscape"] for run in runs]
    fields = nj.diagnostics.Landscape._fields
    medians = {
        field: np.median([np.asarray(each[field], float) for each in landscapes], 0)
        for field in fields
    }
    return nj.diagnostics.Landscape(**jax.tree.map(jnp.asarray, medians))


def eigenvalues(runs: Runs) -> np.ndarray:
    """Returns the largest eigenvalue at each checkpoint, the median over the seeds."""
    return np.median([np.asarray(run["eigenvalues"], float) for run in runs], 0)


def number(value: Any) -> float | None:
    """Returns a number as JSON has it: None where training diverged."""
    return float(value) if np.isfinite(value) else None


def listed(values: np.ndarray) -> list:
    """Returns an array as JSON has it."""
    return [listed(value) if np.ndim(value) else number(value) for value in values]


def typical(runs: Runs, of: Callable[[nj.diagnostics.Landscape], Array]) -> float:
    """Returns the median over the steps of a measure of the landscape, until training diverged."""
    return float(np.median(finite(np.asarray(of(history(runs))))))


def accuracy(runs: Runs) -> float:
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
