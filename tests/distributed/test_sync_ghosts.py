"""Ghost batches under `axis_name`: each device has its own, and the running statistics are of all.

So they are what plain jit makes of the whole batch.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import normjax as nj
from tests.compare import assert_close, assert_trees_close
from tests.distributed.mapped import (
    DEVICES,
    SPLIT,
    WHOLE,
    assert_steps_close,
    collectives,
    mesh,
    operands,
    stacked,
)

SIZE = 2  # of the 4 examples of each device
LAYERS = {
    "batch_norm": partial(nj.batch_norm, momentum=0.9),
    "batch_renorm": partial(nj.batch_renorm, r_max=1.5, d_max=0.3, running_var="unbiased"),
    "activated_batch_norm": partial(nj.activated_batch_norm, momentum=0.9),
}
MASKED, UNMASKED = (False, True), "activated_batch_norm"  # which takes no mask
each_layer = pytest.mark.parametrize("name", LAYERS)


@cache
def step(name):
    """y, new statistics, and the gradients of params and x."""

    def run(params, batch_stats, x, weight, mask, **settings):
        if mask is not None:
            settings["mask"] = mask

        def loss(params, x):
            y, new = LAYERS[name](params, batch_stats, x, True, virtual_batch_size=SIZE, **settings)
            return jnp.sum(weight * y), (y, new)

        (d_params, dx), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, new, d_params, dx

    return run


@cache
def mapped(name, check_vma):
    def run(*given):
        y, new, d_params, dx = step(name)(*given, axis_name="data")
        return y, new, d_params if check_vma else lax.psum(d_params, "data"), dx

    return jax.shard_map(
        run,
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT, SPLIT),
        out_specs=(SPLIT, WHOLE, WHOLE, SPLIT),
        check_vma=check_vma,
    )


def given(name, rng, masked, offset=0.0):
    mask = rng.random((4 * DEVICES, 5, 1)) < 0.5 if masked else None
    if masked:
        mask[:8] = False  # two devices have nothing
    params, batch_stats, *examples = operands(rng, mask=mask, offset=offset)
    if name == "batch_renorm":
        batch_stats["count"] = jnp.int32(3)
    return params, batch_stats, *examples


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, masked) for name in LAYERS for masked in MASKED if not (masked and name == UNMASKED)],
)
def test_shard_map_gives_what_plain_jit_gives(on_platform, rng, name, masked, check_vma):
    arguments = given(name, rng, masked)
    # For CPUs the checked one alone is compiled as for users.
    on_platform = on_platform if check_vma else on_platform.quickly
    found = on_platform(mapped(name, check_vma), *arguments)
    assert_steps_close(found, jax.jit(step(name))(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
@each_layer
def test_pmap_and_vmap_give_the_same(rng, name, transform):
    params, batch_stats, x, *_ = given(name, rng, False)
    layer = partial(LAYERS[name], train=True, virtual_batch_size=SIZE)
    run = transform(partial(layer, params, batch_stats, axis_name="data"), axis_name="data")
    y, new = run(x=stacked(x))
    expected, expected_new = layer(params, batch_stats, x)
    assert_close(np.reshape(y, x.shape), expected, rtol=1e-5, atol=1e-5)
    for device in range(DEVICES):
        own = jax.tree.map(lambda leaf, device=device: leaf[device], new)
        assert_trees_close(own, expected_new, rtol=1e-5)


@pytest.mark.slow
@each_layer
def test_groups_share_the_running_statistics_of_their_ghosts(rng, name):
    params, batch_stats, x, *_ = given(name, rng, False)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    layer = partial(LAYERS[name], train=True, virtual_batch_size=SIZE)
    run = partial(layer, params, batch_stats, axis_name="data", axis_index_groups=groups)
    _, new = jax.pmap(run, axis_name="data")(stacked(x))
    for half in (0, 1):
        _, expected = layer(params, batch_stats, x[16 * half : 16 * half + 16])
        own = jax.tree.map(lambda leaf, half=half: leaf[4 * half], new)
        assert_trees_close(own, expected, rtol=1e-5)


def test_far_from_zero_the_running_variance_is_right(rng):
    """The means of ghosts are rounded: at 1e3 by 3e-5, which is the error of their spread."""
    params, batch_stats, x, *_ = given("batch_norm", rng, False, offset=1e3)
    run = partial(
        nj.batch_norm, train=True, virtual_batch_size=SIZE, momentum=0.0, axis_name="data"
    )
    _, new = jax.pmap(partial(run, params, batch_stats), axis_name="data")(stacked(x))
    assert_close(new["var"][0], np.float64(x).var((0, 1)), rtol=1e-4)


def test_one_value_in_each_ghost_is_refused_however_many_devices_there_are(rng):
    params, batch_stats, x, *_ = given("batch_norm", rng, False)
    run = partial(nj.batch_norm, train=True, virtual_batch_size=1, axis_name="data")
    with pytest.raises(ValueError, match="one value per feature"):
        jax.vmap(partial(run, params, batch_stats), axis_name="data")(stacked(x[:, 0]))


@pytest.mark.slow
def test_y_waits_for_no_other_device(rng):
    """All that is sent are the moments for the running statistics, once, and nothing backward."""
    params, batch_stats, x, *_ = given("batch_norm", rng, False)

    def run(x):
        layer = partial(nj.batch_norm, params, batch_stats, train=True, virtual_batch_size=SIZE)
        dx = jax.grad(lambda x: jnp.sum(layer(x=x, axis_name="data")[0] ** 2))(x)
        return dx, layer(x=x, axis_name="data")[1]

    compiled = jax.pmap(run, axis_name="data").lower(stacked(x)).compile()
    assert [size for _, size in collectives(compiled)] == [DEVICES * 9]
