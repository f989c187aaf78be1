"""Synced batch norm on 8 devices is batch norm of the whole batch on one."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_finite, assert_trees_close
from tests.distributed.mapped import (
    DEVICES,
    FEATURES,
    SPLIT,
    WAYS,
    WHOLE,
    assert_steps_close,
    mesh,
    one_device,
    operands,
    step,
    synced,
)
from tests.marks import slow_after

GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
# For CPUs the ways that the guide names are compiled as for users, the others quickly.
OPTIMIZED = ("shard_map", "jit")
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.parametrize("way", slow_after(1, WAYS))
@pytest.mark.parametrize("masked", [False, True])
def test_equals_one_device(on_platform, rng, way, masked):
    mask = jnp.asarray(rng.random((4 * DEVICES, 5, 1)) < 0.6) if masked else None
    given = operands(rng, mask=mask)
    on_platform = on_platform if way in OPTIMIZED else on_platform.quickly
    assert_steps_close(synced(on_platform, way, *given), one_device(*given))


@pytest.mark.slow
@every_way
def test_an_empty_shard_and_nan_under_the_mask_change_nothing(on_platform, rng, way):
    kept = np.ones((4 * DEVICES, 5, 1), bool)
    kept[:4] = False  # device 0 is empty
    kept[9] = False  # device 2 lacks an example
    params, batch_stats, x, weight, _ = operands(rng)
    poisoned = jnp.where(kept, x, jnp.nan)
    given = (params, batch_stats, poisoned, weight, jnp.asarray(kept))
    result = jax.tree.map(np.asarray, synced(on_platform, way, *given))
    rows = kept[:, 0, 0]
    y, new, d_params, dx = one_device(params, batch_stats, x[rows], weight[rows], None)
    assert_steps_close(
        (result[0][rows], result[1], result[2], result[3][rows]), (y, new, d_params, dx)
    )
    assert not np.any(result[3][~rows])


@pytest.mark.slow
@every_way
def test_all_masked_leaves_the_statistics_alone(on_platform, rng, way):
    given = operands(rng, mask=jnp.zeros((4 * DEVICES, 5, 1), bool))
    y, batch_stats, d_params, dx = synced(on_platform, way, *given)
    assert_trees_close(batch_stats, given[1])
    assert_finite((y, d_params, dx))


@pytest.mark.slow
@every_way
def test_offsets_that_differ_between_devices_by_1e4(on_platform, rng, way):
    ramp = jnp.linspace(0, 1e4, DEVICES).repeat(4)[:, None, None]
    given = operands(rng, offset=ramp)
    assert_steps_close(synced(on_platform, way, *given), one_device(*given))


@pytest.mark.slow
@every_way
def test_a_common_offset_of_1e4_on_the_first_step(on_platform, rng, way):
    given = operands(rng, offset=1e4)
    y, batch_stats, _, _ = synced(on_platform, way, *given)
    x = np.asarray(given[2], np.float64)
    assert_close(batch_stats["var"], 0.99 + 0.01 * x.var((0, 1)), rtol=1e-5)
    # y is offset by the rounding of the mean, half a unit in the last place of 1e4 at most, that is
    # 5e-4.
    assert_close(
        y, (x - x.mean((0, 1))) / x.std((0, 1)) * given[0]["scale"] + given[0]["bias"], atol=5e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pmap", "shard_map", "jit explicit"])
def test_bfloat16(on_platform, rng, way):
    given = operands(rng, dtype=jnp.bfloat16)
    result, expected = synced(on_platform, way, *given), one_device(*given)
    assert result[0].dtype == result[3].dtype == jnp.bfloat16
    assert result[1]["mean"].dtype == result[2]["scale"].dtype == jnp.float32
    assert_steps_close(result[1:3], expected[1:3])
    assert_steps_close((result[0], result[3]), (expected[0], expected[3]), rtol=2**-8)


@cache
def in_groups(way):
    """The step of devices that share in groups, as a function of examples stacked by device."""

    def run(*operands):
        return step(*operands, None, axis_name="data", axis_index_groups=GROUPS)

    def shard(params, batch_stats, x, weight):
        return jax.tree.map(lambda a: a[None], run(params, batch_stats, x[0], weight[0]))

    if way in ("pmap", "vmap"):
        return getattr(jax, way)(run, axis_name="data", in_axes=(None, None, 0, 0))
    return jax.shard_map(
        shard,
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT),
        out_specs=SPLIT,
        check_vma=way == "shard_map",
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pmap", "vmap", "shard_map", "shard_map unchecked"])
def test_groups_of_devices_are_batches_of_their_own(on_platform, rng, way):
    params, batch_stats, x, weight, _ = operands(rng)
    split = [a.reshape(DEVICES, 4, *a.shape[1:]) for a in (x, weight)]
    on_platform = on_platform if way in OPTIMIZED else on_platform.quickly
    y, stats, d_params, dx = on_platform(in_groups(way), params, batch_stats, *split)
    y, dx = (jnp.asarray(a).reshape(x.shape) for a in (y, dx))
    stats = jax.tree.map(lambda a: a[jnp.asarray([0, 4])], stats)
    # Under check_vma JAX adds up the gradients of what devices share.
    total = jax.tree.map(lambda a: a[0] if way == "shard_map" else a.sum(0), d_params)
    halves = [
        one_device(params, batch_stats, x[half], weight[half], None)
        for half in (slice(16), slice(16, None))
    ]
    assert_steps_close(y, jnp.concatenate([half[0] for half in halves]))
    assert_steps_close(
        stats, jax.tree.map(lambda a, b: jnp.stack([a, b]), halves[0][1], halves[1][1])
    )
    assert_steps_close(total, jax.tree.map(jnp.add, halves[0][2], halves[1][2]))
    assert_steps_close(dx, jnp.concatenate([half[3] for half in halves]))


@pytest.mark.slow
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_replicas_that_trained_apart_agree_once_they_share(on_platform, rng, transform):
    """However their running means differ, their statistics are those of one device."""
    params, batch_stats, x, _, _ = operands(rng)
    apart = {
        "mean": jnp.asarray(rng.normal(size=(DEVICES, FEATURES)), jnp.float32),
        "var": jnp.ones((DEVICES, FEATURES)),
    }
    mapped = transform(
        lambda stats, x: nj.batch_norm(params, stats, x, True, axis_name="data", momentum=0.0),
        axis_name="data",
    )
    y, new = on_platform(mapped, apart, x.reshape(DEVICES, 4, 5, FEATURES))
    expected_y, expected = reference.batch_norm(params, batch_stats, x, True, momentum=0.0)
    assert_close(y.reshape(x.shape), expected_y, atol=1e-5)
    for leaf, value in expected.items():
        assert_close(new[leaf], np.broadcast_to(value, new[leaf].shape), rtol=1e-5, atol=1e-6)


def epoch(params, batch_stats, x, **settings):
    """Two steps, rematerialized, of a loss that grows with the cube of y."""

    @jax.checkpoint
    def body(carry, x):
        y, batch_stats = nj.batch_norm(params, carry, x, True, **settings)
        return batch_stats, jnp.sum(y**3)

    batch_stats, losses = lax.scan(body, batch_stats, x)
    return losses.sum(), batch_stats


def epoch_of_a_device(params, batch_stats, x):
    loss, batch_stats = epoch(params, batch_stats, x, axis_name="data")
    return lax.psum(loss, "data"), batch_stats


@cache
def synced_epoch():
    mapped = jax.shard_map(
        epoch_of_a_device,
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, PartitionSpec(None, "data")),
        out_specs=(WHOLE, WHOLE),
    )
    return jax.value_and_grad(mapped, has_aux=True)


epoch_alone = jax.jit(jax.value_and_grad(epoch, has_aux=True))


@pytest.mark.slow
def test_sync_inside_scan_and_remat(on_platform, rng):
    params, batch_stats, x, _, _ = operands(rng)
    given = params, batch_stats, x.reshape(2, -1, 5, FEATURES)
    (_, stats), grads = on_platform(synced_epoch(), *given)
    (_, expected_stats), expected = epoch_alone(*given)
    # sums of cubes grow to 1e2
    assert_steps_close((stats, grads), (expected_stats, expected), rtol=1e-4)


def squares(params, batch_stats, x, weight, **settings):
    y, _ = nj.batch_norm(params, batch_stats, x, True, **settings)
    return jnp.sum(y**2 * weight)


def squares_of_a_device(*operands):
    return lax.psum(squares(*operands, axis_name="data"), "data")


def in_both_orders(function):
    """The slope along a tangent, and Hessian-vector products, forward and reverse over reverse."""

    def run(params, batch_stats, x, weight, tangent):
        def f(x):
            return function(params, batch_stats, x, weight)

        slope = jax.jvp(f, (x,), (tangent,))[1]
        forward = jax.jvp(jax.grad(f), (x,), (tangent,))[1]
        return slope, forward, jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), tangent))(x)

    return run


@cache
def synced_orders():
    mapped = jax.shard_map(
        squares_of_a_device,
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT),
        out_specs=WHOLE,
    )
    return in_both_orders(mapped)


orders_alone = jax.jit(in_both_orders(squares))


@pytest.mark.slow
def test_forward_mode_and_second_order_equal_one_device(on_platform, rng):
    params, batch_stats, x, weight, _ = operands(rng)
    tangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    given = params, batch_stats, x, weight, tangent
    assert_steps_close(on_platform(synced_orders(), *given), orders_alone(*given), rtol=1e-4)


def test_evaluation_and_initialization_never_touch_the_axis(rng):
    params, batch_stats, x, _, _ = operands(rng)
    y, same = nj.batch_norm(params, batch_stats, x, False, axis_name="nowhere")
    assert_trees_close(same, batch_stats)
    norm = nj.linen.BatchNorm(use_running_average=False, axis_name="nowhere")
    assert set(norm.init(jax.random.key(0), x)["batch_stats"]) == {"mean", "var"}


def test_a_misspelt_axis_is_named_beside_those_in_scope(rng):
    params, batch_stats, x, _, _ = operands(rng)
    with pytest.raises(NameError, match=r"'dta' is not bound.*\['data'\].*axis_name='dta'"):
        jax.vmap(
            lambda x: nj.batch_norm(params, batch_stats, x, True, axis_name="dta"), axis_name="data"
        )(x)
    with pytest.raises(NameError, match=r"'data' is not bound.*no axis is in scope"):
        nj.batch_norm(params, batch_stats, x, True, axis_name="data")
