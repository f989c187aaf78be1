"""Trains a network and records its test accuracy, every step and evaluation compiled."""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from common.data import CLASSES, DataError, Dataset
from common.networks import Network
from common.results import Run
from common.study import Advance

EVALUATION_BATCH = 100
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class State(NamedTuple):
    """What a step of training reads and replaces."""

    params: Any
    batch_stats: Any
    optimizer: Any


class Examples(NamedTuple):
    """A data set on the device. Pixels stay uint8; a network sees `(pixel - offset) / scale`."""

    images: Array
    labels: Array
    offset: Array
    scale: Array

    def pick(self, rows: Array | slice = slice(None)) -> tuple[Array, Array]:
        """Returns the images and labels of the given rows."""
        images = (self.images[rows].astype(jnp.float32) - self.offset) / self.scale
        return images, self.labels[rows]


def examples(data: Dataset, standardize: bool) -> tuple[Examples, Examples]:
    """Returns training and test examples, standardized by channel or scaled to [0, 1]."""
    offset, scale = np.zeros(1), np.full(1, data.peak)
    if standardize:
        sample = data.train_images[:5000].astype(np.float32)
        offset, scale = sample.mean((0, 1, 2)), sample.std((0, 1, 2)) + 1e-3
    pixels = jnp.asarray(offset, jnp.float32), jnp.asarray(scale, jnp.float32)

    def on_device(images: np.ndarray, labels: np.ndarray) -> Examples:
        return Examples(jnp.asarray(images), jnp.asarray(labels, jnp.int32), *pixels)

    test = on_device(data.test_images, data.test_labels)
    return on_device(data.train_images, data.train_labels), test


def check_batch(batch_size: int, count: int) -> None:
    """Raises an error for a batch of more examples than there are."""
    if batch_size > count:
        raise DataError(f"--batch-size {batch_size}: there are {count} examples")


def descend(
    loss: Callable[..., tuple[Array, tuple[Any, Any]]],
    optimizer: optax.GradientTransformation,
    state: State,
    inputs: Any,
    *fixed: Any,
) -> tuple[State, Any]:
    """Takes one step for each of the stacked inputs; to be called inside of `jax.jit`.

    `loss(params, batch_stats, *inputs, *fixed)` returns the loss, and the new statistics with
    anything that is to be recorded. Returns the last state, and what was recorded at each step.
    """

    def step(state: State, inputs: Any) -> tuple[State, Any]:
        gradients, (batch_stats, seen) = jax.grad(loss, has_aux=True)(
            state.params, state.batch_stats, *inputs, *fixed
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, optimizer_state), seen

    return lax.scan(step, state, inputs)


class Plan(NamedTuple):
    """What a run is trained with.

    Attributes:
      seed: of the kernels and the order of the batches; no other thing is random.
      learning_rate: of the optimizer, constant.
      steps: the whole budget; it is always spent.
      eval_every: steps between two evaluations, compiled into one.
      batch_size: examples a step.
    """

    seed: int
    learning_rate: float
    steps: int
    eval_every: int
    batch_size: int

    @classmethod
    def of(cls, options: Namespace, seed: int, learning_rate: float) -> Self:
        """Returns a plan with the budget of a command line."""
        return cls(seed, learning_rate, options.steps, options.eval_every, options.batch_size)


