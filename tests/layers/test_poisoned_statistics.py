"""In training, nothing but the new running statistics depends on the old ones, bit for bit.

A single batch with an infinity leaves a NaN in the running mean. It must not reach y, the gradients
or the batch's own moments, on any platform, on one device or on several that trained apart. The
correction of batch renorm is the exception: it is defined by the running statistics.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from tests.compare import assert_finite
from tests.distributed.mapped import DEVICES, SPLIT, mesh
from tests.layers.cases import small

FEATURES = 3
SHAPE = (2 * DEVICES, 5, FEATURES)
MASK = np.arange(2 * DEVICES * 5).reshape(*SHAPE[:2], 1) % 4 > 0
FAR = [sign * 10.0**power for power in (-30, 0, 3, 9, 12, 20, 38) for sign in (1, -1)]
NOT_FINITE = [np.nan, np.inf, -np.inf]


def function(layer, dtype=jnp.float32, **fixed):
    def apply(params, batch_stats, x, **settings):
        settings |= fixed
        return layer(params, batch_stats, x.astype(dtype), True, momentum=0.0, **settings)

    return apply


def linen(layer):
    def apply(params, batch_stats, x, **settings):
        norm = layer(use_running_average=False, momentum=0.0, **settings)
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = norm.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return apply


def flax_nnx(layer):
    def apply(params, batch_stats, x, **settings):
        norm = layer(FEATURES, momentum=0.0, rngs=nnx.Rngs(0), **settings)
        for leaf, value in (params | batch_stats).items():
            getattr(norm, leaf).set_value(value)
        y = norm(x)
        return y, {leaf: getattr(norm, leaf)[...] for leaf in batch_stats}

    return apply


# y depends on the running statistics through r and d.
CORRECTED = {
    "batch_renorm": function(nj.batch_renorm),
    "linen.BatchRenorm": linen(nj.linen.BatchRenorm),
    "nnx.BatchRenorm": flax_nnx(nj.nnx.BatchRenorm),
}
PLAIN = {
    "batch_norm": function(nj.batch_norm),
    "batch_norm, bfloat16": function(nj.batch_norm, jnp.bfloat16),
    "batch_norm, ghosts": function(nj.batch_norm, virtual_batch_size=2),
    "batch_norm, masked": function(nj.batch_norm, mask=MASK),
    "activated_batch_norm": function(nj.activated_batch_norm),
    "linen.BatchNorm": linen(nj.linen.BatchNorm),
    "nnx.BatchNorm": flax_nnx(nj.nnx.BatchNorm),
}
LAYERS = PLAIN | CORRECTED
SYNCED = ("batch_norm", "activated_batch_norm", "linen.BatchNorm", "nnx.BatchNorm")
WAYS = ("vmap", "pmap", "shard_map", "shard_map unchecked")
MAPPED = [(name, "vmap") for name in SYNCED] + [("batch_norm", way) for way in WAYS[1:]]


def operands(name):
    params, batch_stats, x = small(np.random.default_rng(0), SHAPE)
    batch_stats = {"mean": jnp.zeros(FEATURES), "var": batch_stats["var"]}
    if name in CORRECTED:
        batch_stats["count"] = jnp.int32(1)
    return params, batch_stats, x


def step(layer, params, batch_stats, x, **settings):
    """Returns y and the gradients, and the new statistics: with momentum 0, the batch's."""
    weight = jnp.sin(jnp.arange(1.0, x.size + 1)).reshape(x.shape)

    def loss(params, x):
        y, new = layer(params, batch_stats, x, **settings)
        return jnp.sum(weight * jnp.tanh(y.astype(jnp.float32))), (y, new)

    (d_params, dx), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return (y, d_params, dx), {"mean": new["mean"], "var": new["var"]}


@functools.cache
def program(on_platform, name):
    """The step as a program of batch_stats and x, and both as they start."""
    params, batch_stats, x = operands(name)

    def run(batch_stats, x):
        return step(LAYERS[name], params, batch_stats, x)

    return on_platform.compiled(run, batch_stats, x), batch_stats, x


