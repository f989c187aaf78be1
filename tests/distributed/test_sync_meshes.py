"""Synced batch norm on meshes of several axes, with sharded features, and with accumulation."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from tests.compare import assert_trees_close
from tests.distributed.mapped import (
    DEVICES,
    WHOLE,
    assert_steps_close,
    mesh,
    one_device,
    operands,
    step,
)

MESHES = {2: {"data": 4, "model": 2}, 3: {"pod": 2, "data": 2, "model": 2}}
OVER = [
    (axes, names)
    for axes in MESHES.values()
    for n in range(1, 4)
    for names in combinations(axes, n)
]


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("axes", "names"), OVER, ids=lambda names: "x".join(names))
def test_statistics_over_any_axes_of_a_mesh(rng, axes, names, check_vma):
    params, batch_stats, x, weight, _ = operands(rng)
    every = PartitionSpec(tuple(axes))

    def local(params, batch_stats, x, weight):
        y, stats, d_params, dx = step(params, batch_stats, x, weight, None, axis_name=names)
        d_params = d_params if check_vma else lax.psum(d_params, tuple(axes))
        return y, jax.tree.map(lambda a: a[None], stats), d_params, dx

    # What shares its statistics holds them replicated; the axes that are left tell the groups
    # apart.
    others = tuple(axis for axis in axes if axis not in names)
    mapped = jax.shard_map(
        local,
        mesh=mesh(**axes),
        in_specs=(WHOLE, WHOLE, every, every),
        out_specs=(every, PartitionSpec(others), WHOLE, every),
        check_vma=check_vma,
    )
    y, stats, d_params, dx = jax.jit(mapped)(params, batch_stats, x, weight)
    place = dict(
        zip(axes, np.unravel_index(np.arange(4 * DEVICES) // 4, tuple(axes.values())), strict=True)
    )
    sizes = [axes[axis] for axis in others]
    group = (
        np.ravel_multi_index([place[axis] for axis in others], sizes)
        if others
        else np.zeros(4 * DEVICES, int)
    )
    total = jax.tree.map(jnp.zeros_like, params)
    for index in range(group.max() + 1):
        rows = group == index
        expected = one_device(params, batch_stats, x[rows], weight[rows], None)
        assert_steps_close((y[rows], dx[rows]), (expected[0], expected[3]))
        assert_steps_close(jax.tree.map(lambda a, i=index: a[i], stats), expected[1])
        total = jax.tree.map(jnp.add, total, expected[2])
    assert_steps_close(d_params, total)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES.values(), ids="x".join)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_features_split_over_a_model_axis(rng, axes, offset, check_vma):
    # Only half of the features are offset: their devices take the second pass, the others do not.
    offset = jnp.where(jnp.arange(4) < 2, offset, 0.0)
    given = operands(rng, features=4, offset=offset)
    batch = tuple(axis for axis in axes if axis != "model")
    features, examples = PartitionSpec("model"), PartitionSpec(batch, None, "model")

    def local(*shards):
        y, stats, d_params, dx = step(*shards, None, axis_name=batch)
        return y, stats, d_params if check_vma else lax.psum(d_params, batch), dx

    mapped = jax.shard_map(
        local,
        mesh=mesh(**axes),
        in_specs=(features, features, examples, examples),
        out_specs=(examples, features, features, examples),
        check_vma=check_vma,
    )
    assert_steps_close(jax.jit(mapped)(*given[:4]), one_device(*given))


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES.values(), ids="x".join)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("masked", [False, True])
def test_jit_with_examples_and_features_sharded(rng, axes, kind, masked):
    mask = jnp.asarray(rng.random((4 * DEVICES, 5, 1)) < 0.6) if masked else None
    params, batch_stats, x, weight, _ = given = operands(rng, features=4, mask=mask)
    devices = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    batch = tuple(axis for axis in axes if axis != "model")

    def placed(tree, *spec):
        return jax.device_put(tree, NamedSharding(devices, PartitionSpec(*spec)))

    with jax.set_mesh(devices):
        operand = (
            *placed((params, batch_stats), "model"),
            *placed((x, weight), batch, None, "model"),
        )
        assert_steps_close(jax.jit(step)(*operand, placed(mask, batch)), one_device(*given))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_jit_with_ghost_batches_of_several_devices(rng, kind):
    """Groups under plain jit: slices of the global batch, here of 2 devices each."""
    given = operands(rng)
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    with jax.set_mesh(devices):
        x, weight = (
            jax.device_put(a, NamedSharding(devices, PartitionSpec("data"))) for a in given[2:4]
        )
        sharded = jax.jit(lambda *a: step(*a, None, virtual_batch_size=8))(*given[:2], x, weight)
    assert_steps_close(sharded, one_device(*given, virtual_batch_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_accumulated_gradients_and_statistics(rng, check_vma):
    """Synced microbatches under scan: gradients are summed, and running statistics move once."""
    params, batch_stats, x, weight, _ = operands(rng)

    def accumulated(params, batch_stats, x, weight, **axis):
        def body(carry, microbatch):
            gradients, seen = carry
            x, weight = microbatch
            _, own, d_params, dx = step(params, batch_stats, x, weight, None, momentum=0.0, **axis)
            count = jnp.full_like(own["mean"], x.size // x.shape[-1] * (DEVICES if axis else 1))
            seen = nj.merge_moments(seen, nj.Moments(count, own["mean"], own["var"]))
            return (jax.tree.map(jnp.add, gradients, d_params), seen), dx

        nothing = nj.Moments(*[jnp.zeros_like(batch_stats["mean"])] * 3)
        zeros = jax.tree.map(jnp.zeros_like, params)
        (gradients, seen), dx = lax.scan(body, (zeros, nothing), (x, weight))
        if axis and not check_vma:
            gradients = lax.psum(gradients, "data")
        return nj.update_batch_stats(batch_stats, seen, momentum=0.9), gradients, dx

    rows, spec = (2, -1, *x.shape[1:]), PartitionSpec(None, "data")
    mapped = jax.shard_map(
        lambda *a: accumulated(*a, axis_name="data"),
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, spec, spec),
        out_specs=(WHOLE, WHOLE, spec),
        check_vma=check_vma,
    )
    given = (params, batch_stats, x.reshape(rows), weight.reshape(rows))
    result, expected = jax.jit(mapped)(*given), jax.jit(accumulated)(*given)
    assert_steps_close(result, expected)
    whole = nj.batch_norm(params, batch_stats, x, True, momentum=0.9)[1]
    assert_trees_close(result[0], whole, rtol=1e-5, atol=1e-6)
