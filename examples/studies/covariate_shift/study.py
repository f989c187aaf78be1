"""The distributions of layers' inputs over training."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import data, report, results
from common.study import Advance, Claim, Part, Study
from common.training import Examples, State, Trainer, cross_entropy, examples
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
COLORS = dict(zip(VARIANTS, ("#1f77b4", "#ff7f0e", "#2ca02c"), strict=True))


class Instruments:
    """Measurements of a network between two training steps, compiled once for all seeds."""

    def __init__(self, network: Sigmoids, train: Examples, learning_rate: float):
        self.network, self.train, self.learning_rate = network, train, learning_rate
        self.look = jax.jit(self._look)

    def _look(
        self, state: State, train: Examples, rows: Array
    ) -> tuple[nj.diagnostics.Percentiles, Any]:
        """Returns percentiles of the last hidden layer's inputs, and the covariate shift."""
        probe, _ = train.pick(jnp.arange(min(PROBE, len(train.labels))))
        _, _, inputs = self.network.forward(state.params, state.batch_stats, probe, True)
        images, labels = train.pick(rows)

        def loss(params: Any) -> Array:
            logits, _, _ = self.network.forward(params, state.batch_stats, images, True)
            return cross_entropy(logits, labels).mean()

        gradients = jax.grad(loss)(state.params)
        updated = jax.tree.map(lambda w, g: w - self.learning_rate * g, state.params, gradients)
        shift = nj.diagnostics.internal_covariate_shift(loss, state.params, updated, layers=LAYERS)
        return nj.diagnostics.percentiles(inputs[LAST], feature_axes=-1), shift


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
        self.data = examples(data.selected(self.options), standardize=False)
        return {
            name: self.each_seed(partial(self._run, *self._instruments(network)))
            for name, network in VARIANTS.items()
        }

    def _instruments(self, network: Sigmoids) -> tuple[Trainer, Instruments]:
        trainer = Trainer(network.network, self.data, self.options.batch_size)
        return trainer, Instruments(network, trainer.train, self.options.learning_rate)

    def _run(
        self, trainer: Trainer, instruments: Instruments, seed: int, advance: Advance
    ) -> dict[str, Any]:
        options, seen, accuracies, steps = self.options, [], [], []
        for step, state, order in trainer.states(
            seed, options.learning_rate, options.steps, options.eval_every
        ):
            seen.append(jax.device_get(instruments.look(state, trainer.train, order[-1])))
            accuracies.append(trainer.accuracy(state, trainer.test))
            advance(len(order), f"{accuracies[-1]:.1%}")
            steps.append(step)
        history, shift = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
        run = {"seed": seed, "steps": steps, "accuracy": accuracies}
        return run | summary(history.values, shift)

    def claims(self) -> list[Claim]:
        def measured(show: Any) -> str:
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
        panels = zip(("accuracy", "distance", "cosine"), (100, 1, 1), strict=True)
        with report.figure(path, title, self.caption, (2, 3), (12, 7.4)) as grid:
            for panel, (key, scale) in zip(grid[0], panels, strict=True):
                for name, runs in self.results.items():
                    values = scale * np.median([run[key] for run in runs], axis=0)
                    panel.plot(runs[0]["steps"], values, color=COLORS[name], label=name)
            grid[0, 0].set(title="test accuracy (%)")
            grid[0, 0].legend(fontsize="small")
            grid[0, 1].set(title="covariate shift: ||G - G'|| / ||G||", yscale="log")
            grid[0, 2].set(title="cosine of G and G'")
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
            panel.set_prop_cycle(color=[COLORS[name]])
            q = jnp.tile(jnp.asarray([15.0, 50.0, 85.0]), (len(band), 1))
            nj.diagnostics.plot.percentiles(
                nj.diagnostics.Percentiles(q, band), run["steps"], axes=panel
            )
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


def steps_to(accuracy: float, runs: list[dict[str, Any]]) -> str:
    """Returns the median number of steps after which runs reach an accuracy, in words."""
    return results.in_words(
        median(results.steps_to(accuracy, run["steps"], run["accuracy"]) for run in runs)
    )
