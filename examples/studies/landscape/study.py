"""The landscape that a VGG trains in."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import data, report
from common.networks import UNITS, Network, vgg
from common.study import Advance, Claim, Part, Study, table
from common.training import Examples, Plan, State, Trainer, batch_loss, examples
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
REPORTED = {
    "variation of the loss": "varies far less (figure 4a)",
    "change of the gradient": "changes far less, most of all early (4b)",
    "effective beta-smoothness": "less (4c)",
    "largest eigenvalue": "no figure; less curvature along the gradient (theorem)",
    "test accuracy": "higher, and sooner (figure 1)",
}
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
        images, parts = examples(data.selected(self.options), standardize=True), {}
        trainers = {name: Trainer(vgg(UNITS[norm], WIDTHS), images) for name, norm in NORMS.items()}
        made = {name: instruments(trainer.network) for name, trainer in trainers.items()}
        for rate in self.options.learning_rates:
            for name, trainer in trainers.items():
                work = partial(self._run, trainer, made[name], rate)
                parts[f"{name}, rate {rate:g}"] = self.each_seed(work)
        return parts

    def _run(
        self, trainer: Trainer, made: tuple[Callable, ...], rate: float, seed: int, advance: Advance
    ) -> dict[str, Any]:
        options, found = self.options, {}
        walk, sharpness = made
        evaluations = -(-options.steps // options.eval_every)
        checkpoints = np.linspace(0, evaluations - 1, options.checkpoints).astype(int)

        def see(step: int, state: State, rows: Array) -> nj.diagnostics.Landscape:
            if (step - 1) // options.eval_every in checkpoints:
                found[step] = jax.device_get(sharpness(state, trainer.train, rows))
            return walk(state, trainer.train, rows)

        run, history = trainer.look(Plan.of(options, seed, rate), advance, see)
        run["landscape"] = {name: listed(value) for name, value in history._asdict().items()}
        run["checkpoints"] = list(found)
        run["eigenvalues"] = listed(np.asarray([each.value for each in found.values()]))
        run["converged"] = [bool(each.converged) for each in found.values()]
        return run

    def at(self, rate: float) -> dict[str, Runs]:
        """Returns the finished runs at a learning rate, by network."""
        named = {name: self.results.get(f"{name}, rate {rate:g}") for name in NORMS}
        return {name: runs for name, runs in named.items() if runs}

    def tables(self) -> list[Table]:
        rows = []
        for name, runs in self.results.items():
            measured = [shown(typical(runs, of)) for of in MEASURES.values()]
            sharpness = " ".join(map(shown, eigenvalues(runs)))
            rows.append((name, *measured, sharpness, f"{accuracy(runs):.1%}"))
        title = "Along the gradient (medians over the steps), in the sharpest direction, and in the"
        headings = ("", *MEASURES, "largest eigenvalue, first to last", "test accuracy")
        return [table(headings, rows, title=f"{title} end")]

    def claims(self) -> list[Claim]:
        def sharpest(runs: Runs) -> float:
            return float(np.median(finite(eigenvalues(runs))))

        def instead(plain: float, normalized: float) -> str:
            return f"{normalized:.1%} instead of {plain:.1%}"

        measures = [partial(typical, of=of) for of in MEASURES.values()]
        measured = [self._compared(of) for of in (*measures, sharpest)]
        measured.append(self._compared(accuracy, instead))
        return [
            Claim(f"{what}, with batch norm", reported, each)
            for (what, reported), each in zip(REPORTED.items(), measured, strict=True)
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


def instruments(network: Network) -> tuple[Callable, Callable]:
    """Returns compiled functions for the landscape and the sharpest direction, on one batch."""

    def on_batch(state: State, train: Examples, rows: Array) -> Callable[[Any], Array]:
        return lambda params: batch_loss(network, train, params, state.batch_stats, rows)[0]

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
    fields = nj.diagnostics.Landscape._fields
    medians = (np.median([run["landscape"][field] for run in runs], 0) for field in fields)
    return nj.diagnostics.Landscape(*map(jnp.asarray, medians))


def eigenvalues(runs: Runs) -> np.ndarray:
    """Returns the largest eigenvalue at each checkpoint, the median over the seeds."""
    return np.median([run["eigenvalues"] for run in runs], 0)


def listed(values: np.ndarray) -> list:
    """Returns an array for JSON: NaN, which becomes null, where training diverged."""
    return np.where(np.isfinite(values), values, np.nan).tolist()


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
