"""Layers with statistics of each example, on examples sharded over 8 devices; batch renorm."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import normjax as nj
from tests.compare import assert_close, assert_trees_close
from tests.distributed.mapped import DEVICES, collectives, mesh
from tests.marks import slow_after
from tests.xla import AS_FOR_USERS

POSITIONS, FEATURES = PartitionSpec(None, "data"), PartitionSpec(None, None, "data")
SHAPE = (3, 16, 16)
# The layer, and which axis of x is cut; that of the features cuts scale and bias, too.
CASES = {
    "layer_norm": (partial(nj.layer_norm, reduction_axes=(1, 2)), POSITIONS),
    "layer_norm, features": (nj.layer_norm, FEATURES),
    "rms_norm, features": (partial(nj.rms_norm, scale_offset=1.0), FEATURES),
    "group_norm": (partial(nj.group_norm, num_groups=4), POSITIONS),
    "group_norm, features": (partial(nj.group_norm, num_groups=1), FEATURES),
    "instance_norm": (nj.instance_norm, POSITIONS),
    "filter_response_norm": (nj.filter_response_norm, POSITIONS),
    "global_response_norm": (nj.global_response_norm, POSITIONS),
    "group_norm along time, features": (
        partial(nj.group_norm, num_groups=1, cumulative_axis=1),
        FEATURES,
    ),
}


def operands(rng, offset=0.0):
    params = {
        leaf: jnp.asarray(rng.normal(1, 0.1, SHAPE[-1]), jnp.float32) for leaf in ("scale", "bias")
    }
    x, weight = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))
    return params, x + offset, weight


def step(layer, params, x, weight, mask, **settings):
    """Returns y and the gradients of params and x, of a loss that is a sum over devices."""

    def loss(params, x):
        y, _ = layer(params, {}, x, True, mask=mask, **settings)
        return jnp.sum(jnp.sin(y) * weight), y

    (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return y, *gradients


WAYS = ("shard_map", "shard_map unchecked", "jit", "jit explicit")
# A mask changes what is summed, the way how: each of both with either of the other.
MASKED = {"shard_map": True, "shard_map unchecked": False, "jit": False, "jit explicit": True}

# For CPUs one way of each kind, one of them with a mask, is compiled as for users.
OPTIMIZED = ("shard_map", "jit")


@cache
def step_of(case):
    return partial(step, CASES[case][0])


@cache
def alone(case):
    return jax.jit(step_of(case))


@cache
def shard_mapped(case, check_vma):
    layer, cut = CASES[case]
    own = PartitionSpec("data") if cut == FEATURES else PartitionSpec()

    def run(params, x, weight, mask):
        y, d_params, dx = step(layer, params, x, weight, mask, axis_name="data")
        return y, d_params if check_vma or cut == FEATURES else lax.psum(d_params, "data"), dx

    return jax.shard_map(
        run,
        mesh=mesh(data=DEVICES),
        in_specs=(own, cut, cut, cut),
        out_specs=(cut, own, cut),
        check_vma=check_vma,
    )


def on_devices(on_platform, case, way, params, *examples):
    """Returns what the step gives of examples that are cut over 8 devices."""
    if way in ("shard_map", "shard_map unchecked"):
        return on_platform(shard_mapped(case, way == "shard_map"), params, *examples)
    kind = jax.sharding.AxisType.Explicit if "explicit" in way else jax.sharding.AxisType.Auto
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    examples = jax.device_put(examples, NamedSharding(devices, CASES[case][1]))
    with jax.set_mesh(devices):
        return on_platform(step_of(case), params, *examples)


def assert_equals_one_device(on_platform, case, way, *given):
    on_platform = on_platform if way in OPTIMIZED else on_platform.quickly
    actual, expected = on_devices(on_platform, case, way, *given), alone(case)(*given)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("way", slow_after(1, WAYS))
@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(on_platform, rng, case, way):
    mask = jnp.asarray(rng.random(SHAPE) < 0.7) if MASKED[way] else None
    assert_equals_one_device(on_platform, case, way, *operands(rng), mask)


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if not MASKED[way]])
@pytest.mark.parametrize("case", ["layer_norm, features", "group_norm", "instance_norm"])
def test_offsets_of_1e4_between_devices(on_platform, rng, case, way):
    ramp = jnp.linspace(0, 1e4, SHAPE[1])
    given = operands(rng, ramp if CASES[case][1] == FEATURES else ramp[:, None])
    assert_equals_one_device(on_platform, case, way, *given, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case != "rms_norm, features" and ", " not in case]
)
def test_examples_on_different_devices_do_not_talk(rng, case):
    """With sharded examples, layers with statistics of each example compile to no collective."""
    layer, _ = CASES[case]
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, _, _ = operands(rng)
    x = jax.device_put(
        jnp.ones((2 * DEVICES, 16, 16)), NamedSharding(devices, PartitionSpec("data"))
    )
    compiled = (
        jax.jit(lambda params, x: layer(params, {}, x, True)[0])
        .lower(params, x)
        .compile(AS_FOR_USERS)
    )
    assert collectives(compiled) == []


def renorm(params, batch_stats, x, **settings):
    """Returns y and the new statistics, and the gradient of x."""

    def loss(x):
        y, new = nj.batch_renorm(
            params, batch_stats, x, True, r_max=1.5, d_max=0.3, momentum=0.9, **settings
        )
        return jnp.sum(jnp.tanh(y)), (y, new)

    dx, outcome = jax.grad(loss, has_aux=True)(x)
    return *outcome, dx


@cache
def synced_renorm(check_vma):
    whole, cut = PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(
        partial(renorm, axis_name="data"),
        mesh=mesh(data=DEVICES),
        in_specs=(whole, whole, cut),
        out_specs=(cut, whole, cut),
        check_vma=check_vma,
    )


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_batch_renorm_equals_one_device(on_platform, rng, check_vma):
    params, batch_stats = nj.batch_renorm_init(4)
    batch_stats["mean"] += 0.5
    x = jnp.asarray(rng.normal(1, 2, (4 * DEVICES, 5, 4)), jnp.float32)
    given = params, batch_stats, x
    y, new, dx = on_platform(synced_renorm(check_vma), *given)
    expected, expected_new, expected_dx = jax.jit(renorm)(*given)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(new, expected_new, rtol=1e-5)
    assert_close(dx, expected_dx, atol=1e-5)
    assert np.abs(expected - nj.batch_norm(*given, True)[0]).max() > 0.1
