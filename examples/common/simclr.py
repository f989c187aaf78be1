"""Trains encoders by contrast over several devices, for `contrastive.py`."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.axes import Axes
from rich.table import Table

import normjax as nj
from common import data, report
from common.contrastive import AXIS, WAYS, Encoder, Way, augment, contrast, probe
from common.interrupt import Interrupt
from common.networks import BATCH_NORM_MOMENTUM, Tree
from common.session import Advance, Part
from common.study import Claim, Study, conduct
from common.training import State

WHOLE, SPLIT = PartitionSpec(), PartitionSpec(None, AXIS)
WIDTHS = {"digits": (32, 32, 64), "mnist": (32, 32, 64), "cifar10": (32, 64, 128, 256)}
LEAKAGE_EXAMPLES = 256
CHUNK = 500  # images at once when nothing is trained
COLORS = dict(zip(WAYS, ("C3", "C1", "C0", "C2"), strict=True))


class Trainer:
    """A way, with its training on all devices and its evaluation, compiled once for all seeds."""

    def __init__(self, way: Way, images: data.Dataset, options: Namespace):
        self.way, self.options = way, options
        self.encoder = Encoder(way.unit, WIDTHS[options.data])
        self.train, self.test = (
            jnp.asarray(pixels / images.peak, jnp.float32)
            for pixels in (images.train_images, images.test_images)
        )
        self.labels = tuple(
            jnp.asarray(labels, jnp.int32) for labels in (images.train_labels, images.test_labels)
        )
        self.optimizer = optax.adam(
            optax.cosine_decay_schedule(options.learning_rate, options.steps)
        )
        mesh = Mesh(np.array(jax.devices()[: options.devices]), (AXIS,))
        self.everywhere = NamedSharding(mesh, WHOLE)
        self._steps = jax.jit(
            jax.shard_map(
                self._take_steps,
                mesh=mesh,
                in_specs=(WHOLE, WHOLE, SPLIT, WHOLE),
                out_specs=(WHOLE, WHOLE),
            )
        )
        self._features = jax.jit(
            lambda params, stats, x: self.encoder.features(params, stats, x, False)[0]
        )
        self._leakage = jax.jit(self.leakage)

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and evaluates before, every so many steps, and after the last."""
        state, done = self.init(seed), 0
        curves: dict[str, list[float]] = {}

        def evaluate(found: float) -> None:
            on_one = jax.device_put(state, jax.devices()[0])
            values = {"step": done, "found in training": found, "probe": self.probe(on_one)}
            leakage = {
                name: float(value)
                for name, value in self._leakage(on_one, self.test)._asdict().items()
            }
            for name, value in (values | leakage).items():
                curves.setdefault(name, []).append(value)

        evaluate(0.0)
        for rows, key in self._batches(seed):
            state, found = self._steps(state, self.train, rows, key)
            done += len(rows)
            evaluate(float(found))
            advance(len(rows), f"finds {found:.0%}, probe {curves['probe'][-1]:.1%}")
        return {"seed": seed} | curves

    def init(self, seed: int) -> State:
        """Returns the state that training starts from: the same kernels for each way."""
        params, batch_stats = self.encoder.init(jax.random.key(seed), self.train.shape[-1])
        return jax.device_put(
            State(params, batch_stats, self.optimizer.init(params)), self.everywhere
        )

    def _batches(self, seed: int) -> Iterator[tuple[np.ndarray, Array]]:
        """Yields rows `(steps, batch)`, the same for each way, and a key for the views."""
        rng, options = np.random.default_rng(seed), self.options
        for done in range(0, options.steps, options.eval_every):
            steps = min(options.eval_every, options.steps - done)
            rows = [
                rng.choice(len(self.train), options.batch_size, replace=False) for _ in range(steps)
            ]
            yield np.stack(rows).astype(np.int32), jax.random.fold_in(jax.random.key(seed), done)

    def _take_steps(
        self, state: State, images: Array, rows: Array, key: Array
    ) -> tuple[State, Array]:
        """A device's share of a step for each row of `rows`; it holds its columns."""

        def step(state: State, drawn: tuple[Array, Array]) -> tuple[State, Array]:
            own, key = drawn
            # JAX sums the devices' gradients, as it types params as the same on all of them.
            gradients, (batch_stats, found) = jax.grad(self._loss, has_aux=True)(
                state.params, state.batch_stats, images[own], key
            )
            updates, optimizer = self.optimizer.update(gradients, state.optimizer)
            return State(
                optax.apply_updates(state.params, updates), batch_stats, optimizer
            ), lax.pmean(found, AXIS)

        state, found = lax.scan(step, state, (rows, jax.random.split(key, len(rows))))
        return state, found.mean()

    def _loss(
        self, params: Tree, batch_stats: Tree, images: Array, key: Array
    ) -> tuple[Array, tuple[Tree, Array]]:
        """Returns a device's share of the loss: its queries against the keys of all devices."""
        device = lax.axis_index(AXIS)
        batch = len(images) * self.options.devices
        own = device * len(images) + jnp.arange(len(images))
        views = [
            augment(view, images) for view in jax.random.split(jax.random.fold_in(key, device))
        ]
        order = jax.random.permutation(key, batch) if self.way.shuffled else jnp.arange(batch)
        if self.way.shuffled:
            views[1] = _gathered(views[1])[order[own]]
        queries, keys, batch_stats = self._embed(params, batch_stats, *views)
        if self.way.own_statistics:  # of the two passes, as one of this momentum
            batch_stats = nj.sync_batch_stats(batch_stats, AXIS, momentum=BATCH_NORM_MOMENTUM**2)
        loss, found = contrast(_gathered(queries), _gathered(keys)[jnp.argsort(order)], own)
        return loss / self.options.devices, (batch_stats, found)

    def _embed(
        self, params: Tree, batch_stats: Tree, first: Array, second: Array
    ) -> tuple[Array, Array, Tree]:
        queries, batch_stats = self.encoder.embed(params, batch_stats, first, True)
        keys, batch_stats = self.encoder.embed(params, batch_stats, second, True)
        return queries, keys, batch_stats

    def leakage(self, state: State, images: Array) -> nj.diagnostics.Leakage:
        """Returns how much statistics leak, with as many examples on a device as in training."""
        of_device = self.options.batch_size // self.options.devices
        count = min(LEAKAGE_EXAMPLES, len(images)) // of_device * of_device
        queries, keys = (augment(jax.random.key(view), images[:count]) for view in range(2))
        return nj.diagnostics.leakage(
            lambda *views: self._embed(state.params, state.batch_stats, *views)[:2],
            queries,
            keys,
            devices=count // of_device,
            key=jax.random.key(0),
            shuffles=2,
            axis_name=AXIS,
        )

    def probe(self, state: State) -> float:
        """Returns the test accuracy of a linear classifier on the features, from all labels."""

        def features(images: Array) -> Array:
            chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
            return jnp.concatenate(
                [self._features(state.params, state.batch_stats, chunk) for chunk in chunks]
            )

        return self.probe_of(features(self.train[: self.options.labels]), features(self.test))

    def probe_of(self, train: Array, test: Array) -> float:
        """Returns the same of given features."""
        labels = self.labels[0][: self.options.labels]
        return float(probe((train, labels), (test, self.labels[1]), data.CLASSES))


