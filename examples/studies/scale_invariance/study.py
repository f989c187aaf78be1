"""The study of `scale_invariance.py`: kernels that grow without weight decay, not with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import data
from common.networks import UNITS, batch, vgg
from common.study import Advance, Claim, Part, Study, table
from common.training import Plan, examples
from rich.table import Table
from studies.scale_invariance import plot
from studies.scale_invariance.rotations import Recorded, Setting, Turning

import normjax as nj

Run = dict[str, Any]
More = Callable[[Setting, Recorded], Run]  # what a part has beside the curves

NORMALIZED = ("batch", "layer", "weight norm")
KINDS = (*NORMALIZED, "none")
WIDTHS = {
    "digits": ((8,), (16,), (32,)),
    "mnist": ((8,), (16,), (32,)),
    "cifar10": ((16, 16), (32, 32), (64,)),
}
# Times --learning-rate, without decay: a rate at which kernels grow before there is nothing to
# learn.
GROWTH = {"digits": 30, "mnist": 30, "cifar10": 10}
PRODUCTS = (0.002, 0.004, 0.008)  # of learning rate and weight decay
FACTORS = (1 / 4, 1, 4)  # times --learning-rate, for batch norm and the first of the products
SCALES = (1 / 4, 1, 4)  # c: powers of two, by which floats are scaled without rounding
TINY = 1e-30  # an epsilon that changes no variance


class Scaling(Study):
    """Runs without decay (`growth`), from scaled kernels (`scaled`), with decay (`rotation`)."""

    name = "scale_invariance"
    source = "van Laarhoven (2017), Li & Arora (2020), Kosson et al. (2024)"
    caption = (
        "What to see. Above: without decay, normalized kernels grow as predicted for gradients"
        " orthogonal to them (dotted), and the learning rate of their direction falls. Kernels"
        " times c, with lr c² and wd / c², train the same way, bit for bit. Below: runs with the"
        " same product lr wd reach the same angle a step, sqrt(2 lr wd) (dashed), and the same"
        " loss; so do all normalizations (on the diagonal), but not the plain network."
    )

    def parts(self) -> Mapping[str, Part]:
        options, parts = self.options, {}
        images = examples(data.selected(options), standardize=options.data == "cifar10")
        rate, widths = options.learning_rate, WIDTHS[options.data]

        def add(name: str, trainer: Turning, setting: Setting, more: More) -> None:
            parts[name] = Part(options.steps, partial(self._train, trainer, setting, more))

        exact = Turning(vgg(batch(epsilon=TINY), widths), images)
        for c in SCALES:
            add(f"scaled/{c:g}", exact, scaled(rate, c), losses)
        for kind in KINDS:
            own = Turning(vgg(UNITS[kind], widths), images)
            parts[f"test/{kind}"] = Part(1, partial(test, own))
            add(f"growth/{kind}", own, Setting(GROWTH[options.data] * rate, 0.0), growth)
            for setting in settings(rate, kind):
                name = f"rotation/{kind}/{setting.rate:g} x {setting.decay:g}"
                add(name, own, setting, rotation)
        return parts

    def _train(self, trainer: Turning, setting: Setting, more: More, advance: Advance) -> Run:
        plan = Plan.of(self.options, 0, self.options.learning_rate)
        recorded = trainer.turn(setting, plan, advance)
        made = curves(setting, recorded, plan.eval_every)
        return setting._asdict() | made | more(setting, recorded)

    def named(self, beginning: str) -> dict[str, Any]:
        """Returns the finished parts whose name begins so, by the rest of it."""
        return {
            name.removeprefix(beginning): result
            for name, result in self.results.items()
            if name.startswith(beginning)
        }

    def claims(self) -> Sequence[Claim]:
        makers = {
            "test/": _test_claims,
            "growth/": _growth_claims,
            "scaled/": _scaled_claims,
            "rotation/": _rotation_claims,
        }
        found = ((make, self.named(beginning)) for beginning, make in makers.items())
        return [claim for make, runs in found if runs for claim in make(runs)]

    def tables(self) -> Sequence[Table]:
        rows = []
        for name, found in self.named("rotation/").items():
            kernels = list(found["kernels"].values())
            numbers = found["rate"], found["decay"], kernels[0]["predicted"]
            spread = between([kernel["ratio"] for kernel in kernels], "{:.3f} - {:.3f}")
            last = f"{late(found['loss']):.3f}", f"{late(found['accuracy']):.1%}"
            shown = (f"{number:.3g}" for number in numbers)
            rows.append((name.split("/")[0], *shown, spread, *last))
        title = "Angle of a step, observed by predicted: least and most of all kernels"
        headings = "network", "lr", "wd", "predicted", "ratio", "loss", "accuracy"
        return [table(headings, rows, title=title)] if rows else []

    def draw(self, path: Path) -> None:
        title = f"{data.TITLES[self.options.data]}: kernels of which only the direction counts"
        plot.draw(path, title, self.caption, self.named)


def scaled(rate: float, c: float) -> Setting:
    """Returns the setting that takes kernels times c along the path of c = 1."""
    return Setting(rate * c**2, PRODUCTS[0] / rate / c**2, c)


def settings(rate: float, kind: str) -> Iterator[Setting]:
    """Yields pairs of rate and decay: with batch norm, several of the first product."""
    for product in PRODUCTS:
        for factor in FACTORS if kind == "batch" and product == PRODUCTS[0] else (1,):
            yield Setting(rate * factor, product / (rate * factor))


def test(trainer: Turning, advance: Advance) -> Run:
    """Returns the numbers of the test for invariance, by kernel."""
    found = {path: numbers._asdict() for path, numbers in trainer.invariance().items()}
    invariant = sum(numbers["invariant"] for numbers in found.values())
    advance(1, f"{invariant} of {len(found)} invariant")
    return found


def curves(setting: Setting, recorded: Recorded, every: int) -> Run:
    """Returns the curves, thinned or averaged over steps, with means over kernels."""
    history = recorded.history.values()
    starts = np.arange(0, len(recorded.losses), every)
    ends = np.append(starts[1:], len(recorded.losses))

    def blocks(values: Any) -> np.ndarray:
        return np.add.reduceat(np.asarray(values, np.float64), starts) / (ends - starts)

    def geometric(values: Sequence[Any]) -> list[float]:
        return np.exp(
            np.mean([np.log(each[np.append(0, ends - 1)]) for each in values], axis=0)
        ).tolist()

    return {
        "steps": ends.tolist(),
        "loss": blocks(recorded.losses).tolist(),
        "accuracy": recorded.accuracies,
        "norm": geometric([found.norm / found.norm[0] for found in history]),
        "effective_learning_rate": geometric([found.effective_learning_rate for found in history]),
        "angle": np.sqrt(np.mean([blocks(found.angle**2) for found in history], axis=0)).tolist(),
        "radial": float(max(np.abs(found.cosine / found.chance).max() for found in history)),
        "explained": geometric([explained(found, setting.rate) for found in history]),
    }


def explained(found: nj.diagnostics.Rotation, rate: float) -> np.ndarray:
    """Returns norms, relative to the first, that orthogonal gradients give without decay."""
    steps = rate**2 * np.asarray(found.gradient_norm, np.float64) ** 2
    return np.sqrt(1 + np.append(0, np.cumsum(steps[:-1])) / np.float64(found.norm[0]) ** 2)


def losses(setting: Setting, recorded: Recorded) -> Run:
    """Returns the loss of each step, to be compared bit for bit."""
    return {"losses": recorded.losses.tolist()}


def growth(setting: Setting, recorded: Recorded) -> Run:
    """Returns for each kernel how much longer it became than its orthogonal gradients explain."""
    return {
        "kernels": {
            path: {
                "grown": float(found.norm[-1] / found.norm[0]),
                "explained": float(explained(found, setting.rate)[-1]),
            }
            for path, found in recorded.history.items()
        }
    }


def rotation(setting: Setting, recorded: Recorded) -> Run:
    """Returns measured and predicted angles of each kernel over the second half of the run."""
    second = jax.tree.map(lambda field: field[len(field) // 2 :], recorded.history)
    found = nj.diagnostics.equilibrium(
        second, learning_rate=setting.rate, weight_decay=setting.decay
    )
    return {
        "kernels": {
            path: {name: float(value) for name, value in each.angle._asdict().items()}
            for path, each in found.items()
        }
    }


def late(curve: Sequence[float]) -> float:
    """The mean over the second half."""
    return float(np.mean(curve[len(curve) // 2 :]))


def between(values: Sequence[float], form: str) -> str:
    """Formats the least and the largest value; says so if a run diverged."""
    return form.format(min(values), max(values)) if np.isfinite(values).all() else "diverged"


def _test_claims(runs: Mapping[str, Run]) -> Iterator[Claim]:
    counts = []
    for kind, found in runs.items():
        invariant = sum(each["invariant"] for each in found.values())
        counts.append(f"{kind} {invariant} of {len(found)}")
    yield Claim("kernels whose scale has no effect", "all before normalization", ", ".join(counts))


def _growth_claims(runs: Mapping[str, Run]) -> Iterator[Claim]:
    def each(of: Callable[[Run], float], form: str, kinds: Sequence[str] = KINDS) -> str:
        found = {kind: of(run) for kind, run in runs.items() if kind in kinds}
        return ", ".join(f"{kind} {between([value], form)}" for kind, value in found.items())

    def falls(found: Run) -> float:
        rates = found["effective_learning_rate"]
        return rates[0] / rates[-1]

    radial = each(lambda found: found["radial"], "{:.2g}")
    excess = each(lambda found: 100 * _excess(found), "{:.2g}%")
    yield Claim("cosine of kernel and gradient, by that of chance", "0", f"at most: {radial}")
    yield Claim("norms without decay, off the sum of squared steps", "0", f"at most: {excess}")
    fall = each(falls, "{:.1f} times", NORMALIZED)
    yield Claim("effective learning rate without decay", "falls", fall)


def _excess(found: Run) -> float:
    """The largest relative difference between how kernels grew and what explains it."""
    return max(
        abs(kernel["grown"] / kernel["explained"] - 1) for kernel in found["kernels"].values()
    )


def _scaled_claims(runs: Mapping[str, Run]) -> Iterator[Claim]:
    first, *others = (np.asarray(found["losses"]) for found in runs.values())
    if others:
        apart = max(float(np.abs(other - first).max()) for other in others)
        measured = f"{apart:g} apart in {len(first):,} steps"
        yield Claim("loss with kernels times c, lr c², wd / c²", "the same", measured)


def _rotation_claims(runs: Mapping[str, Run]) -> Iterator[Claim]:
    for kind in KINDS:
        found = [run for name, run in runs.items() if name.startswith(f"{kind}/")]
        ratios = [kernel["ratio"] for run in found for kernel in run["kernels"].values()]
        if ratios:
            reported = "1" if kind in NORMALIZED else "-"
            measured = between(ratios, "{:.2f} to {:.2f}")
            yield Claim(f"angle of a step by sqrt(2 lr wd), {kind}", reported, measured)
    by_product: dict[str, list[str]] = {}
    for name, run in runs.items():
        if name.startswith("batch/"):
            losses = by_product.setdefault(f"{run['rate'] * run['decay']:.3g}", [])
            losses.append(f"{late(run['loss']):.3f}")
    shown = "; ".join(f"{product}: {' '.join(each)}" for product, each in by_product.items())
    yield Claim("loss by the product of lr and wd, batch", "one for each", shown)
