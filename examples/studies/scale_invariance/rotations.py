"""Trains networks by SGD with a separate rate and decay for kernels, and measures how these turn.

All other parameters (scales, biases, the last layer) are trained at one rate without decay, so that
runs only differ in the effect of rate and decay on kernels whose scale does not matter.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common.networks import Tree
from common.study import Advance
from common.training import Examples, Plan, State, Trainer, batch_loss, batch_orders
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
    """A trainer of hidden kernels at any rate and decay, compiled once for all of them."""

    def start(self, scale: float = 1.0) -> State:
        """Returns where training starts from: the same directions for all scales."""
        state = self.init(0)
        chosen = hidden_kernels(state.params)
        params = jax.tree.map(lambda w, mine: scale * w if mine else w, state.params, chosen)
        return State(params, state.batch_stats, optimizer=())

    def invariance(self, examples: int = 64) -> dict[str, nj.diagnostics.ScaleInvariance]:
        """Returns how invariant the network's outputs are to the scale of each hidden kernel."""
        state = self.start()
        images, _ = self.train.pick(slice(examples))

        def outputs(params: Any) -> Array:
            return self.network.apply(params, state.batch_stats, images, True)[0]

        found = nj.diagnostics.scale_invariance(state.params, outputs)
        return {
            path: numbers
            for path, numbers in found.items()
            if path.endswith("/kernel") and not path.startswith("logits/")
        }

    def turn(self, setting: Setting, plan: Plan, advance: Advance) -> Recorded:
        """Trains hidden kernels with a setting, all others by the plan and without decay."""
        state, losses, histories, accuracies = self.start(setting.scale), [], [], []
        rates = tuple(map(jnp.float32, (setting.rate, setting.decay, plan.learning_rate)))
        for order in batch_orders(plan, len(self.train.labels)):
            state, (loss, history) = self._turns(state, self.train, order, rates)
            losses.append(loss)
            histories.append(history)
            accuracies.append(self.accuracy(state, self.test))
            advance(len(order), f"{accuracies[-1]:.1%}")
        whole = jax.tree.map(lambda *parts: np.concatenate(parts), *histories)
        return Recorded(np.concatenate(losses), whole, accuracies)

    @partial(jax.jit, static_argnums=0)
    def _turns(
        self, state: State, data: Examples, order: Array, rates: tuple[Array, ...]
    ) -> tuple[State, tuple[Array, Histories]]:
        """Takes one step per row of `order`, which holds the examples of its batch."""
        rate, decay, other = rates
        chosen = hidden_kernels(state.params)
        kernels = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
        optimizer = optax.partition({True: kernels, False: optax.sgd(other)}, chosen)
        slope = jax.value_and_grad(partial(batch_loss, self.network, data), has_aux=True)

        def step(state: State, rows: Array) -> tuple[State, tuple[Array, Histories]]:
            (value, (batch_stats, _)), gradients = slope(state.params, state.batch_stats, rows)
            # SGD keeps no state
            updates, _ = optimizer.update(gradients, optimizer.init(state.params), state.params)
            updated = optax.apply_updates(state.params, updates)
            turned = nj.diagnostics.rotation(
                state.params, gradients, updated, learning_rate=rate, mask=chosen
            )
            return State(updated, batch_stats, ()), (value, turned)

        return lax.scan(step, state, order)