def _gathered(rows: Array) -> Array:
    return lax.all_gather(rows, AXIS, tiled=True)


class Contrast(Study):
    """The ways of one command line, and what is finished of them."""

    name = "contrastive"
    source = "Chen et al. 2020 (SimCLR) and He et al. 2020 (MoCo)"
    caption = (
        "What to see: left, a solid line far above the dashed one of its colour: keys are found by"
        " the statistics of their devices, and no longer when they go to other devices. With synced"
        " statistics the two lines coincide. Right, the accuracy of a linear classifier on the"
        " features."
    )
    pixels = 0.0

    def parts(self) -> Mapping[str, Part]:
        """Returns a run for each way."""
        options = self.options
        simulate(options.devices)
        images = data.selected(options)
        # test images are also split over devices
        count = min(len(images.train_labels), len(images.test_labels))
        if options.batch_size % options.devices or options.batch_size > count:
            raise data.DataError(
                f"--batch-size {options.batch_size}: expected a multiple of {options.devices} "
                f"devices, and no more than the {count} examples"
            )
        return {
            name: Part(options.seeds * options.steps, partial(self._run, way, images))
            for name, way in WAYS.items()
        }

    def _run(self, way: Way, images: data.Dataset, advance: Advance) -> list[dict[str, Any]]:
        trainer = Trainer(way, images, self.options)
        rows = [pixels.reshape(len(pixels), -1) for pixels in (trainer.train, trainer.test)]
        self.pixels = trainer.probe_of(rows[0][: self.options.labels], rows[1])
        return [trainer.run(seed, advance) for seed in range(self.options.seeds)]

    def curve(self, way: str, of: str) -> list[float]:
        """Returns medians over seeds, by evaluation."""
        return [
            median(values) for values in zip(*(run[of] for run in self.results[way]), strict=True)
        ]

    def content(self, status: str) -> dict[str, Any]:
        """Returns what JSON is to hold."""
        return super().content(status) | {"probe_of_pixels": self.pixels}

    def tables(self) -> Sequence[Table]:
        """Returns what each way ended with."""
        shown = Table(
            title=f"After {self.options.steps} steps, median of {self.options.seeds} seed(s)"
        )
        shown.title_justify, shown.box, shown.pad_edge = "left", rich.box.SIMPLE_HEAD, False
        shown.add_column("statistics", no_wrap=True)
        columns = {
            "found in training": "",
            "together": "found, keys beside",
            "apart": "dealt apart",
            "leak": "leak",
        }
        for heading in ("found in training", *list(columns.values())[1:], "linear probe"):
            shown.add_column(heading, justify="right")
        for name in self.results:
            shown.add_row(name, *(f"{self.curve(name, of)[-1]:.1%}" for of in (*columns, "probe")))
        first = next(iter(self.results))
        untrained = self.curve(first, "probe")[0]
        shown.caption = (
            f"Linear probe of the pixels {self.pixels:.1%}, of untrained features {untrained:.1%}"
        )
        return [shown]

    def claims(self) -> Sequence[Claim]:
        """Returns what can be said so far."""

        def of_all(of: str) -> str:
            return ", ".join(f"{name} {self.curve(name, of)[-1]:.1%}" for name in self.results)

        return [
            Claim(
                "leak: keys found on their queries' devices, less keys found on other devices",
                "per-device statistics let the network find keys without better features; shuffled "
                "keys (MoCo) or shared statistics (SimCLR) do not",
                of_all("leak"),
            ),
            Claim(
                "pretext accuracy in training",
                "without shuffling it rises fast to almost all (MoCo, appendix)",
                of_all("found in training"),
            ),
            Claim(
                "linear probe",
                "falls with it (MoCo, appendix: of nearest neighbours)",
                of_all("probe"),
            ),
        ]

    def draw(self, path: Path) -> None:
        """Writes what is found, and what the features are worth."""
        options = self.options
        of_device = options.batch_size // options.devices
        devices = f"{options.devices} devices of {of_device} images each"
        title = f"{data.TITLES[options.data]}: contrast over {devices}"
        with report.figure(path, title, self.caption, size=(9.5, 4.8)) as grid:
            found, accuracy = grid[0]
            for name in self.results:
                steps = self.curve(name, "step")
                self._draw(found, name, steps, "together", linestyle="-")
                self._draw(found, name, steps, "apart", linestyle="--")
                self._draw(accuracy, name, steps, "probe", label=name)
            found.plot([], [], "k-", label="beside their queries")
            found.plot([], [], "k--", label="dealt to other devices")
            found.legend(title="keys", fontsize="small", loc=(0.5, 0.27))
            found.set(
                title="Keys found", ylabel="queries whose key is the nearest (%)", ylim=(0, None)
            )
            accuracy.axhline(
                100 * self.pixels, color="gray", linewidth=1, linestyle=":", label="pixels"
            )
            accuracy.set(
                title=f"Linear probe, {options.labels:,} labels", ylabel="test accuracy (%)"
            )
            for axes in grid[0]:
                axes.set(xlabel="training steps")
                axes.grid(alpha=0.3)
            accuracy.legend(title="statistics", fontsize="small")

    def _draw(self, axes: Axes, name: str, steps: Sequence[float], of: str, **style: Any) -> None:
        axes.plot(
            steps, [100 * value for value in self.curve(name, of)], color=COLORS[name], **style
        )


def simulate(devices: int) -> None:
    """Asks for that many CPU devices if JAX has not started yet; raises an error for fewer."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) < devices:
        raise data.DataError(f"--devices {devices}: there are {len(jax.devices())}")


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains each way and reports; returns the exit status."""
    return conduct(Contrast(options), interrupt)
