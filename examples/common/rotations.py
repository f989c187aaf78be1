"""Trains networks by SGD, their kernels at a learning rate and weight decay of their own, and measures how these turn.

All that is not a kernel before normalization (scales, biases, the last layer) is trained at one rate without decay, so
that runs differ in what the rate and the decay do to kernels of which only the direction counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import normjax as nj
from common.data import CLASSES
from common.networks import Network, Tree
from common.training import Examples

Histories = dict[str, nj.diagnostics.Rotation]


class Setting(NamedTuple):
    """What kernels before normalization are trained with.

    Attributes:
      rate: learning rate.
      decay: weight decay.
      scale: of the kernels at the start, relative to the network's own initialization.
    """

    rate: float
    decay: float
    scale: float = 1.0


class Recorded(NamedTuple):
    """A run: the loss of each step, how it turned each kernel, and test accuracies after every `eval_every` steps."""

    losses: np.ndarray
    history: Histories
    accuracies: list[float]


class _State(NamedTuple):
    params: Any
    batch_stats: Any


def hidden_kernels(params: Tree) -> Tree:
    """Returns a mask of the kernels that the normalizations of a network stand behind, or would stand behind."""
    return {name: jax.tree.map(lambda kind, name=name: kind == "kernel" and name != "logits", kinds)
            for name, kinds in nj.optim.kind_of(params).items()}  # fmt: skip


class Trainer:
    """A network with its training and evaluation, compiled once for all settings.

    Args:
      network: what to train.
      data: training and test examples.
      batch_size: examples a step.
      rate: of all parameters but hidden kernels.
    """

    def __init__(self, network: Network, data: tuple[Examples, Examples], batch_size: int, rate: float):
        self.network, self.batch_size, self.rate = network, batch_size, rate
        self.train, self.test = data
        self._advance = jax.jit(self._steps)
        self._evaluate = jax.jit(self._accuracy)

    def init(self, scale: float = 1.0) -> _State:
        """Returns where training starts from: the same directions for all scales."""
        params, batch_stats = self.network.init(jax.random.key(0), self.train.images.shape[1:], CLASSES)
        chosen = hidden_kernels(params)
        return _State(jax.tree.map(lambda w, mine: scale * w if mine else w, params, chosen), batch_stats)

    def invariance(self, examples: int = 64) -> dict[str, nj.diagnostics.ScaleInvariance]:
        """Returns how invariant the network's outputs are to the scale of each hidden kernel."""
        state, (images, _) = self.init(), self.train.pick(jnp.arange(min(examples, len(self.train.labels))))

        def outputs(params: Tree) -> Array:
            return self.network.apply(params, state.batch_stats, images, True)[0]

        found = nj.diagnostics.scale_invariance(state.params, outputs)
        return {path: numbers for path, numbers in found.items() if path in self.paths}

    @property
    def paths(self) -> list[str]:
        """The hidden kernels."""
        leaves = jax.tree_util.tree_leaves_with_path(hidden_kernels(self.init().params))
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path, chosen in leaves if chosen]

    def run(self, setting: Setting, steps: int, eval_every: int, evaluated: Callable[[int, float], None]) -> Recorded:
        """Trains and calls `evaluated` with the steps and the accuracy after every `eval_every`."""
        state, losses, histories, accuracies = self.init(setting.scale), [], [], []
        rate, decay = jnp.float32(setting.rate), jnp.float32(setting.decay)
        for rows in self._batches(steps, eval_every):
            state, (loss, history) = self._advance(state, rows, rate, decay)
            losses.append(loss)
            histories.append(history)
            accuracies.append(float(self._evaluate(state, self.test)))
            evaluated(len(rows), accuracies[-1])
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *histories)
        return Recorded(np.concatenate(losses), whole, accuracies)

    def _batches(self, steps: int, eval_every: int) -> Iterator[np.ndarray]:
        """Yields rows `(steps, batch)`, the same for all runs."""
        rng = np.random.default_rng(0)
        for done in range(0, steps, eval_every):
            size = min(eval_every, steps - done), self.batch_size
            yield rng.integers(len(self.train.labels), size=size, dtype=np.int32)

    def _steps(self, state: _State, rows: Array, rate: Array, decay: Array) -> tuple[_State, tuple[Array, Histories]]:
        chosen = hidden_kernels(state.params)
        kernels = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
        optimizer = optax.partition({True: kernels, False: optax.sgd(self.rate)}, chosen)

        def loss(params: Any, batch_stats: Any, rows: Array) -> tuple[Array, Any]:
            images, labels = self.train.pick(rows)
            logits, batch_stats = self.network.apply(params, batch_stats, images, True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), batch_stats

        def step(state: _State, rows: Array) -> tuple[_State, tuple[Array, Histories]]:
            (value, batch_stats), gradients = jax.value_and_grad(loss, has_aux=True)(*state, rows)
            updates, _ = optimizer.update(gradients, optimizer.init(state.params), state.params)  # SGD keeps no state
            updated = optax.apply_updates(state.params, updates)
            turned = nj.diagnostics.rotation(state.params, gradients, updated, learning_rate=rate, mask=chosen)
            return _State(updated, batch_stats), (value, turned)

        return lax.scan(step, state, rows)

    def _accuracy(self, state: _State, test: Examples) -> Array:
        images, labels = test.pick(jnp.arange(len(test.labels)))
        logits, _ = self.network.apply(state.params, state.batch_stats, images, False)
        return (logits.argmax(-1) == labels).mean()
