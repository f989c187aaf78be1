"""The library passes whole where JAX is told to raise for operands of different ranks."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

import normjax as nj
from tests.adapters import every_adapter
from tests.contract.cases import every_case, step
from tests.contract.layers import SHAPE

X = jnp.arange(72.0).reshape(SHAPE) % 7
PARAMS, BATCH_STATS = nj.batch_norm_init(4, count=True)
MOMENTS = nj.moments(X, (0, 1))
KERNELS = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
CHOSEN = {"kernel": True, "bias": False}


@pytest.fixture(autouse=True)
def raising():
    # Flax and optax mix dtypes.
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("standard"):
        yield


@every_case
def test_every_layer_in_training_at_inference_and_backward(case, rng):
    jax.eval_shape(step(case), *case.arguments(rng), case.mask())


@every_adapter
def test_every_adapter(adapter):
    def loss(x):
        return jnp.sum(adapter.call(adapter.make(), x) ** 2)

    jax.eval_shape(jax.grad(loss) if adapter.package == "linen" else loss, X)


LAYERS = (nj.batch_norm, nj.batch_renorm, nj.activated_batch_norm)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_parameters_of_each_example_ghosts_and_devices(layer):
    params = {leaf: jnp.ones((6, 1, 4)) for leaf in PARAMS}
    masks = {} if layer is nj.activated_batch_norm else {"mask": X[..., :1] > 0}
    for settings in ({}, masks, {"virtual_batch_size": 2}, masks | {"virtual_batch_size": 2}):
        jax.eval_shape(partial(layer, train=True, **settings), params, BATCH_STATS, X)

    def on_device(x):
        return layer(PARAMS, BATCH_STATS, x, True, axis_name="devices")[0]

    jax.eval_shape(jax.vmap(on_device, axis_name="devices"), X)
    cumulative = partial(layer, train=True, momentum=None, running_var="unbiased")
    jax.eval_shape(cumulative, PARAMS, BATCH_STATS, X)


def sync():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), BATCH_STATS)
    return jax.vmap(lambda own: nj.sync_batch_stats(own, "devices"), axis_name="devices")(stacked)


def update():
    for moments in (MOMENTS, nj.Moments(4, MOMENTS.mean, MOMENTS.var)):
        for momentum in (0.9, None, jnp.float32(0.9)):
            for running_var in ("biased", "unbiased"):
                nj.update_batch_stats(
                    BATCH_STATS, moments, momentum=momentum, running_var=running_var
                )


def recalibrate():
    def apply(variables, x):
        return nj.batch_norm(*variables, x, True, mask=x > 1)

    for settings in ({}, {"layer_by_layer": True}, {"estimate": "averaged"}):
        nj.recalibrate(apply, (PARAMS, BATCH_STATS), [X, X + 1], **settings)


def fold():
    nj.fold_batch_norm(jnp.ones((3, 3, 2, 4)), jnp.ones(4), PARAMS, BATCH_STATS)
    nj.fold_batch_norm(jnp.ones((2, 4, 3)), jnp.ones(3), PARAMS, BATCH_STATS, before=True)


def fold_model():
    def apply(variables, x):
        params = variables["params"]
        x = x @ params["kernel"] + params["bias"][None, None]
        return nj.batch_norm(params["norm"], variables["batch_stats"], x, train=False)[0]

    params = {"kernel": jnp.eye(4), "bias": jnp.ones(4), "norm": PARAMS}
    nj.deploy.fold(apply, {"params": params, "batch_stats": BATCH_STATS}, X, show=False)


def transform(optimizer):
    gradients = jax.tree.map(lambda leaf: leaf / 10, KERNELS)
    optimizer.update(gradients, optimizer.init(KERNELS), KERNELS)


def renormalize():
    for settings in ({}, {"rotation": 0.1}, {"feature_axes": -1}):
        transform(nj.optim.renormalize(CHOSEN, optax.sgd(0.1), **settings))


def project():
    for settings in ({}, {"mask": CHOSEN, "feature_axes": -1}):
        transform(nj.optim.project_scale_invariant(weight_decay=0.1, **settings))


def accumulate():
    optimizer = optax.MultiSteps(optax.sgd(0.1), 2)
    state = optimizer.init(PARAMS)
    _, new = nj.batch_norm(PARAMS, BATCH_STATS, X, True, momentum=None)
    _, new_state = optimizer.update(PARAMS, state, PARAMS)
    statistics = nj.optim.accumulate(momentum=None)
    for seen in (new, MOMENTS):
        statistics.update(seen, statistics.init(BATCH_STATS, state), BATCH_STATS, new_state)


def weights():
    nj.weights.weight_norm_init_from_data(lambda kernel: X @ kernel, KERNELS["kernel"].T)


def report():
    def apply(variables, x):
        y, new = nj.batch_norm(*variables, x, True)
        return y, new

    nj.diagnostics.report((PARAMS, BATCH_STATS), apply_fn=apply, batch=X)


TRACED = (sync, update, renormalize, project, accumulate)
OTHERS = [
    sync,
    update,
    recalibrate,
    fold,
    fold_model,
    renormalize,
    project,
    accumulate,
    weights,
    report,
    lambda: nj.merge_moments(MOMENTS, MOMENTS),
    lambda: nj.moments(X, (0, 1), mask=X[:, :1, :1] > 0),
    lambda: nj.average_batch_stats([BATCH_STATS, BATCH_STATS]),
    lambda: nj.optim.effective_learning_rate(KERNELS, 0.1),
]


@pytest.mark.slow
@pytest.mark.parametrize("call", OTHERS, ids=lambda call: call.__name__)
def test_all_else(call):
    """Traced where that is possible, since JAX raises as it traces."""
    if call in TRACED:
        jax.eval_shape(call)
    else:
        call()