@functools.cache
def mapped_program(on_platform, name, way):
    """The same synced over devices, each of which has running statistics of its own."""
    params, batch_stats, x = operands(name)
    batch_stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), batch_stats)
    x = x.reshape(DEVICES, -1, *SHAPE[1:])

    def local(batch_stats, x):
        return step(LAYERS[name], params, batch_stats, x, axis_name="data")

    def shard(*operands):
        outcome = local(*jax.tree.map(lambda a: a[0], operands))
        return jax.tree.map(lambda a: a[None], outcome)

    if way in ("vmap", "pmap"):
        run = getattr(jax, way)(local, axis_name="data")
    else:
        check_vma, devices = way == "shard_map", mesh(data=DEVICES)
        run = jax.shard_map(
            shard, mesh=devices, in_specs=SPLIT, out_specs=SPLIT, check_vma=check_vma
        )
    return on_platform.compiled(run, batch_stats, x), batch_stats, x


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def y_and_gradients(outcome):
    return outcome[0]


def moments(outcome):
    return outcome[1]


def variance(outcome):
    return outcome[1]["var"]


def that_matter(part, run, batch_stats, x, leaf, values):
    """Returns the values of a running statistic that change a part of what the program returns."""
    found = []
    for data in (x, x + 1e4):
        expected = part(run(batch_stats, data))
        assert_finite(expected)
        for value in values:
            poisoned = jnp.broadcast_to(jnp.asarray(value, jnp.float32), batch_stats[leaf].shape)
            outcome = run(batch_stats | {leaf: poisoned}, data)
            if bits(part(outcome)) != bits(expected):
                found.append(value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_y_and_gradients_do_not_depend_on_running_statistics(on_platform, name):
    run, values = program(on_platform, name), FAR + NOT_FINITE
    assert that_matter(y_and_gradients, *run, "mean", values) == []
    assert that_matter(y_and_gradients, *run, "var", values) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_the_moments_of_the_batch_do_not_depend_on_the_running_mean(on_platform, name):
    run = program(on_platform, name)
    assert that_matter(moments, *run, "mean", FAR) == []
    assert that_matter(variance, *run, "mean", NOT_FINITE) == []


@pytest.mark.parametrize("name", LAYERS)
def test_momentum_zero_forgets_what_is_not_finite(on_platform, name):
    """Zero times NaN is NaN: what is merely multiplied by the momentum never recovers."""
    run = program(on_platform, name)
    assert that_matter(moments, *run, "mean", NOT_FINITE) == []
    assert that_matter(moments, *run, "var", NOT_FINITE) == []


def apart():
    """Running means of devices that trained apart, of one row for each device."""
    together = np.tile(np.float32([1e3, 2e3, 3e3]), (DEVICES, 1))
    first = np.arange(DEVICES)[:, None] < DEVICES // 2
    # Two that cancel in a checksum which is a sum of bit patterns: signs of two features, and
    # exponents that move by 3 for one feature and by -1 for another.
    signs = np.where(first, together * np.float32([-1, -1, 1]), together)
    exponents = np.where(first, together * np.float32([8, 0.5, 1]), together)
    far, near = np.where(first, np.float32(1e9), together), np.where(first, 0, together / 1e3)
    return {"signs": signs, "exponents": exponents, "far": far, "near": near}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), MAPPED)
def test_devices_that_trained_apart_agree_on_the_batch(on_platform, name, way):
    run = mapped_program(on_platform, name, way)
    means = apart()
    for part in (y_and_gradients, moments):
        wrong = [
            which for which, value in means.items() if that_matter(part, *run, "mean", [value])
        ]
        assert wrong == []
    assert that_matter(y_and_gradients, *run, "mean", [1e12, 1e38, *NOT_FINITE]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), MAPPED)
def test_a_device_that_is_poisoned_does_not_poison_the_others(on_platform, name, way):
    run = mapped_program(on_platform, name, way)
    rest = np.zeros((DEVICES - 1, FEATURES), np.float32)
    one_of_them = [np.concatenate([np.full((1, FEATURES), v), rest]) for v in NOT_FINITE]
    assert that_matter(y_and_gradients, *run, "mean", one_of_them) == []
