"""A CNN with batch normalization in flax.nnx, from training to deployment.

    pip install '.[examples]' && python examples/nnx.py    # on scikit-learn's digits

Trains with optax on all devices, with the statistics of the whole batch, saves and restores the
model, recalibrates the statistics, and folds the batch norms into the convolutions.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import normjax as nj

WIDTHS, BATCH, STEPS = (16, 32, 32), 64, 200


class CNN(nnx.Module):
    """Three convolutions, each with batch norm."""

    def __init__(self, rngs: nnx.Rngs):
        convs, norms, channels = [], [], 1
        for i, width in enumerate(WIDTHS):
            settings = {"strides": 2 if i else 1, "use_bias": False, "rngs": rngs}
            convs.append(nnx.Conv(channels, width, (3, 3), **settings))
            norms.append(nj.nnx.BatchNorm(width, momentum=0.9, rngs=rngs))
            channels = width
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.logits = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: Any) -> Array:
        """Returns logits of images `(batch, height, width, 1)`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.logits(x.mean((1, 2)))


@nnx.jit
def step(model: CNN, optimizer: nnx.Optimizer, images: Array, labels: Array) -> None:
    """Takes a step; jit sees the whole batch, so the statistics are common to all devices."""

    def loss(model: CNN) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main() -> None:
    """Goes through all of it and prints test accuracies."""
    pixels, labels = load_digits(return_X_y=True)
    images: Any = np.asarray(pixels.reshape(-1, 8, 8, 1) / 16, np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:-500], order[-500:]

    def show(what: str, logits: Array) -> None:
        print(f"{what}: test accuracy {np.mean(logits.argmax(-1) == labels[test]):.1%}")

    devices = jax.devices()[: math.gcd(BATCH, len(jax.devices()))]
    mesh = Mesh(devices, ("devices",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("devices",), ()))
    model, rng = CNN(nnx.Rngs(0)), np.random.default_rng(1)
    optimizer = nnx.Optimizer(model, optax.adam(0.005), wrt=nnx.Param)
    for part in (model, optimizer):
        nnx.update(part, jax.device_put(nnx.state(part), whole))
    for _ in range(STEPS):
        rows = rng.choice(train, BATCH, replace=False)
        step(model, optimizer, *jax.device_put((images[rows], labels[rows]), split))
        jax.block_until_ready(nnx.state(model))  # overlapping steps of simulated devices can hang
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        model = CNN(nnx.Rngs(1))
        like = jax.device_put(nnx.state(model), whole)
        nnx.update(model, checkpointer.restore(Path(folder) / "model", like))
    model.eval()
    show("restored", model(images[test]))
    batches = [images[rows] for rows in np.array_split(train, 10)]
    model.train()
    nj.recalibrate(lambda model, x: model(x), model, batches)
    model.eval()
    show("recalibrated", model(images[test]))
    folded = nj.deploy.fold(model, nnx.state(model), images[test])
    show("folded", jax.jit(folded.apply)(folded.variables, images[test]))


if __name__ == "__main__":
    main()
