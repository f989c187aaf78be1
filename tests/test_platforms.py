"""The fixture that runs each platform's program does run it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.compare import assert_identical
from tests.contract.layers import FEATURES, LAYERS, SHAPE
from tests.distributed.mapped import DEVICES, SPLIT, WHOLE, mesh
from tests.platforms import PLATFORMS, Platform


def times_its_number(x):
    """x times 1 on a CPU, 2 on CUDA, 3 on ROCm, 4 on a TPU."""
    branches = {name: lambda x, n=n: x * n for n, name in enumerate(PLATFORMS, 1)}
    return lax.platform_dependent(x, **branches)


def twice(x):
    return x + x


def test_it_runs_the_platforms_branch_and_its_gradient(on_platform):
    number = PLATFORMS.index(on_platform.name) + 1
    y, slope = on_platform(jax.value_and_grad(times_its_number), jnp.float32(10.0))
    assert (y, slope) == (10 * number, number)


def test_a_program_runs_on_several_arguments(on_platform):
    double = on_platform.compiled(twice, jnp.arange(3.0))
    assert_identical(double(jnp.ones(3)), jnp.full(3, 2.0))
    assert_identical(double(jnp.zeros(3)), jnp.zeros(3))


@pytest.mark.slow
def test_arguments_may_be_trees_of_any_dtype(on_platform):
    key = jax.random.key(3)
    given = {"key": key, "nothing": None, "numpy": np.float32([1, 2])}
    given |= {"half": jnp.ones(2, jnp.bfloat16), "complex": jnp.full(2, 1j, jnp.complex64)}
    returned = on_platform(lambda tree: tree, given)
    assert jax.random.key_data(returned.pop("key")).tolist() == [0, 3]
    del given["key"]
    assert_identical(returned, jax.tree.map(jnp.asarray, given))
    with jax.enable_x64(True):
        assert_identical(on_platform(twice, jnp.arange(3.0)), 2 * jnp.arange(3.0))


@pytest.mark.parametrize("way", ["shard_map", "pmap", "vmap"])
def test_it_maps_over_devices(on_platform, way):
    def ours(x):
        return times_its_number(lax.psum(x, "data"))

    if way == "shard_map":
        mapped = jax.shard_map(ours, mesh=mesh(data=DEVICES), in_specs=SPLIT, out_specs=WHOLE)
    else:
        mapped = getattr(jax, way)(ours, axis_name="data")
    y = on_platform(mapped, jnp.arange(8.0))
    assert (np.asarray(y) == 28 * (PLATFORMS.index(on_platform.name) + 1)).all()


def test_arguments_may_lie_on_an_explicit_mesh(on_platform):
    devices = jax.make_mesh((DEVICES,), ("data",))
    x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(devices, SPLIT))
    with jax.set_mesh(devices):
        total = on_platform(lambda x: times_its_number(x.sum()), x)
    assert total == 28 * (PLATFORMS.index(on_platform.name) + 1)


@pytest.mark.slow
def test_equal_programs_are_compiled_once_and_others_apart():
    x = jnp.arange(3.0)
    cuda, rocm = (Platform(name).compiled(twice, x) for name in ("cuda", "rocm"))
    assert cuda is rocm
    cuda, rocm = (Platform(name).compiled(times_its_number, x) for name in ("cuda", "rocm"))
    assert cuda is not rocm


@pytest.mark.slow
def test_constants_of_equal_shape_are_not_mixed_up(on_platform):
    for factor in (jnp.arange(3.0), jnp.arange(3.0) + 1, np.float32([5, 6, 7])):
        assert_identical(on_platform(lambda x: x * factor, jnp.ones(3)), jnp.asarray(factor))  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=[layer.name for layer in LAYERS])
def test_programs_for_rocm_are_those_for_cuda(layer):
    """So tests of many cases run those for CUDA alone: see conftest.py."""
    params, batch_stats = layer.init(FEATURES)
    settings = next(iter(layer.settings.values()))

    def loss(params, x):
        y, new = layer.apply(params, batch_stats, x, True, **settings)
        return jnp.sum(y**2), new

    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    cuda, rocm = (
        Platform(name).compiled(gradients, params, jnp.ones(SHAPE)) for name in ("cuda", "rocm")
    )
    assert cuda is rocm
