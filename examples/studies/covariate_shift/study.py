"""The distributions of layers' inputs over training."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import data, report, results
from common.study import Advance, Claim, Part, Study
from common.training import Examples, Plan, State, Trainer, batch_loss, examples
from jax import Array
from studies.covariate_shift.noise import LAYERS, Sigmoids

import normjax as nj

VARIANTS = {
    "no normalization": Sigmoids(normalize=False),
    "batch norm": Sigmoids(normalize=True),
    "noisy batch norm": Sigmoids(normalize=True, noise=True),
}
LAST = LAYERS[-2]  # the last hidden layer, whose sigmoids the paper's figure shows
PROBE = 500  # training images whose distribution is followed
Runs = list[dict[str, Any]]
# Drawn over the steps: what it is multiplied by, and its panel.
CURVES: dict[str, tuple[float, dict[str, str]]] = {
    "accuracy": (100, {"title": "test accuracy (%)"}),
    "distance": (1, {"title": "covariate shift: ||G - G'|| / ||G||", "yscale": "log"}),
    "cosine": (1, {"title": "cosine of G and G'"}),
}
COLORS = dict(zip(VARIANTS, ("#1f77b4", "#ff7f0e", "#2ca02c"), strict=True))


def instrument(network: Sigmoids, learning_rate: float) -> Callable[..., tuple[Any, Any]]:
    """Returns compiled measurements of a network between two training steps.

    `look(state, train, rows)` returns percentiles of the last hidden layer's inputs, and the
    covariate shift of a step of SGD on the rows.
    """

    @jax.jit
    def look(state: State, train: Examples, rows: Array) -> tuple[Any, Any]:
        probe, _ = train.pick(slice(PROBE))
        _, _, inputs = network.forward(state.params, state.batch_stats, probe, True)

        def loss(params: Any) -> Array:
            return batch_loss(network.network, train, params, state.batch_stats, rows)[0]

        gradients = jax.grad(loss)(state.params)
        updated = jax.tree.map(lambda w, g: w - learning_rate * g, state.params, gradients)
        shift = nj.diagnostics.internal_covariate_shift(loss, state.params, updated, layers=LAYERS)
        return nj.diagnostics.percentiles(inputs[LAST], feature_axes=-1), shift

    return look


class Shift(Study):
    """The three networks, over several seeds."""

    name = "covariate_shift"
    source = "Ioffe & Szegedy (2015) and Santurkar et al. (2018)"
    caption = (
        "What to see: below, the 15th, 50th and 85th percentile of the input of a typical sigmoid"
        " in the last hidden layer. Without normalization it wanders far, as in the 2015 paper's"
        " figure 1; with batch norm it is quiet; with noise after it, it jumps at every step, and"
        " yet (above, left) trains as well as without the noise. Above, right: the last hidden"
        " layer's gradient, G, and the same gradient after an update of the layers before it, G'."
    )

    def parts(self) -> Mapping[str, Part]:
        images = examples(data.selected(self.options), standardize=False)
        parts = {}
        for name, network in VARIANTS.items():
            look = instrument(network, self.options.learning_rate)
            work = partial(self._run, Trainer(network.network, images), look)
            parts[name] = self.each_seed(work)
        return parts

    def _run(
        self, trainer: Trainer, look: Callable[..., Any], seed: int, advance: Advance
    ) -> dict[str, Any]:
        def see(step: int, state: State, rows: Array) -> Any:
            return look(state, trainer.train, rows)

        plan = Plan.of(self.options, seed, self.options.learning_rate)
        run, (history, shift) = trainer.look(plan, advance, see)
        return run | summary(history.values, shift)

    def claims(self) -> list[Claim]:
        def measured(show: Callable[[Runs], str]) -> str:
            return "; ".join(f"{name}: {show(runs)}" for name, runs in self.results.items())

        def middle(key: str, form: str) -> str:
            return measured(lambda runs: format(median(run[key] for run in runs), form))

        return [
            Claim("best test accuracy", "higher with batch norm, sooner; as good with noise",
                  measured(lambda runs: f"{median(max(run['accuracy']) for run in runs):.1%}")),
            Claim("steps to 90%", "fewer with batch norm",
                  measured(lambda runs: steps_to(0.9, runs))),
            Claim("how far the median of a unit's input wanders, in widths of its band",
                  "more stable with batch norm (2015)", middle("wander", ".2f")),
            Claim("how far it jumps from one evaluation to the next",
                  "with noise, further than without any normalization (2018)",
                  middle("jump", ".3f")),
            Claim("change of the gradient, relative to it (median over the steps)",
                  "as large with batch norm, or larger (2018)", middle("relative_distance", ".3f")),
            Claim("cosine of the two gradients",
                  "no closer to 1 with batch norm (2018)", middle("typical_cosine", ".3f")),
        ]  # fmt: skip

    def draw(self, path: Path) -> None:
        shown = data.TITLES[self.options.data]
        title = f"{shown}: three layers of 100 sigmoids, and the distributions of their inputs"
        with report.figure(path, title, self.caption, (2, 3), (12, 7.4)) as grid:
            for panel, (key, (scale, settings)) in zip(grid[0], CURVES.items(), strict=True):
                for name, runs in self.results.items():
                    values = scale * np.asarray(self.curve(name, key))
                    panel.plot(runs[0]["steps"], values, color=COLORS[name], label=name)
                panel.set(**settings)
            grid[0, 0].legend(fontsize="small")
            for panel, name in zip(grid[1], VARIANTS, strict=True):
                self._draw_band(panel, name)
            limits = [limit for panel in grid[1] if panel.lines for limit in panel.get_ylim()]
            for panel in grid[1]:
                panel.set_ylim(min(limits), max(limits))
            for panel in grid.flat:
                panel.set_xlabel("training steps", fontsize="small")
                panel.grid(alpha=0.3)

    def _draw_band(self, panel: Any, name: str) -> None:
        if name in self.results:
            run = self.results[name][0]
            band = jnp.asarray(run["band"])
            q = jnp.tile(jnp.asarray([15.0, 50.0, 85.0]), (len(band), 1))
            panel.set_prop_cycle(color=[COLORS[name]])
            found = nj.diagnostics.Percentiles(q, band)
            nj.diagnostics.plot.percentiles(found, run["steps"], axes=panel)
        panel.set_title(f"{name}: input of a typical sigmoid", fontsize="medium")


def summary(values: np.ndarray, shift: nj.diagnostics.CovariateShift) -> dict[str, Any]:
    """Summarizes one run: percentiles `(steps, q, units)`, covariate shifts `(steps, layers)`.

    `wander` is how far the median of a unit's input moves over all steps, `jump` how far it moves
    between two evaluations, both in widths of the band from the 15th to the 85th percentile, and
    for the median unit.
    """
    middle, width = values[:, 1], (values[:, 2] - values[:, 0]).mean(0)
    wander = np.ptp(middle, axis=0) / width
    jump = (
        np.abs(np.diff(middle, axis=0)).mean(0) / width if len(middle) > 1 else np.zeros_like(width)
    )
    typical = np.argsort(wander)[(len(wander) - 1) // 2]
    layer = LAYERS.index(LAST)
    distance = shift.distance[:, layer] / np.maximum(shift.gradient_norm[:, layer], 1e-30)
    return {
        "band": values[:, :, typical].tolist(),
        "wander": float(np.median(wander)),
        "jump": float(np.median(jump)),
        "distance": distance.tolist(),
        "cosine": shift.cosine[:, layer].tolist(),
        "relative_distance": float(np.median(distance)),
        "typical_cosine": float(np.median(shift.cosine[:, layer])),
    }


def steps_to(accuracy: float, runs: Runs) -> str:
    """Returns the median number of steps after which runs reach an accuracy, in words."""
    return results.in_words(
        median(results.steps_to(accuracy, run["steps"], run["accuracy"]) for run in runs)
    )
