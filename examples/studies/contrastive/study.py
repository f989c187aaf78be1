"""Trains encoders by contrast over several devices."""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, report
from common.networks import BATCH_NORM_MOMENTUM, Tree
from common.study import Advance, Claim, Part, Study, table
from common.training import State, chunks, descend, examples
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table
from studies.contrastive.encoder import AXIS, WAYS, Encoder, Way, augment, contrast, probe

import normjax as nj

WHOLE, SPLIT = PartitionSpec(), PartitionSpec(None, AXIS)
WIDTHS = {"digits": (32, 32, 64), "mnist": (32, 32, 64), "cifar10": (32, 64, 128, 256)}
LEAKAGE_EXAMPLES = 256
CHUNK = 500  # images at once when nothing is trained
COLORS = dict(zip(WAYS, ("C3", "C1", "C0", "C2"), strict=True))
# Of the table, and the curves that end there.
COLUMNS = {
    "found in training": "found in training",
    "found, keys beside": "together",
    "dealt apart": "apart",
    "leak": "leak",
    "linear probe": "probe",
}
# What is found, in which of the curves, and what is reported of it.
CLAIMS = {
    "leak: keys found on their queries' devices, less keys found on other devices": (
        "leak",
        "per-device statistics let the network find keys without better features; shuffled keys"
        " (MoCo) or shared statistics (SimCLR) do not",
    ),
    "pretext accuracy in training": (
        "found in training",
        "without shuffling it rises fast to almost all (MoCo, appendix)",
    ),
    "linear probe": ("probe", "falls with it (MoCo, appendix: of nearest neighbours)"),
}


