"""Training that stops every so many steps, for a look at the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.training import State, Trainer, batch_orders


class Watched(Trainer):
    """A trainer that hands out its states on the way; compiled once for all seeds."""

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._take = jax.jit(self._steps)

    def states(
        self, seed: int, learning_rate: float, steps: int, eval_every: int
    ) -> Iterator[tuple[int, State, np.ndarray]]:
        """Yields, after every `eval_every` steps and after the last, how many they were, the state, and a batch's rows.

        The rows are those of the last batch that the network was trained on.
        """
        state, done = self.init(seed), 0
        for order in batch_orders(seed, len(self.train.labels), self.batch_size, steps, eval_every):
            state = self._take(state, self.train, order, jnp.float32(learning_rate))
            yield (done := done + len(order)), state, order[-1]
