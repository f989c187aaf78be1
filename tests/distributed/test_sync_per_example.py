"""Layers whose statistics are each example's own, on examples that are cut over 8 devices; and batch renorm, synced."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import normjax as nj
from tests.compare import assert_close, assert_finite
from tests.distributed.mapped import DEVICES, collectives, mesh

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


def shard_mapped(layer, cut, mask, check_vma):
    own = PartitionSpec("data") if cut == FEATURES else PartitionSpec()

    def run(params, x, weight, mask):
        y, d_params, dx = step(layer, params, x, weight, mask, axis_name="data")
        return y, d_params if check_vma or cut == FEATURES else lax.psum(d_params, "data"), dx

    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh(data=DEVICES),
            in_specs=(own, cut, cut, cut),
            out_specs=(cut, own, cut),
            check_vma=check_vma,
        )
    )


def jitted(layer, cut, mask, kind):
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))

    def run(params, x, weight, mask):
        placed = jax.tree.map(
            lambda a: jax.device_put(a, NamedSharding(devices, cut)), (x, weight, mask)
        )
        with jax.set_mesh(devices):
            return jax.jit(partial(step, layer))(params, *placed)

    return run


WAYS = {
    "shard_map": partial(shard_mapped, check_vma=True),
    "shard_map unchecked": partial(shard_mapped, check_vma=False),
    "jit": partial(jitted, kind=jax.sharding.AxisType.Auto),
    "jit explicit": partial(jitted, kind=jax.sharding.AxisType.Explicit),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_equals_one_device(rng, case, way, masked):
    layer, cut = CASES[case]
    params, x, weight = operands(rng)
    mask = jnp.asarray(rng.random(SHAPE) < 0.7) if masked else None
    expected = jax.jit(partial(step, layer))(params, x, weight, mask)
    actual = WAYS[way](layer, cut, mask)(params, x, weight, mask)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["layer_norm, features", "group_norm", "instance_norm"])
def test_offsets_of_1e4_between_devices(rng, case, way):
    layer, cut = CASES[case]
    ramp = jnp.linspace(0, 1e4, SHAPE[1])
    params, x, weight = operands(rng, ramp if cut == FEATURES else ramp[:, None])
    expected = jax.jit(partial(step, layer))(params, x, weight, None)
    actual = WAYS[way](layer, cut, None)(params, x, weight, None)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "case", ["layer_norm", "group_norm", "instance_norm", "filter_response_norm"]
)
def test_examples_on_different_devices_do_not_talk(rng, case):
    """Cut over the examples, no layer with statistics of each example compiles to any collective."""
    layer, _ = CASES[case]
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, _, _ = operands(rng)
    x = jax.device_put(
        jnp.ones((2 * DEVICES, 16, 16)), NamedSharding(devices, PartitionSpec("data"))
    )
    compiled = jax.jit(lambda params, x: layer(params, {}, x, True)[0]).lower(params, x).compile()
    assert collectives(compiled) == []


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_batch_renorm_equals_one_device(rng, check_vma):
    params, batch_stats = nj.batch_renorm_init(4)
    batch_stats["mean"] += 0.5
    x = jnp.asarray(rng.normal(1, 2, (4 * DEVICES, 5, 4)), jnp.float32)
    apply = partial(nj.batch_renorm, r_max=1.5, d_max=0.3)
    whole, cut = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        lambda params, batch_stats, x: apply(params, batch_stats, x, True, axis_name="data"),
        mesh=mesh(data=DEVICES),
        in_specs=(whole, whole, cut),
        out_specs=(cut, whole),
        check_vma=check_vma,
    )
    y, new = jax.jit(mapped)(params, batch_stats, x)
    expected, expected_new = apply(params, batch_stats, x, True)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for leaf in new:
        assert_close(new[leaf], expected_new[leaf], rtol=1e-5)
    assert_finite(jax.grad(lambda x: jnp.sum(jnp.tanh(mapped(params, batch_stats, x)[0])))(x))
    assert np.abs(expected - nj.batch_norm(params, batch_stats, x, True)[0]).max() > 0.1
