"""Trains a network and records its test accuracy, every step and evaluation compiled."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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

    def pick(self, rows: Array) -> tuple[Array, Array]:
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
    train, test = (
        Examples(jnp.asarray(images), jnp.asarray(labels, jnp.int32), *pixels)
        for images, labels in (
            (data.train_images, data.train_labels),
            (data.test_images, data.test_labels),
        )
    )
    return train, test


def check_batch(batch_size: int, count: int) -> None:
    """Raises an error for a batch of more examples than there are."""
    if batch_size > count:
        raise DataError(f"--batch-size {batch_size}: there are {count} examples")


def descend(
    loss: Callable[..., tuple[Array, tuple[Any, Any]]],
    optimizer: optax.GradientTransformation,
    state: State,
    inputs: Any,
) -> tuple[State, Any]:
    """Takes one step for each of the stacked inputs; to be called inside of `jax.jit`.

    `loss(params, batch_stats, *inputs)` returns the loss, and the new statistics with anything that
    is to be recorded. Returns the last state, and what was recorded at each step.
    """

    def step(state: State, inputs: Any) -> tuple[State, Any]:
        gradients, (batch_stats, seen) = jax.grad(loss, has_aux=True)(
            state.params, state.batch_stats, *inputs
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, optimizer_state), seen

    return lax.scan(step, state, inputs)


def by_accuracy(advance: Advance) -> Callable[[int, float], None]:
    """Returns what tells a progress bar of an evaluation: the accuracy, in percent."""
    return lambda steps, accuracy: advance(steps, f"{accuracy:.1%}")


class Trainer:
    """A network with its compiled training and evaluation.

    Args:
      network: what to train.
      data: training and test examples.
      batch_size: examples a step.
      momentum: of SGD; None for plain SGD.
      optimizer: makes another optimizer from a learning rate.
    """

    def __init__(
        self,
        network: Network,
        data: tuple[Examples, Examples],
        batch_size: int,
        momentum: float | None = None,
        optimizer: Callable[[Any], optax.GradientTransformation] | None = None,
    ):
        self.network, self.batch_size = network, batch_size
        self.optimizer = optimizer or partial(optax.sgd, momentum=momentum)
        self.train, self.test = data
        self._compiled: dict[tuple[int, ...], Callable] = {}
        self._measure = jax.jit(self._accuracy)

    def init(self, seed: int) -> State:
        """Returns the state that training starts from: the same kernels for each variant."""
        params, batch_stats = self.network.init(
            jax.random.key(seed), self.train.images.shape[1:], CLASSES
        )
        return State(params, batch_stats, self.optimizer(0.0).init(params))

    def run(self, *arguments: Any, **keywords: Any) -> Run:
        """Trains as `finish` does, and returns the accuracies alone."""
        return self.finish(*arguments, **keywords)[0]

    def finish(
        self,
        seed: int,
        learning_rate: float,
        steps: int,
        eval_every: int,
        progress: Callable[[int, float], None],
        batch_size: int | None = None,
        since: tuple[Run, State] | None = None,
    ) -> tuple[Run, State]:
        """Trains for `steps` steps and evaluates after every `eval_every`, and after the last.

        Args:
          seed: of the kernels and the order of the batches; no other thing is random.
          learning_rate: of SGD, constant.
          steps: the whole budget; it is always spent.
          eval_every: how many steps are compiled into one.
          progress: called after each evaluation with the steps since the last one and the accuracy.
            What it raises ends the run, which `latest` has as far as it got.
          batch_size: examples a step; None for the trainer's.
          since: `latest` of the same run, to go on from.

        Returns:
          The accuracies, and the seconds that training and evaluating took, compilation not
          included; and the state after the last step.
        """
        run, state = since or (Run(seed, [], [], 0.0), self.init(seed))
        sizes = {min(steps, eval_every), steps % eval_every} - {0}
        for size in sizes:
            self._compile(state, (size, batch_size or self.batch_size))
        self.accuracy(state, self.test)
        self.latest, start = (run, state), time.perf_counter() - run.seconds
        for done, state, order in self.states(
            seed, learning_rate, steps, eval_every, batch_size, self.latest
        ):
            accuracy = self.accuracy(state, self.test)
            run = Run(
                seed, [*run.steps, done], [*run.accuracies, accuracy], time.perf_counter() - start
            )
            self.latest = run, state
            progress(len(order), accuracy)
        return self.latest

    def states(
        self,
        seed: int,
        learning_rate: float,
        steps: int,
        eval_every: int,
        batch_size: int | None = None,
        since: tuple[Run, State] | None = None,
    ) -> Iterator[tuple[int, State, np.ndarray]]:
        """Trains as `finish` does, for a look at the network on the way.

        Yields, after every `eval_every` steps and after the last, how many they were, the state,
        and the rows of the batches since the last time, `(steps, batch_size)`.
        """
        run, state = since or (Run(seed, [], [], 0.0), self.init(seed))
        finished = run.steps[-1] if run.steps else 0
        size, done = batch_size or self.batch_size, 0
        for order in batch_orders(seed, len(self.train.labels), size, steps, eval_every):
            done += len(order)
            if done > finished:
                step = self._compile(state, order.shape)
                state = step(state, self.train, order, jnp.float32(learning_rate))
                yield done, state, order

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

        def loss(params: Any, batch_stats: Any, rows: Array) -> tuple[Array, tuple[Any, None]]:
            images, labels = data.pick(rows)
            logits, batch_stats = self.network.apply(params, batch_stats, images, True)
            return cross_entropy(logits, labels).mean(), (batch_stats, None)

        return descend(loss, self.optimizer(learning_rate), state, (order,))[0]

    def _accuracy(self, params: Any, batch_stats: Any, data: Examples) -> Array:
        """Returns the accuracy with the running statistics, in batches that fit in a cache."""
        count = len(data.labels)
        size = min(count, EVALUATION_BATCH)
        rows = jnp.arange(-(-count // size) * size).reshape(-1, size)

        def correct(rows: Array) -> Array:
            images, labels = data.pick(jnp.minimum(rows, count - 1))
            logits, _ = self.network.apply(params, batch_stats, images, False)
            return jnp.sum((logits.argmax(-1) == labels) & (rows < count))

        return lax.map(correct, rows).sum() / count


def chunks(steps: int, most: int) -> Iterator[tuple[int, int]]:
    """Yields the steps so far and the steps to take next, `most` or fewer, up to `steps`."""
    return ((done, min(most, steps - done)) for done in range(0, steps, most))


def batch_orders(
    seed: int, count: int, batch_size: int, steps: int, eval_every: int
) -> Iterator[np.ndarray]:
    """Yields `(eval_every, batch_size)` rows of random epochs, the same for each variant."""
    rng = np.random.default_rng(seed)
    rows = np.empty(0, np.int32)
    for _, size in chunks(steps, eval_every):
        while len(rows) < size * batch_size:
            rows = np.concatenate([rows, rng.permutation(count).astype(np.int32)])
        used, rows = np.split(rows, [size * batch_size])
        yield used.reshape(size, batch_size)
