"""Batches that are not finite, and running statistics too imprecise to train with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close

FEATURES = 3


def function(layer):
    def apply(batch_stats, x, **settings):
        settings = {"momentum": None} | settings  # so that there is a count
        return layer({}, batch_stats, x, True, **settings)

    return apply


def linen(layer):
    def apply(batch_stats, x, **settings):
        settings = {"momentum": None} | settings
        norm = layer(use_running_average=False, use_scale=False, use_bias=False, **settings)
        y, new = norm.apply({"batch_stats": batch_stats}, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return apply


def flax_nnx(layer):
    def apply(batch_stats, x, **settings):
        settings = {"momentum": None} | settings  # so that there is a count
        norm = layer(FEATURES, use_scale=False, use_bias=False, rngs=nnx.Rngs(0), **settings)
        for leaf, value in batch_stats.items():
            getattr(norm, leaf).set_value(value)
        return norm(x), {leaf: getattr(norm, leaf)[...] for leaf in batch_stats}

    return apply


LAYERS = {
    "batch_norm": function(nj.batch_norm),
    "batch_renorm": function(nj.batch_renorm),
    "activated_batch_norm": function(nj.activated_batch_norm),
    "linen.BatchNorm": linen(nj.linen.BatchNorm),
    "linen.BatchRenorm": linen(nj.linen.BatchRenorm),
    "nnx.BatchNorm": flax_nnx(nj.nnx.BatchNorm),
    "nnx.BatchRenorm": flax_nnx(nj.nnx.BatchRenorm),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
BAD_VALUES = [np.nan, np.inf, -np.inf]
BAD = pytest.mark.parametrize("bad", BAD_VALUES)


def start(dtype=jnp.float32):
    stats = {"mean": jnp.full(FEATURES, 0.5, dtype), "var": jnp.full(FEATURES, 2.0, dtype)}
    return stats | {"count": jnp.asarray(7, jnp.int32)}


def batch(rng, bad=None):
    x = rng.normal(size=(8, FEATURES)).astype(np.float32)
    if bad is not None:
        x[3, 1] = bad
    return jnp.asarray(x)


@each_layer
def test_by_default_it_enters_the_running_statistics_as_in_flax(on_platform, rng, name):
    run = on_platform.compiled(LAYERS[name], start(), batch(rng))
    for bad in BAD_VALUES:
        _, new = run(start(), batch(rng, bad))
        assert not np.isfinite(new["mean"][1]) and np.isfinite(new["mean"][0]), bad
        assert int(new["count"]) == 8, bad


@each_layer
def test_it_can_be_skipped(on_platform, rng, name):
    def step(batch_stats, x):
        return LAYERS[name](batch_stats, x, skip_nonfinite=True)

    run = on_platform.compiled(step, start(), batch(rng))
    for bad in BAD_VALUES:
        _, kept = run(start(), batch(rng, bad))
        assert_identical(kept, start(), case=bad)
    x = batch(rng)
    assert_trees_close(run(start(), x), LAYERS[name](start(), x), atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 1.0, None, 0.9])
def test_all_devices_decide_alike(on_platform, rng, momentum):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()

    def step(batch_stats, x):
        settings = {"momentum": momentum, "axis_name": "devices", "skip_nonfinite": True}
        return nj.batch_norm({}, batch_stats, x, True, **settings)[1]

    synced = jax.shard_map(step, mesh=mesh, in_specs=(whole, split), out_specs=whole)
    run = on_platform.compiled(synced, start(), batch(rng))
    assert_identical(run(start(), batch(rng, np.inf)), start())
    assert int(run(start(), batch(rng))["count"]) == 8


@BAD
def test_the_batches_of_update_batch_stats_can_be_skipped(rng, bad):
    moments = nj.moments(batch(rng, bad), 0)
    new = nj.update_batch_stats(start(), moments, momentum=None, skip_nonfinite=True)
    assert_identical(new, start())


def test_the_first_batch_of_a_cumulative_mean_can_be_skipped(rng):
    state = nj.batch_norm_init(FEATURES, count=True)[1]
    settings = {"momentum": None, "skip_nonfinite": True}
    _, skipped = nj.batch_norm({}, state, batch(rng, np.nan), True, **settings)
    assert_identical(skipped, state)
    _, new = nj.batch_norm({}, skipped, batch(rng), True, **settings)
    assert int(new["count"]) == 1


@pytest.mark.slow
def test_recalibration_leaves_such_batches_out(rng):
    state = nj.batch_norm_init(FEATURES)[1]

    def apply(state, x):
        return nj.batch_norm({}, state, x, True, skip_nonfinite=True)

    good = [batch(rng), batch(rng)]
    found = nj.recalibrate(apply, state, [good[0], batch(rng, np.nan), good[1]])
    assert_trees_close(found, nj.recalibrate(apply, state, good), atol=1e-6)


@each_layer
def test_the_switch_is_a_bool(rng, name):
    with pytest.raises(TypeError, match="skip_nonfinite is not a bool.*skip_nonfinite='yes'"):
        LAYERS[name](start(), batch(rng), skip_nonfinite="yes")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_layer
def test_coarse_running_statistics_are_named_in_training(rng, promotion_as_in_flax, name, dtype):
    with pytest.raises(TypeError, match=f"too imprecise to train with.*got dtype {dtype.__name__}"):
        LAYERS[name](start(dtype), batch(rng))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_at_inference_they_are_as_good_as_they_are(rng, dtype):
    x = batch(rng)
    y, same = nj.batch_norm({}, start(dtype), x, False)
    assert_close(y, (np.asarray(x) - 0.5) / np.sqrt(2 + 1e-5), atol=1e-6)
    assert_identical(same, start(dtype))
