"""Flax adapters on x with one axis cut over Explicit axes of a mesh give what one device gives."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType

import normjax as nj
from tests.compare import assert_trees_close
from tests.contract.cases import REORDERED
from tests.distributed.test_sharded_axes import cut, line
from tests.marks import slow_after

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
FEATURES = 4
SHAPE = (6, 3, FEATURES)
SETTINGS = {
    "BatchNorm": {"use_running_average": False},
    "BatchRenorm": {"use_running_average": False},
    "GroupNorm": {"num_groups": 2},
}
WRAPPERS = ("SpectralNorm", "WeightNorm", "WeightStandardization")
NAMES = [name for name in nj.linen.__all__ if name not in WRAPPERS]
CUTS = [(0, 2), (1, 3), (2, 4)]  # the axis, over how many devices


def with_linen(name):
    layer = getattr(nj.linen, name)(**SETTINGS.get(name, {}))
    variables = layer.init(jax.random.key(0), jnp.ones(SHAPE))
    return lambda x: layer.apply(variables, x, mutable=["batch_stats"])


def with_nnx(name):
    layer = getattr(nj.nnx, name)(FEATURES, **SETTINGS.get(name, {}), rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def run(x):
        layer = nnx.merge(graph, state, copy=True)
        return layer(x), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return run


def in_turn():
    """Every cut of each layer with both adapters: one of them under vmap, by turns."""
    for place, name in enumerate(NAMES):
        for turn, cut_axis in enumerate(CUTS):
            for adapter in (with_linen, with_nnx):
                vmapped = (place + turn + (adapter is with_nnx)) % 2 == 1
                named = f"{adapter.__name__}-{name}-{vmapped}-{cut_axis}"
                yield pytest.param(adapter, name, vmapped, *cut_axis, id=named)


@cache
def run_and_given(adapter, name, vmapped):
    """A function, its argument, and what it gives on one device."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    run = jax.vmap(adapter(name)) if vmapped else adapter(name)
    given = jnp.stack([x, 2 * x]) if vmapped else x
    return run, given, jax.jit(run)(given)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "name", "vmapped", "axis", "devices"), [*in_turn()])
def test_x_with_an_axis_cut(adapter, name, vmapped, axis, devices):
    run, given, expected = run_and_given(adapter, name, vmapped)
    mesh = line(devices, AxisType.Explicit)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(cut(given, axis + vmapped, mesh))
    assert_trees_close(jax.device_get(found), jax.device_get(expected), **REORDERED)


def linen_wrapper(name):
    given = {"variable_filter": {"kernel"}} if name != "SpectralNorm" else {}
    layer = getattr(nj.linen, name)(linen.Dense(FEATURES), **given)
    training = {"update_stats": True} if name == "SpectralNorm" else {}
    variables = layer.init(jax.random.key(0), jnp.ones((2, 8)), **training)
    return variables, lambda variables, x: layer.apply(
        variables, x, mutable=["batch_stats"], **training
    )


def nnx_wrapper(name):
    layer = getattr(nj.nnx, name)(nnx.Linear(8, FEATURES, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def run(state, x):
        layer = nnx.merge(graph, state, copy=True)
        return layer(x), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return state, run


@pytest.mark.parametrize("axis", slow_after(1, [0, 1]))
@pytest.mark.parametrize("name", slow_after(1, WRAPPERS))
@pytest.mark.parametrize("adapter", [linen_wrapper, nnx_wrapper])
def test_kernels_with_an_axis_cut(rng, adapter, name, axis):
    variables, run = adapter(name)
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    expected = jax.jit(run)(variables, x)
    mesh = line(2, AxisType.Explicit)

    def placed(leaf):
        is_kernel = leaf.ndim == 2 and leaf.shape[0] > 1
        return cut(leaf, axis, mesh) if is_kernel else cut(leaf, 0, mesh)

    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.tree.map(placed, variables), x)
    assert_trees_close(jax.device_get(found), jax.device_get(expected), **REORDERED)
