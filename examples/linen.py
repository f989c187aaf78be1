"""A CNN with batch normalization in flax.linen, from training to deployment.

    pip install '.[examples]' && python examples/linen.py    # on scikit-learn's digits

Trains with optax on all devices, with the statistics of the whole batch, saves and restores the
training state, recalibrates the statistics, and folds the batch norms into the convolutions.
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import normjax as nj

WIDTHS, BATCH, STEPS = (16, 32, 32), 64, 200


class CNN(nn.Module):
    """Three convolutions, each with batch norm; in training, "batch_stats" has to be mutable."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits of images `(batch, height, width, 1)`."""
        for i, width in enumerate(WIDTHS):
            x = nn.Conv(width, (3, 3), 2 if i else 1, use_bias=False)(x)
            x = nn.relu(nj.linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class State(TrainState):
    """The state of training, with the statistics."""

    batch_stats: Any


@jax.jit
def step(state: State, images: Array, labels: Array) -> State:
    """Takes a step; jit sees the whole batch, so the statistics are common to all devices."""

    def loss(params: Any) -> tuple[Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats)


def main() -> None:
    """Goes through all of it and prints test accuracies."""
    pixels, labels = load_digits(return_X_y=True)
    images: Any = np.asarray(pixels.reshape(-1, 8, 8, 1) / 16, np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:-500], order[-500:]

    def show(what: str, logits: Any) -> None:
        print(f"{what}: test accuracy {np.mean(logits.argmax(-1) == labels[test]):.1%}")

    devices = jax.devices()[: math.gcd(BATCH, len(jax.devices()))]
    mesh = Mesh(devices, ("devices",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    model, rng = CNN(), np.random.default_rng(1)
    variables = model.init(jax.random.key(0), images[:1], train=False)
    state = State.create(apply_fn=model.apply, tx=optax.adam(0.005), **variables)
    state = jax.device_put(state, whole)
    for _ in range(STEPS):
        rows = rng.choice(train, BATCH, replace=False)
        state = step(state, *jax.device_put((images[rows], labels[rows]), split))
        jax.block_until_ready(state.params)  # overlapping steps of simulated devices can hang
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", state)
        checkpointer.wait_until_finished()
        state = checkpointer.restore(Path(folder) / "state", state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    show("restored", model.apply(variables, images[test], train=False))
    training = partial(model.apply, train=True, mutable=["batch_stats"])
    batches = [images[rows] for rows in np.array_split(train, 10)]
    variables = nj.recalibrate(training, variables, batches)
    show("recalibrated", model.apply(variables, images[test], train=False))
    folded = nj.deploy.fold(partial(model.apply, train=False), variables, images[test])
    show("folded", jax.jit(folded.apply)(folded.variables, images[test]))


if __name__ == "__main__":
    main()