class Trainer:
    """A way, with its training on all devices and its evaluation, compiled once for all seeds."""

    def __init__(self, way: Way, images: data.Dataset, options: Namespace):
        self.way, self.options = way, options
        self.encoder = Encoder(way.unit, WIDTHS[options.data])
        (self.train, labels), self.test = (each.pick() for each in examples(images, False))
        self.labels = labels[: options.labels]
        rate = optax.cosine_decay_schedule(options.learning_rate, options.steps)
        self.optimizer = optax.adam(rate)
        mesh = Mesh(np.array(jax.devices()[: options.devices]), (AXIS,))
        self.everywhere = NamedSharding(mesh, WHOLE)
        specs = {"in_specs": (WHOLE, WHOLE, SPLIT, WHOLE), "out_specs": (WHOLE, WHOLE)}
        self._steps = jax.jit(jax.shard_map(self._take_steps, mesh=mesh, **specs))
        self._features = jax.jit(partial(self.encoder.features, train=False))
        self._leakage = jax.jit(self.leakage)

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and evaluates before, every so many steps, and after the last."""
        state, options, rng = self.init(seed), self.options, np.random.default_rng(seed)
        count, key = len(self.train), jax.random.key(seed)
        evaluations = [self.evaluate(state, 0, 0.0)]
        for done, steps in chunks(options.steps, options.eval_every):
            # The same rows, and the same views, for each way.
            draws = (rng.choice(count, options.batch_size, replace=False) for _ in range(steps))
            rows = np.stack(list(draws)).astype(np.int32)
            state, found = self._steps(state, self.train, rows, jax.random.fold_in(key, done))
            evaluations.append(self.evaluate(state, done + steps, float(found)))
            advance(steps, f"finds {found:.0%}, probe {evaluations[-1]['probe']:.1%}")
        names = evaluations[0]
        return {"seed": seed} | {name: [each[name] for each in evaluations] for name in names}

    def init(self, seed: int) -> State:
        """Returns the state that training starts from: the same kernels for each way."""
        params, batch_stats = self.encoder.init(jax.random.key(seed), self.train.shape[-1])
        state = State(params, batch_stats, self.optimizer.init(params))
        return jax.device_put(state, self.everywhere)

    def evaluate(self, state: State, step: int, found: float) -> dict[str, float]:
        """Returns what the curves show after a step."""
        state = jax.device_put(state, jax.devices()[0])
        leakage = self._leakage(state, self.test[0])._asdict()
        values = {"step": step, "found in training": found, "probe": self.probe(state)}
        return values | {name: float(value) for name, value in leakage.items()}

    def _take_steps(
        self, state: State, images: Array, rows: Array, key: Array
    ) -> tuple[State, Array]:
        """A device's share of a step for each row of `rows`; it holds its columns."""
        # JAX sums the devices' gradients, as it types params as the same on all of them.
        inputs = rows, jax.random.split(key, len(rows))
        state, found = descend(self._loss, self.optimizer, state, inputs, images)
        return state, lax.pmean(found.mean(), AXIS)

    def _loss(
        self, params: Tree, batch_stats: Tree, rows: Array, key: Array, images: Array
    ) -> tuple[Array, tuple[Tree, Array]]:
        """Returns a device's share of the loss: its queries against the keys of all devices."""
        images = images[rows]
        device, devices = lax.axis_index(AXIS), self.options.devices
        own = device * len(images) + jnp.arange(len(images))
        order = jnp.arange(len(images) * devices)
        view, other = jax.random.split(jax.random.fold_in(key, device))
        first, second = augment(view, images), augment(other, images)
        if self.way.shuffled:
            order = jax.random.permutation(key, len(order))
            second = _gathered(second)[order[own]]
        queries, keys, batch_stats = self._embed(params, batch_stats, first, second)
        if self.way.own_statistics:  # of the two passes, as one of this momentum
            batch_stats = nj.sync_batch_stats(batch_stats, AXIS, momentum=BATCH_NORM_MOMENTUM**2)
        loss, found = contrast(_gathered(queries), _gathered(keys)[jnp.argsort(order)], own)
        return loss / devices, (batch_stats, found)

    def _embed(
        self, params: Tree, batch_stats: Tree, first: Array, second: Array
    ) -> tuple[Array, Array, Tree]:
        queries, batch_stats = self.encoder.embed(params, batch_stats, first, True)
        keys, batch_stats = self.encoder.embed(params, batch_stats, second, True)
        return queries, keys, batch_stats

    def leakage(self, state: State, images: Array) -> nj.diagnostics.Leakage:
        """Returns how much statistics leak, with as many examples on a device as in training."""
        of_device = self.options.batch_size // self.options.devices
        devices = min(LEAKAGE_EXAMPLES, len(images)) // of_device
        first, second = (
            augment(jax.random.key(view), images[: devices * of_device]) for view in range(2)
        )

        def embed(*views: Array) -> tuple[Array, Array]:
            return self._embed(state.params, state.batch_stats, *views)[:2]

        settings = {"key": jax.random.key(0), "shuffles": 2, "axis_name": AXIS}
        return nj.diagnostics.leakage(embed, first, second, devices=devices, **settings)

    def probe(self, state: State) -> float:
        """Returns the test accuracy of a linear classifier on the features, from all labels."""

        def features(images: Array) -> Array:
            parts = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
            variables = state.params, state.batch_stats
            return jnp.concatenate([self._features(*variables, part)[0] for part in parts])

        return self.probe_of(features)

    def probe_of(self, features: Callable[[Array], Array]) -> float:
        """Returns the same of given features."""
        images, labels = self.test
        train = features(self.train[: len(self.labels)]), self.labels
        return float(probe(train, (features(images), labels), data.CLASSES))


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
        options = self.options
        simulate(options.devices)
        images = data.selected(options)
        # test images are also split over devices
        count = min(len(images.train_labels), len(images.test_labels))
        if options.batch_size % options.devices or options.batch_size > count:
            expected = f"a multiple of {options.devices} devices, and no more than the {count}"
            raise data.DataError(f"--batch-size {options.batch_size}: expected {expected} examples")
        trainers = {name: Trainer(way, images, options) for name, way in WAYS.items()}
        first = next(iter(trainers.values()))
        self.pixels = first.probe_of(lambda images: images.reshape(len(images), -1))
        return {name: self.each_seed(trainer.run) for name, trainer in trainers.items()}

    def content(self) -> dict[str, Any]:
        return super().content() | {"probe_of_pixels": self.pixels}

    def tables(self) -> list[Table]:
        rows = []
        for name in self.results:
            rows.append((name, *(f"{self.curve(name, of)[-1]:.1%}" for of in COLUMNS.values())))
        title = f"After {self.options.steps} steps, median of {self.options.seeds} seed(s)"
        made = table(("statistics", *COLUMNS), rows, title=title)
        untrained = self.curve(next(iter(self.results)), "probe")[0]
        pixels = f"Linear probe of the pixels {self.pixels:.1%}"
        made.caption = f"{pixels}, of untrained features {untrained:.1%}"
        return [made]

    def claims(self) -> list[Claim]:
        claims = []
        for what, (of, reported) in CLAIMS.items():
            measured = (f"{name} {self.curve(name, of)[-1]:.1%}" for name in self.results)
            claims.append(Claim(what, reported, ", ".join(measured)))
        return claims

    def draw(self, path: Path) -> None:
        options = self.options
        each = f"{options.devices} devices of {options.batch_size // options.devices} images each"
        title = f"{data.TITLES[options.data]}: contrast over {each}"
        with report.figure(path, title, self.caption, size=(9.5, 4.8)) as ((found, accuracy),):
            for name in self.results:
                steps, style = self.curve(name, "step"), {"color": COLORS[name]}
                found.plot(steps, self._percent(name, "together"), "-", **style)
                found.plot(steps, self._percent(name, "apart"), "--", **style)
                accuracy.plot(steps, self._percent(name, "probe"), "-", label=name, **style)
            found.plot([], [], "k-", label="beside their queries")
            found.plot([], [], "k--", label="dealt to other devices")
            style = {"color": "gray", "linewidth": 1, "linestyle": ":"}
            accuracy.axhline(100 * self.pixels, label="pixels", **style)
            report.dress(found, None, title="Keys found", xlabel="training steps", ylim=(0, None))
            found.set_ylabel("queries whose key is the nearest (%)")
            found.legend(title="keys", fontsize="small", loc=(0.5, 0.27))
            title = f"Linear probe, {options.labels:,} labels"
            report.dress(accuracy, None, title=title, xlabel="training steps")
            accuracy.set_ylabel("test accuracy (%)")
            accuracy.legend(title="statistics", fontsize="small")

    def _percent(self, name: str, of: str) -> list[float]:
        return [100 * value for value in self.curve(name, of)]


def simulate(devices: int) -> None:
    """Asks for that many CPU devices if JAX has not started yet; raises an error for fewer."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) < devices:
        raise data.DataError(f"--devices {devices}: there are {len(jax.devices())}")
