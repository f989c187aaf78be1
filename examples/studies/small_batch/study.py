"""Trains a VGG on simulated devices with few examples each."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import optax
from common import data, report, training
from common.networks import BATCH_NORM_MOMENTUM, UNITS, Network, Tree, Unit, batch, renorm, vgg
from common.study import Advance, Claim, Part, Study, table
from jax import Array
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from rich.table import Table

import normjax as nj

DEVICES = 8
AXIS = "devices"
REFERENCE = 32  # images a device, to which the learning rate belongs
GHOST = 16  # examples that share statistics, whatever the batch: all there are at 2 a device
MOMENTUM = 0.9  # of SGD
# of each run; the error is the median of the last three (the paper: of the last five epochs)
EVALUATIONS = 10
# Maps that end at 1x1 pixel (digits 4x4, 2x2, 1x1): in the last layer a channel has as many values
# as there are images.
WIDTHS = {"digits": (16, 32, 64), "mnist": (16, 32, 64, 64), "cifar10": (16, 32, 64, 64, 64)}
# Wu & He 2018, table 2: top-1 validation error of ResNet-50 on ImageNet, by images per GPU.
REPORTED: dict[str, dict[float, float]] = {
    "batch": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
    "group": {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1},
}
DASHED = {"sync": "--", "ghost": ":"}  # where several lie on each other


class Method(NamedTuple):
    """A normalization, which uses a device's own examples or, as under `jit`, the whole batch."""

    unit: Unit
    on_devices: bool = True