class Trainer:
    """A network with its compiled training and evaluation.

    Args:
      network: what to train.
      data: training and test examples.
      optimizer: makes an optimizer from a learning rate.
    """

    def __init__(
        self,
        network: Network,
        data: tuple[Examples, Examples],
        optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd,
    ):
        self.network, self.optimizer = network, optimizer
        self.train, self.test = data
        self._compiled: dict[tuple[int, ...], Callable] = {}
        self._measure = jax.jit(partial(share_correct, network))

    def init(self, seed: int) -> State:
        """Returns the state that training starts from: the same kernels for each variant."""
        params, batch_stats = self.network.init(
            jax.random.key(seed), self.train.images.shape[1:], CLASSES
        )
        return State(params, batch_stats, self.optimizer(0.0).init(params))

    def finish(
        self,
        plan: Plan,
        advance: Advance,
        since: tuple[Run, State] | None = None,
        remark: Callable[[float], str] = "{:.1%}".format,
    ) -> tuple[Run, State]:
        """Trains, and evaluates after every `eval_every` steps, and after the last.

        Args:
          plan: of the run.
          advance: called after each evaluation with the steps since the last one, and a remark on
            the accuracy. What it raises ends the run, which `latest` has as far as it got.
          since: `latest` of the same run, to go on from.
          remark: makes the remark.

        Returns:
          The accuracies, and the seconds that training and evaluating took, compilation not
          included; and the state after the last step.
        """
        run, state = since or (Run(plan.seed, [], [], 0.0), self.init(plan.seed))
        for size in {min(plan.steps, plan.eval_every), plan.steps % plan.eval_every} - {0}:
            self._compile(state, (size, plan.batch_size))
        self.accuracy(state, self.test)
        self.latest, start = (run, state), time.perf_counter() - run.seconds
        for done, state, order in self.states(plan, self.latest):
            accuracy, steps = self.accuracy(state, self.test), [*run.steps, done]
            seconds = time.perf_counter() - start
            run = Run(plan.seed, steps, [*run.accuracies, accuracy], seconds)
            self.latest = run, state
            advance(len(order), remark(accuracy))
        return self.latest

    def states(
        self, plan: Plan, since: tuple[Run, State] | None = None
    ) -> Iterator[tuple[int, State, np.ndarray]]:
        """Trains as `finish` does, for a look at the network on the way.

        Yields, after every `eval_every` steps and after the last, how many they were, the state,
        and the rows of the batches since the last time, `(steps, batch_size)`.
        """
        run, state = since or (Run(plan.seed, [], [], 0.0), self.init(plan.seed))
        finished, done = run.steps[-1] if run.steps else 0, 0
        for order in batch_orders(plan, len(self.train.labels)):
            done += len(order)
            if done > finished:
                step = self._compile(state, order.shape)
                state = step(state, self.train, order, jnp.float32(plan.learning_rate))
                yield done, state, order

    def look(
        self, plan: Plan, advance: Advance, see: Callable[[int, State, Array], Any]
    ) -> tuple[dict[str, Any], Any]:
        """Trains, and looks at the network after every `eval_every` steps, and after the last.

        Returns the steps and accuracies for JSON, and what `see(step, state, rows)` returned for
        them, stacked; `rows` are the last batch.
        """
        run: dict[str, Any] = {"seed": plan.seed, "steps": [], "accuracy": []}
        seen = []
        for step, state, order in self.states(plan):
            seen.append(jax.device_get(see(step, state, order[-1])))
            run["steps"].append(step)
            run["accuracy"].append(self.accuracy(state, self.test))
            advance(len(order), f"{run['accuracy'][-1]:.1%}")
        return run, jax.tree.map(lambda *leaves: np.stack(leaves), *seen)

    def accuracy(self, state: State, data: Examples) -> float:
        """Returns the share of correct answers, with the running statistics."""
        return float(self._measure(state.params, state.batch_stats, data))

    def _compile(self, state: State, shape: tuple[int, ...]) -> Callable:
        """Returns what trains on batches of that order, compiled once."""
        if shape not in self._compiled:
            order = jnp.zeros(shape, jnp.int32)
            lowered = jax.jit(self._steps).lower(state, self.train, order, jnp.float32(0))
            self._compiled[shape] = lowered.compile()
        return self._compiled[shape]

    def _steps(self, state: State, data: Examples, order: Array, learning_rate: Array) -> State:
        """Takes one step per row of `order`, which holds the examples of its batch."""
        loss = partial(batch_loss, self.network, data)
        return descend(loss, self.optimizer(learning_rate), state, (order,))[0]


def batch_loss(
    network: Network, data: Examples, params: Any, batch_stats: Any, rows: Array
) -> tuple[Array, tuple[Any, None]]:
    """Returns the mean loss of the rows in training, and the new statistics, for `descend`."""
    images, labels = data.pick(rows)
    logits, batch_stats = network.apply(params, batch_stats, images, True)
    return cross_entropy(logits, labels).mean(), (batch_stats, None)


def share_correct(network: Network, params: Any, batch_stats: Any, data: Examples) -> Array:
    """Returns the accuracy with the running statistics, in batches that fit in a cache."""
    count = len(data.labels)
    size = min(count, EVALUATION_BATCH)
    rows = jnp.arange(-(-count // size) * size).reshape(-1, size)

    def correct(rows: Array) -> Array:
        images, labels = data.pick(jnp.minimum(rows, count - 1))
        logits, _ = network.apply(params, batch_stats, images, False)
        return jnp.sum((logits.argmax(-1) == labels) & (rows < count))

    return lax.map(correct, rows).sum() / count


def chunks(steps: int, most: int) -> Iterator[tuple[int, int]]:
    """Yields the steps so far and the steps to take next, `most` or fewer, up to `steps`."""
    return ((done, min(most, steps - done)) for done in range(0, steps, most))


def batch_orders(plan: Plan, count: int) -> Iterator[np.ndarray]:
    """Yields `(eval_every, batch_size)` rows of random epochs, the same for each variant."""
    rng = np.random.default_rng(plan.seed)
    rows = np.empty(0, np.int32)
    for _, size in chunks(plan.steps, plan.eval_every):
        while len(rows) < size * plan.batch_size:
            rows = np.concatenate([rows, rng.permutation(count).astype(np.int32)])
        used, rows = np.split(rows, [size * plan.batch_size])
        yield used.reshape(size, plan.batch_size)
