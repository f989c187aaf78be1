"""Real weights in place of a mask: an element of weight w counts as w elements."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close, widest

SHAPE = (6, 3, 4)
PARAMS = {"scale": jnp.array([1.0, -2.0, 0.5, 1.5]), "bias": jnp.array([0.0, 1.0, -1.0, 0.5])}
STATE = {"mean": jnp.full(4, 0.25), "var": jnp.full(4, 2.0)}


def with_state(layer, **settings):
    def apply(params, x, mask):
        state = {leaf: value.astype(x.dtype) for leaf, value in STATE.items()}
        return layer(params, state, x, True, mask=mask, momentum=0.5, **settings)

    return apply


def stateless(layer, **settings):
    return lambda params, x, mask: layer(params, {}, x, True, mask=mask, **settings)


LAYERS = {
    "batch_norm": with_state(nj.batch_norm),
    "batch_norm of ghosts": with_state(nj.batch_norm, virtual_batch_size=3),
    "batch_renorm": with_state(nj.batch_renorm),
    "layer_norm": stateless(nj.layer_norm),
    "rms_norm": stateless(nj.rms_norm),
    "group_norm": stateless(nj.group_norm, num_groups=2),
    "instance_norm": stateless(nj.instance_norm),
    "filter_response_norm": stateless(nj.filter_response_norm),
    "global_response_norm": stateless(nj.global_response_norm),
    "group_norm along time": stateless(nj.group_norm, num_groups=2, cumulative_axis=1),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(0.5, 2, SHAPE), jnp.float32)


@pytest.fixture
def weights(rng):
    drawn = rng.uniform(0.1, 3, SHAPE)
    return jnp.asarray(np.where(np.arange(72).reshape(SHAPE) % 5 > 0, drawn, 0), jnp.float32)


@each_layer
def test_weights_of_zero_and_one_are_a_mask(on_platform, x, weights, name):
    mask = weights > 0
    x = jnp.where(mask, x, jnp.nan)
    run = functools.partial(LAYERS[name], PARAMS)
    assert_trees_close(
        on_platform(run, x, mask.astype(jnp.float32)), on_platform(run, x, mask), atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moments_are_those_of_repeated_elements(on_platform, rng, dtype):
    x = jnp.asarray(rng.normal(3, 1, (8, 2)), dtype)
    times = rng.integers(0, 4, 8)
    repeated = widest(x).repeat(times, 0)
    moments = on_platform(
        lambda x, w: nj.moments(x, 0, mask=w), x, jnp.asarray(times[:, None], dtype)
    )
    assert_close(moments.count, np.full(2, times.sum()))
    assert_close(moments.mean, repeated.mean(0), rtol=1e-6)
    assert_close(moments.var, repeated.var(0), rtol=1e-5)


@pytest.mark.slow
def test_the_unit_of_the_weights_does_not_matter(on_platform, x, weights):
    def y(weights):
        return LAYERS["batch_norm"](PARAMS, x, weights)[0]

    run = on_platform.compiled(y, weights)
    assert_close(run(weights * 2**-10), run(weights), atol=1e-5)


@pytest.mark.slow
def test_merged_parts_are_the_whole(x, weights):
    whole = nj.moments(x, (0, 1), mask=weights)
    parts = [nj.moments(x[part], (0, 1), mask=weights[part]) for part in (slice(2), slice(2, 6))]
    assert_trees_close(nj.merge_moments(*parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_synced_over_devices_they_are_those_of_the_whole_batch(on_platform, rng):
    x = jnp.asarray(rng.normal(1, 2, (8, 5, 4)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0, 2, (8, 5, 1)), jnp.float32)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.PartitionSpec("devices")

    def step(x, weights):
        y, new = nj.batch_norm(PARAMS, STATE, x, True, mask=weights, axis_name="devices")
        return y, new

    synced = jax.shard_map(
        step, mesh=mesh, in_specs=split, out_specs=(split, jax.sharding.PartitionSpec())
    )
    whole = nj.batch_norm(PARAMS, STATE, x, True, mask=weights)
    assert_trees_close(on_platform(synced, x, weights), whole, atol=2e-6)


@pytest.mark.slow
@each_layer
def test_gradients_by_x_and_by_the_weights_are_those_of_differences(x, weights, name):
    """In float64, where differences are exact enough to compare with."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
        given = jnp.asarray(x, jnp.float64), jnp.asarray(weights, jnp.float64)
        rng = np.random.default_rng(1)
        directions = [jnp.asarray(rng.normal(size=SHAPE)) for _ in given]
        directions[1] *= weights > 0

        def loss(x, weights):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in
                       jax.tree.leaves(LAYERS[name](params, x, weights)))  # fmt: skip

        forward = jax.jit(lambda *given: jax.jvp(loss, given, tuple(directions))[1])(*given)
        grads = jax.jit(jax.grad(loss, (0, 1)))(*given)
        reverse = sum(jnp.vdot(a, b) for a, b in zip(grads, directions, strict=True))
        step = 1e-6
        moved = [
            [g + s * step * d for g, d in zip(given, directions, strict=True)] for s in (1, -1)
        ]
        difference = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        if name != "batch_renorm":  # whose r and d are constants to the derivative
            assert_close(forward, difference, rtol=1e-6)
        assert_close(reverse, forward, rtol=1e-9)
        hidden = jnp.broadcast_to(weights, SHAPE) == 0
        assert_identical(grads[1][hidden], jnp.zeros(int(hidden.sum())))


@each_layer
def test_nothing_counts_where_all_weights_are_zero(on_platform, x, weights, name):
    run = functools.partial(LAYERS[name], PARAMS)
    zero = jnp.zeros_like(weights)
    assert_trees_close(on_platform(run, x, zero), on_platform(run, x, zero > 0), atol=1e-6)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_a_weight_that_is_none_is_named(x, wrong):
    weights = np.ones(SHAPE, np.float32)
    weights[0, 0, 0] = wrong
    with pytest.raises(
        ValueError, match=f"batch_norm: mask contains weights.*the first of them {wrong}"
    ):
        nj.batch_norm(PARAMS, STATE, x, True, mask=weights)


@pytest.mark.slow
def test_both_adapters_take_weights(x, weights, promotion_as_in_flax):
    from flax import nnx

    variables = {"params": PARAMS, "batch_stats": STATE}
    norm = nj.linen.BatchNorm(use_running_average=False, momentum=0.5)
    y, new = norm.apply(variables, x, mask=weights, mutable=["batch_stats"])
    expected = LAYERS["batch_norm"](PARAMS, x, weights)
    assert_trees_close((y, new["batch_stats"]), expected, atol=1e-6)
    module = nj.nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
    for leaf, value in (PARAMS | STATE).items():
        getattr(module, leaf).set_value(value)
    assert_close(module(x, mask=weights), expected[0], atol=1e-6)
    assert_close(module.var[...], expected[1]["var"], atol=1e-6)
