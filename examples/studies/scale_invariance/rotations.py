"""Trains networks by SGD with a separate rate and decay for kernels, and measures how these turn.

All other parameters (scales, biases, the last layer) are trained at one rate without decay, so that
runs only differ in the effect of rate and decay on kernels whose scale does not matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common.networks import Network, Tree
from common.training import Examples, State, Trainer, batch_orders, cross_entropy
from jax import Array, lax

import normjax as nj

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
    """A run: each step's loss and rotations, and test accuracies after every `eval_every` steps."""

    losses: np.ndarray
    history: Histories
    accuracies: list[float]


def hidden_kernels(params: Tree) -> Tree:
    """Returns a mask of the kernels before a normalization, or in its place without one."""
    kinds = nj.optim.kind_of(params)
    hidden = jax.tree.map(lambda kind: kind == "kernel", kinds)
    return hidden | {"logits": jax.tree.map(lambda kind: False, kinds["logits"])}


class Turning(Trainer):
    """A trainer of hidden kernels at any rate and decay, compiled once for all of them.

    Args:
      network: what to train.
      data: training and test examples.
      batch_size: examples a step.
      rate: of all parameters but hidden kernels, which do not decay.
    """

    def __init__(
        self, network: Network, data: tuple[Examples, Examples], batch_size: int, rate: float
    ):
        super().__init__(network, data, batch_size)
        self.rate = rate
        self._advance = jax.jit(self._turns)

    def start(self, scale: float = 1.0) -> State:
        """Returns where training starts from: the same directions for all scales."""
        state = self.init(0)
        chosen = hidden_kernels(state.params)
        params = jax.tree.map(lambda w, mine: scale * w if mine else w, state.params, chosen)
        return State(params, state.batch_stats, optimizer=())

    def invariance(self, examples: int = 64) -> dict[str, nj.diagnostics.ScaleInvariance]:
        """Returns how invariant the network's outputs are to the scale of each hidden kernel."""
        state, rows = self.start(), jnp.arange(min(examples, len(self.train.labels)))
        images, _ = self.train.pick(rows)

        def outputs(params: Any) -> Array:
            return self.network.apply(params, state.batch_stats, images, True)[0]

        found = nj.diagnostics.scale_invariance(state.params, outputs)
        return {
            path: numbers
            for path, numbers in found.items()
            if path.endswith("/kernel") and not path.startswith("logits/")
        }

    def turn(
        self, setting: Setting, steps: int, eval_every: int, evaluated: Callable[[int, float], None]
    ) -> Recorded:
        """Trains, all settings on the same batches.

        Args:
          setting: of the hidden kernels.
          steps: how many to take.
          eval_every: how many steps are compiled into one.
          evaluated: called after each evaluation with the steps since the last one and the
            accuracy.
        """
        state, losses, histories, accuracies = self.start(setting.scale), [], [], []
        rate, decay = jnp.float32(setting.rate), jnp.float32(setting.decay)
        for order in batch_orders(0, len(self.train.labels), self.batch_size, steps, eval_every):
            state, (loss, history) = self._advance(state, self.train, order, rate, decay)
            losses.append(loss)
            histories.append(history)
            accuracies.append(self.accuracy(state, self.test))
            evaluated(len(order), accuracies[-1])
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *histories)
        return Recorded(np.concatenate(losses), whole, accuracies)

    def _turns(
        self, state: State, data: Examples, order: Array, rate: Array, decay: Array
    ) -> tuple[State, tuple[Array, Histories]]:
        """Takes one step per row of `order`, which holds the examples of its batch."""
        chosen = hidden_kernels(state.params)
        kernels = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
        optimizer = optax.partition({True: kernels, False: optax.sgd(self.rate)}, chosen)

        def loss(params: Any, batch_stats: Any, rows: Array) -> tuple[Array, Any]:
            images, labels = data.pick(rows)
            logits, batch_stats = self.network.apply(params, batch_stats, images, True)
            return cross_entropy(logits, labels).mean(), batch_stats

        def step(state: State, rows: Array) -> tuple[State, tuple[Array, Histories]]:
            slope = jax.value_and_grad(loss, has_aux=True)
            (value, batch_stats), gradients = slope(state.params, state.batch_stats, rows)
            # SGD keeps no state
            updates, _ = optimizer.update(gradients, optimizer.init(state.params), state.params)
            updated = optax.apply_updates(state.params, updates)
            turned = nj.diagnostics.rotation(
                state.params, gradients, updated, learning_rate=rate, mask=chosen
            )
            return State(updated, batch_stats, ()), (value, turned)

        return lax.scan(step, state, order)
