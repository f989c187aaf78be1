"""A CNN with batch normalization as pure functions, from training to deployment.

    pip install '.[examples]' && python examples/functional.py    # on scikit-learn's digits

Trains with optax on all devices, with the statistics of the whole batch, saves and restores the
training state, recalibrates the statistics, and folds the batch norms into the convolutions.
"""

import itertools
import math
import tempfile
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array, lax
from jax.nn.initializers import he_normal, zeros
from jax.sharding import Mesh, PartitionSpec
from sklearn.datasets import load_digits

import normjax as nj

WIDTHS, BATCH, STEPS = (16, 32, 32), 64, 200
optimizer = optax.adam(0.005)


def init(key: Array) -> Any:
    """Returns parameters, statistics and the optimizer's state."""
    params, batch_stats = {}, {}
    for i, (channels, width) in enumerate(itertools.pairwise((1, *WIDTHS))):
        norm, batch_stats[f"conv_{i}"] = nj.batch_norm_init(width)
        kernel = he_normal()(jax.random.fold_in(key, i), (3, 3, channels, width))
        params[f"conv_{i}"] = {"kernel": kernel, "norm": norm}
    params["logits"] = {"kernel": zeros(key, (WIDTHS[-1], 10)), "bias": zeros(key, (10,))}
    return params, batch_stats, optimizer.init(params)


def apply(
    params: Any, batch_stats: Any, x: Array, train: bool, axis_name: str | None = None
) -> tuple[Array, Any]:
    """Returns logits of images `(batch, height, width, 1)`, and the new statistics."""
    batch_stats = dict(batch_stats)
    for i in range(len(WIDTHS)):
        name, stride, layout = f"conv_{i}", (2, 2) if i else (1, 1), ("NHWC", "HWIO", "NHWC")
        kernel, norm, old = params[name]["kernel"], params[name]["norm"], batch_stats[name]
        x = lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=layout)
        x, batch_stats[name] = nj.batch_norm(norm, old, x, train, momentum=0.9, axis_name=axis_name)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["logits"]["kernel"] + params["logits"]["bias"], batch_stats


def device_step(state: Any, images: Array, labels: Array) -> Any:
    """Takes a step on one device's part of the batch; axis_name makes the statistics common."""
    params, batch_stats, optimizer_state = state

    def loss(params: Any) -> tuple[Array, Any]:
        logits, new = apply(params, batch_stats, images, True, axis_name="devices")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return lax.pmean(loss, "devices"), new

    gradients, batch_stats = jax.grad(loss, has_aux=True)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state)
    return optax.apply_updates(params, updates), batch_stats, optimizer_state


def main() -> None:
    """Goes through all of it and prints test accuracies."""
    pixels, labels = load_digits(return_X_y=True)
    images: Any = np.asarray(pixels.reshape(-1, 8, 8, 1) / 16, np.float32)
    rng = np.random.default_rng(0)
    train, test = np.split(rng.permutation(len(images)), [-500])

    def show(what: str, logits: Array) -> None:
        print(f"{what}: test accuracy {np.mean(logits.argmax(-1) == labels[test]):.1%}")

    devices = jax.devices()[: math.gcd(BATCH, len(jax.devices()))]
    mesh, split, whole = Mesh(devices, ("devices",)), PartitionSpec("devices"), PartitionSpec()
    specs = {"in_specs": (whole, split, split), "out_specs": whole}
    step = jax.jit(jax.shard_map(device_step, mesh=mesh, **specs))
    state = init(jax.random.key(0))
    for _ in range(STEPS):
        rows = rng.choice(train, BATCH, replace=False)
        state = step(state, images[rows], labels[rows])
        jax.block_until_ready(state)  # overlapping steps of simulated devices can hang
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{folder}/state", state)
        checkpointer.wait_until_finished()
        variables: Any = checkpointer.restore(f"{folder}/state", state)[:2]
    show("restored", apply(*variables, x=images[test], train=False)[0])
    batches = [images[rows] for rows in np.array_split(train, 10)]
    variables = nj.recalibrate(lambda v, x: apply(*v, x=x, train=True), variables, batches)
    show("recalibrated", apply(*variables, x=images[test], train=False)[0])
    folded = nj.deploy.fold(lambda v, x: apply(*v, x=x, train=False)[0], variables, images[test])
    show("folded", jax.jit(folded.apply)(folded.variables, images[test]))


if __name__ == "__main__":
    main()
