"""The study of `scale_invariance.py`: kernels that grow without weight decay, not with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import data, training
from common.networks import UNITS, Unit, batch, vgg
from common.study import Advance, Claim, Part, Study, table
from common.training import by_accuracy
from rich.table import Table
from studies.scale_invariance import plot
from studies.scale_invariance.rotations import Recorded, Setting, Turning

import normjax as nj

Run = dict[str, Any]

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
        options = self.options
        images = data.selected(options)
        examples = training.examples(images, standardize=options.data == "cifar10")
        rate, widths, parts = options.learning_rate, WIDTHS[options.data], {}

        def add(name: str, trainer: Turning, setting: Setting, more: Callable[..., Run]) -> None:
            parts[name] = Part(options.steps, partial(self._train, trainer, setting, more))

        def trainer(unit: Unit) -> Turning:
            return Turning(vgg(unit, widths), examples, options.batch_size, rate)

        exact = trainer(batch(epsilon=TINY))
        for c in SCALES:
            add(f"scaled/{c:g}", exact, scaled(rate, c), losses)
        for kind in KINDS:
            own = trainer(UNITS[kind])
            parts[f"test/{kind}"] = Part(1, partial(test, own))
            add(f"growth/{kind}", own, Setting(GROWTH[options.data] * rate, 0.0), growth)
            for setting in settings(rate, kind):
                name = f"rotation/{kind}/{setting.rate:g} x {setting.decay:g}"
                add(name, own, setting, rotation)
        return parts

    def _train(
        self,
        trainer: Turning,
        setting: Setting,
        more: Callable[[Setting, Recorded], Run],
        advance: Advance,
    ) -> Run:
        every = self.options.eval_every
        evaluated = by_accuracy(advance)
        recorded = trainer.turn(setting, self.options.steps, every, evaluated)
        return setting._asdict() | curves(setting, recorded, every) | more(setting, recorded)

    def named(self, beginning: str) -> dict[str, Any]:
        """Returns the finished parts whose name begins so, by the rest of it."""
        return {
            name.removeprefix(beginning): result
            for name, result in self.results.items()
            if name.startswith(beginning)
        }

    def claims(self) -> Sequence[Claim]:
        runs = map(self.named, ("test/", "growth/", "scaled/", "rotation/"))
        makers = (_test_claims, _growth_claims, _scaled_claims, _rotation_claims)
        return [
            claim
            for make, found in zip(makers, runs, strict=True)
            if found
            for claim in make(found)
        ]

    def tables(self) -> Sequence[Table]:
        title = "Angle of a step, observed by predicted: least and most of all kernels"
        headings = "network", "lr", "wd", "predicted", "ratio", "loss", "accuracy"
        made = table(headings, title=title)
        for name, found in self.named("rotation/").items():
            kernels = list(found["kernels"].values())
            ratios = [kernel["ratio"] for kernel in kernels]
            numbers = found["rate"], found["decay"], kernels[0]["predicted"]
            last = f"{late(found['loss']):.3f}", f"{late(found['accuracy']):.1%}"
            spread = between(ratios, "{:.3f} - {:.3f}")
            shown = (f"{number:.3g}" for number in numbers)
            made.add_row(name.split("/")[0], *shown, spread, *last)
        return [made] if made.rows else []

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
    rates = {
        kind: found["effective_learning_rate"] for kind, found in runs.items() if kind in NORMALIZED
    }
    radial = {kind: found["radial"] for kind, found in runs.items()}
    excess = {kind: 100 * _excess(found) for kind, found in runs.items()}
    falls = {kind: rate[0] / rate[-1] for kind, rate in rates.items()}
    radial, excess = _by_kind(radial, "{:.2g}"), _by_kind(excess, "{:.2g}%")
    yield Claim("cosine of kernel and gradient, by that of chance", "0", f"at most: {radial}")
    yield Claim("norms without decay, off the sum of squared steps", "0", f"at most: {excess}")
    falls = _by_kind(falls, "{:.1f} times")
    yield Claim("effective learning rate without decay", "falls", falls)


def _by_kind(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{kind} {between([value], form)}" for kind, value in values.items())


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