def limits(steps: int) -> dict[str, optax.Schedule]:
    """Returns batch renorm's limits, which rise as in Ioffe (2017), over `steps`, not 40,000."""
    begin = steps // 8  # the paper: 5,000 steps as batch norm
    r_max = optax.linear_schedule(1.0, 3.0, steps - begin, begin)
    # the paper: by step 25,000
    d_max = optax.linear_schedule(0.0, 5.0, steps * 5 // 8 - begin, begin)
    return {"r_max": r_max, "d_max": d_max}


def methods(steps: int) -> dict[str, Method]:
    """Returns the methods by name."""
    # One value a channel and example, as in maps of one pixel, wants a learned epsilon (Singh &
    # Krishnan 2020).
    response = UNITS["filter response"]._replace(
        make=lambda kernel: nj.filter_response_norm_init(kernel.shape[-1], learn_epsilon=True)
    )
    return {
        "batch": Method(batch()),
        "ghost": Method(batch(virtual_batch_size=GHOST), on_devices=False),
        "renorm": Method(renorm(**limits(steps))),
        "sync": Method(batch(axis_name=AXIS)),
        "group": Method(UNITS["group"]),
        "layer": Method(UNITS["layer"]),
        "filter response": Method(response),
    }


def on_devices(network: Network) -> Network:
    """Returns the network that trains on `DEVICES` equal parts of the batch, one on each device.

    Each device has its own statistics, unless the network shares them over `AXIS`. The running ones
    are merged after each step, as if one device had had all examples.
    """

    def apply(params: Tree, batch_stats: Tree, images: Array, train: bool) -> tuple[Array, Tree]:
        if not train:
            return network.apply(params, batch_stats, images, train)

        def device(images: Array) -> tuple[Array, Tree]:
            logits, own = network.apply(params, batch_stats, images, train)
            return logits, nj.sync_batch_stats(own, AXIS, momentum=BATCH_NORM_MOMENTUM)

        parts = images.reshape(DEVICES, -1, *images.shape[1:])
        logits, merged = jax.vmap(device, axis_name=AXIS, out_axes=(0, None))(parts)
        return logits.reshape(len(images), -1), merged

    return Network(network.init, apply)


class SmallBatch(Study):
    """Test errors by normalization and images a device."""

    name, source = "small_batch", "Wu & He (2018), ResNet-50 on ImageNet"
    caption = (
        "What to see: with few images on a device, batch norm with statistics of each device"
        " (batch) fails, as in the paper; renorm fails less. Statistics over more examples (ghost,"
        " sync) or over none (group, layer, filter response) do not fail. Rates are linear in the"
        " batch size, and all points have had the same number of examples."
    )

    def parts(self) -> Mapping[str, Part]:
        options = self.options
        images = data.selected(options)
        if (largest := DEVICES * max(options.sizes)) > len(images.train_labels):
            needed = f"{largest} examples on {DEVICES} devices"
            there = f"and there are {len(images.train_labels)}"
            raise data.DataError(f"--sizes {max(options.sizes)}: {needed}, {there}")
        examples, parts = training.examples(images, standardize=True), {}
        known, widths = methods(options.steps), [(width,) for width in WIDTHS[options.data]]
        for name in options.norms:
            network = vgg(known[name].unit, widths, stride=2)
            network = on_devices(network) if known[name].on_devices else network
            trainer = training.Trainer(network, examples, partial(optax.sgd, momentum=MOMENTUM))
            for size in options.sizes:
                work, steps = partial(self.train, trainer, size), self.steps(size)
                parts[f"{name}, {size}"] = Part(options.seeds * steps, work)
        return parts

    def steps(self, size: int) -> int:
        """Returns the steps with as many examples as `options.steps` of the largest size."""
        return self.options.steps * max(self.options.sizes) // size

    def train(
        self, trainer: training.Trainer, size: int, advance: Advance
    ) -> dict[str, list[float]]:
        """Returns the test error of each seed, in percent."""
        steps, rate = self.steps(size), self.options.learning_rate * size / REFERENCE
        every, errors = max(1, steps // EVALUATIONS), []
        for seed in range(self.options.seeds):
            plan = training.Plan(seed, rate, steps, every, DEVICES * size)
            run, _ = trainer.finish(plan, advance, remark=lambda right: f"{1 - right:.1%} error")
            errors.append(100 * (1 - median(run.accuracies[-3:])))
        return {"errors": errors}

    def by_size(self, name: str) -> dict[float, float]:
        """The errors in percent, medians of the seeds, by batch size, as far as finished."""
        return self.along(name, sorted(self.options.sizes, reverse=True), "errors")

    def claims(self) -> Sequence[Claim]:
        claims = []
        for name, reported in REPORTED.items():
            measured = self.by_size(name)
            for size in [size for size in measured if size in reported]:
                what = f"{name} norm, {size} images a device"
                claims.append(Claim(what, f"{reported[size]:.1f}%", f"{measured[size]:.1f}%"))
            if {2, 32} <= measured.keys():
                rises = (f"{errors[2] - errors[32]:+.1f} points" for errors in (reported, measured))
                claims.append(Claim(f"{name} norm, from 32 to 2", *rises))
        return claims

    def tables(self) -> Sequence[Table]:
        sizes, rows = sorted(self.options.sizes, reverse=True), []
        for name in self.options.norms:
            errors = self.by_size(name)
            shown = (f"{errors[size]:.1f}" if size in errors else "-" for size in sizes)
            rows.append((name, *shown))
        seeds = f"median of {self.options.seeds} seed(s)"
        title = f"Test error (%) by images a device, {DEVICES} devices, {seeds}"
        return [table(("normalization", *map(str, sizes)), rows, title=title)]

    def draw(self, path: Path) -> None:
        title = f"{data.TITLES[self.options.data]}: images a device, and what they cost"
        with report.figure(path, title, self.caption, size=(10, 5)) as ((measured, reported),):
            for i, name in enumerate(self.options.norms):
                style = {"color": f"C{i}", "label": name, "marker": "o"}
                errors, line = self.by_size(name), DASHED.get(name, "-")
                measured.plot(list(errors), list(errors.values()), line, **style)
                if name in REPORTED:
                    errors = REPORTED[name]
                    reported.plot(list(errors), list(errors.values()), **style)
            _dress(measured, f"measured: VGG, {DEVICES} devices", self.options.sizes)
            measured.set_ylim(bottom=0)
            _dress(reported, "reported: ResNet-50, ImageNet, 8 GPUs", list(REPORTED["batch"]))


def _dress(axes: Axes, title: str, sizes: Sequence[float]) -> None:
    report.dress(axes, xscale="log", xlabel="images a device", ylabel="error", title=title)
    axes.set_xticks(list(sizes), map(str, sizes))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.invert_xaxis()
