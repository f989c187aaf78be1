"""Frozen batch norm, wholly and in part: what docs/pages/statistics.md tells users to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.compare import assert_identical

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
STEPS = 4
X = np.random.default_rng(0).normal(3, 2, (16, 3)).astype(np.float32)


def labelled(params, batch_stats, of=""):
    """The page's function; `of` narrows it to the layers whose paths hold it."""
    layers = {
        path[:-1]
        for path, _ in jax.tree.leaves_with_path(batch_stats)
        if of in jax.tree_util.keystr(path)
    }
    return jax.tree.map_with_path(
        lambda path, _: "frozen" if path[:-1] in layers else "trained", params
    )


def freezing(marks):
    decaying = optax.adamw(0.1, weight_decay=0.1)
    return optax.multi_transform({"trained": decaying, "frozen": optax.set_to_zero()}, marks)


def train(loss, params, batch_stats, optimizer):
    state = optimizer.init(params)
    for _ in range(STEPS):
        gradients, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, batch_stats


def moved(before, after):
    """The paths of the leaves that changed."""
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in
            jax.tree.leaves_with_path(changed) if leaf}  # fmt: skip


class Net(nn.Module):
    frozen: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.Dense(3, use_bias=False, name=f"{name}_dense")(x)
            x = nn.relu(
                nj.linen.BatchNorm(
                    use_running_average=False, frozen=name in self.frozen, name=name
                )(x)
            )
        return x


def functional(params, batch_stats, x, frozen):
    new = {}
    for name in ("first", "second"):
        x = x @ params[f"{name}_dense"]["kernel"]
        x, new[name] = nj.batch_norm(params[name], batch_stats[name], x, train=name not in frozen)
        x = jax.nn.relu(x)
    return x, new


def linen(params, batch_stats, x, frozen):
    y, updates = Net(frozen).apply(
        {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
    )
    return y, updates["batch_stats"]


KERNELS = {"first_dense/kernel", "second_dense/kernel"}
AFFINE = {f"{name}/{leaf}" for name in ("first", "second") for leaf in ("scale", "bias")}
STATISTICS = {f"{name}/{leaf}" for name in ("first", "second") for leaf in ("mean", "var")}


def of_first(paths):
    return {path for path in paths if path.startswith("first/")}


@pytest.mark.slow
@pytest.mark.parametrize("apply", [functional, linen])
@pytest.mark.parametrize("frozen", [(), ("first",), ("first", "second")])
def test_frozen_statistics_stay_while_scale_and_bias_are_trained(apply, frozen):
    variables = Net().init(jax.random.key(0), X)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def loss(params, batch_stats):
        y, batch_stats = apply(params, batch_stats, X, frozen)
        return jnp.sum((y - 1) ** 2), batch_stats

    trained, new = train(loss, params, batch_stats, optax.adamw(0.1))
    assert moved(params, trained) == KERNELS | AFFINE
    assert moved(batch_stats, new) == {
        path for path in STATISTICS if path.split("/")[0] not in frozen
    }


@pytest.mark.slow
@pytest.mark.parametrize("apply", [functional, linen])
@pytest.mark.parametrize("of", ["", "first"])
def test_marked_scales_and_biases_stay_also_under_weight_decay(apply, of):
    variables = Net().init(jax.random.key(0), X)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def loss(params, batch_stats):
        y, batch_stats = apply(params, batch_stats, X, ("first", "second"))
        return jnp.sum((y - 1) ** 2), batch_stats

    trained, new = train(loss, params, batch_stats, freezing(labelled(params, batch_stats, of)))
    assert moved(params, trained) == KERNELS | (AFFINE - of_first(AFFINE) if of else set())
    assert_identical(new, batch_stats)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first_dense, self.second_dense = (
            nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2)
        )
        self.first, self.second = (nj.nnx.BatchNorm(3, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        x = nnx.relu(self.first(self.first_dense(x)))
        return nnx.relu(self.second(self.second_dense(x)))


def values(model, kind):
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, kind)))


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [(), ("first",), ("first", "second")])
@pytest.mark.parametrize("affine", [(), ("first",), ("first", "second")])
def test_frozen_layers_of_nnx(statistics, affine):
    model = NNXNet()
    for name in statistics:
        getattr(model, name).set_attributes(nj.nnx.BatchNorm, frozen=True)
    model.train()  # which turns use_running_average=True off
    trained = nnx.All(nnx.Param, nnx.Not(lambda path, value: path[0] in affine))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.1), wrt=trained)
    params, batch_stats = values(model, nnx.Param), values(model, nnx.BatchStat)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(
            lambda model: jnp.sum((model(X) - 1) ** 2), argnums=nnx.DiffState(0, trained)
        )(model)
        optimizer.update(model, gradients)

    for _ in range(STEPS):
        step(model, optimizer)
    assert moved(params, values(model, nnx.Param)) == KERNELS | {
        p for p in AFFINE if p.split("/")[0] not in affine
    }
    assert moved(batch_stats, values(model, nnx.BatchStat)) == {
        path for path in STATISTICS if path.split("/")[0] not in statistics
    }
