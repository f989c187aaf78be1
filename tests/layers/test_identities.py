"""Layers that are special cases of each other agree; batch renorm against a manual formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.layers.cases import draw_normal, small

EPS = float(jnp.finfo(jnp.float32).eps)
EPSILON = 1e-3


def assert_same_function(rng, left, right, *arguments, roundings=64):
    """Equal outputs, and equal gradients of all arguments for a random cotangent."""
    cotangent = jnp.asarray(draw_normal(rng, arguments[-1].shape, np.float32))

    def run(function, arguments, cotangent):
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(cotangent)

    both = jax.jit(lambda *given: (run(left, *given), run(right, *given)))
    (y, grads), (expected, expected_grads) = both(arguments, cotangent)
    assert_close(
        y, expected, rtol=roundings * EPS, atol=roundings * EPS * float(jnp.abs(expected).max())
    )
    # Sums over x, of terms of about the largest of them.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    assert_trees_close(grads, expected_grads, rtol=roundings * EPS, atol=roundings * EPS * largest)


def layer(apply, train=True, **settings):
    return lambda params, x: apply(params, {}, x, train, epsilon=EPSILON, **settings)[0]


def affine_and_x(rng, shape):
    params, _, x = small(rng, shape)
    return params, x


SHAPES = [(4, 6), (3, 5, 6), (2, 3, 4, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_over_an_example_is_group_norm_with_one_group(rng, shape):
    axes = tuple(range(1, len(shape)))
    one_group, all_of_it = (
        layer(nj.group_norm, num_groups=1),
        layer(nj.layer_norm, reduction_axes=axes),
    )
    assert_same_function(rng, one_group, all_of_it, *affine_and_x(rng, shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("groups", [{"group_size": 1}, {"num_groups": 6}], ids=str)
def test_instance_norm_is_group_norm_with_one_channel_a_group(rng, shape, groups):
    assert_same_function(
        rng, layer(nj.group_norm, **groups), layer(nj.instance_norm), *affine_and_x(rng, shape)
    )


@pytest.mark.slow
def test_group_norm_over_everything_is_layer_norm_over_everything(rng):
    group = layer(nj.group_norm, num_groups=1, reduction_axes=(0, 1, 2))
    assert_same_function(
        rng, group, layer(nj.layer_norm, reduction_axes=(0, 1, 2)), *affine_and_x(rng, (3, 4, 6))
    )


@pytest.mark.slow
def test_group_norm_is_layer_norm_of_each_run_of_channels(rng):
    def by_layer_norm(params, x):
        runs = x.reshape(3, 4, 2, 3)
        y = layer(nj.layer_norm, reduction_axes=(1, 3))({}, runs).reshape(x.shape)
        return params["scale"] * y + params["bias"]

    assert_same_function(
        rng, layer(nj.group_norm, num_groups=2), by_layer_norm, *affine_and_x(rng, (3, 4, 6))
    )


@pytest.mark.slow
def test_instance_norm_is_batch_norm_of_each_example(rng):
    def by_batch_norm(params, x):
        _, batch_stats = nj.batch_norm_init(6)
        return jax.vmap(lambda x: nj.batch_norm(params, batch_stats, x, True, epsilon=EPSILON)[0])(
            x
        )

    assert_same_function(
        rng, layer(nj.instance_norm), by_batch_norm, *affine_and_x(rng, (3, 4, 5, 6))
    )


@pytest.mark.slow
def test_layer_norm_is_batch_norm_with_the_examples_as_features(rng):
    def by_batch_norm(params, x):
        y, _ = nj.batch_norm({}, nj.batch_norm_init(4)[1], x, True, epsilon=EPSILON, feature_axes=0)
        return params["scale"] * y + params["bias"]

    assert_same_function(rng, layer(nj.layer_norm), by_batch_norm, *affine_and_x(rng, (4, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [-1, 1, (1, 2), (0, -1)], ids=str)
def test_layer_norm_is_rms_norm_of_centered_x(rng, axes):
    def by_rms_norm(params, x):
        return layer(nj.rms_norm, reduction_axes=axes)(params, x - x.mean(axes, keepdims=True))

    assert_same_function(
        rng, layer(nj.layer_norm, reduction_axes=axes), by_rms_norm, *affine_and_x(rng, (4, 5, 6))
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_scale_stored_as_its_distance_from_one_is_the_same_rms_norm(rng, with_bias):
    params, x = affine_and_x(rng, (4, 6))
    params = params if with_bias else {"scale": params["scale"]}

    def stored_as_distance(params, x):
        return layer(nj.rms_norm, scale_offset=1.0)(params | {"scale": params["scale"] - 1.0}, x)

    assert_same_function(rng, stored_as_distance, layer(nj.rms_norm), params, x)


@pytest.mark.slow
def test_filter_response_norm_without_threshold_is_rms_norm_over_space(rng):
    over_space = layer(nj.rms_norm, reduction_axes=(1, 2))
    params, x = affine_and_x(rng, (2, 3, 4, 6))
    for leaves in ((), ("scale",), ("scale", "bias")):
        chosen = {leaf: params[leaf] for leaf in leaves}
        assert_same_function(rng, layer(nj.filter_response_norm), over_space, chosen, x)


@pytest.mark.slow
def test_a_threshold_of_zero_is_a_relu_behind_the_norm(rng):
    def relu_behind(params, x):
        rest = {leaf: value for leaf, value in params.items() if leaf != "threshold"}
        return jnp.maximum(layer(nj.filter_response_norm)(rest, x), params["threshold"])

    params, x = affine_and_x(rng, (2, 3, 4, 6))
    params["threshold"] = jnp.zeros(6)
    assert_same_function(rng, layer(nj.filter_response_norm), relu_behind, params, x)


def test_layer_norm_undoes_an_affine_map_of_each_example(rng):
    x = jnp.asarray(draw_normal(rng, (4, 64), np.float32))
    moved = x * jnp.array([[0.5], [2.0], [4.0], [0.25]]) + jnp.array([[1.0], [-2.0], [0.5], [0.0]])
    y, other = (nj.layer_norm({}, {}, v, True, epsilon=1e-10)[0] for v in (x, moved))
    assert_close(y, other, rtol=0, atol=64 * EPS)


def test_local_response_norm_without_a_response_divides_by_a_constant(rng):
    x = jnp.asarray(draw_normal(rng, (2, 3, 6), np.float32))
    for settings, divisor in (
        ({"alpha": 0.0}, 2**0.75),
        ({"beta": 0.0}, 1.0),
        ({"alpha": 0.0, "k": 1.0}, 1.0),
    ):
        y, _ = nj.local_response_norm({}, {}, x, True, **settings)
        assert_close(y, np.float64(x) / divisor, rtol=4 * EPS)


# Batch renorm.


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"virtual_batch_size": 4, "momentum": None, "running_var": "unbiased"},
        {"mask": np.arange(8)[:, None] > 2, "momentum": 0.5},
        {"epsilon": 0.5, "dtype": jnp.bfloat16},
    ],
    ids=["defaults", "ghosts", "masked", "narrow"],
)
def test_batch_renorm_that_may_not_correct_is_batch_norm(rng, settings, train):
    params, batch_stats, x = small(rng, (8, 3))
    batch_stats["count"] = jnp.array(4, jnp.int32)
    never = {"r_max": 1.0, "d_max": 0.0}
    y, new = nj.batch_renorm(params, batch_stats, x, train, **never, **settings)
    expected, expected_new = nj.batch_norm(params, batch_stats, x, train, **settings)
    # Factored otherwise, so rounded otherwise; in bfloat16 that may tip a value to its neighbour.
    output = float(jnp.finfo(y.dtype).eps)
    assert_close(
        y, expected, rtol=8 * output, atol=64 * EPS, dtype=settings.get("dtype", jnp.float32)
    )
    assert_trees_close(new, expected_new, rtol=8 * EPS)

    def loss(apply, extra):
        def value(params, x):
            y, new = apply(params, batch_stats, x, train, **extra, **settings)
            return (
                jnp.sum(y.astype(jnp.float32) ** 3)
                + jnp.sum(new["mean"] ** 2)
                + jnp.sum(new["var"])
            )

        return jax.jit(jax.grad(value, argnums=(0, 1)))(params, x)

    grads, expected_grads = loss(nj.batch_renorm, never), loss(nj.batch_norm, {})
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    assert_trees_close(grads, expected_grads, rtol=8 * output, atol=64 * output * largest)


# Batch mean 2, sqrt(var + 3) = 2; running mean 0, sqrt(var + 3) = 4: unclipped, r = d = 1/2.
TINY_X = np.array([[1.0], [3.0]], np.float32)
TINY_STATS = {"mean": np.zeros(1, np.float32), "var": np.full(1, 13.0, np.float32)}
# r_max = 1 + count / 10, d_max = count / 40, both worked out by hand.
BY_HAND = {
    0: (-0.5, 0.5),
    1: (-0.5 / 1.1 + 0.025, 0.5 / 1.1 + 0.025),
    10: (0.0, 0.5),
    30: (0.25, 0.75),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("count", BY_HAND)
def test_batch_renorm_by_hand_with_the_limits_on_a_schedule(count, jit):
    schedules = {
        "r_max": optax.linear_schedule(1.0, 5.0, 40),
        "d_max": optax.linear_schedule(0.0, 1.0, 40),
    }
    batch_stats = jax.tree.map(jnp.asarray, TINY_STATS | {"count": np.array(count, np.int32)})

    def step(batch_stats, x):
        return nj.batch_renorm({}, batch_stats, x, True, epsilon=3.0, momentum=0.5, **schedules)

    y, new = (jax.jit(step) if jit else step)(batch_stats, jnp.asarray(TINY_X))
    assert_close(y, np.array(BY_HAND[count])[:, None], atol=8 * EPS)
    assert_trees_close(
        new,
        {"mean": np.ones(1), "var": np.full(1, 7.0), "count": np.array(count + 1)},
        rtol=4 * EPS,
    )


@pytest.mark.parametrize(
    ("r_max", "d_max", "mean", "var", "expected"),
    [
        (3.0, 5.0, 0.0, 84.0, (-0.1, 0.5)),  # running std 10, r = 0.5, d = 0.2: as x / 10
        (1.25, 5.0, 0.0, 84.0, (-0.28, 0.68)),  # r at 1/r_max
        (1.0, 0.125, 4.0, 84.0, (-0.725, 0.475)),  # d at -d_max
        (1.125, 0.0, 2.0, 0.0, (-0.675, 0.675)),  # running std 4, r = 1.25 at r_max
        (3.0, 5.0, 2.0, 0.0, (-0.75, 0.75)),
    ],
)
@pytest.mark.parametrize("array", [False, True], ids=["float", "scalar array"])
def test_batch_renorm_by_hand_at_each_limit(r_max, d_max, mean, var, expected, array):
    x = jnp.array([[-1.0], [5.0]])  # mean 2, sqrt(var + 16) = 5
    batch_stats = {
        "mean": jnp.full(1, mean),
        "var": jnp.full(1, var),
        "count": jnp.array(7, jnp.int32),
    }
    limits = (
        {"r_max": jnp.float32(r_max), "d_max": jnp.float32(d_max)}
        if array
        else {"r_max": r_max, "d_max": d_max}
    )
    y, _ = nj.batch_renorm({}, batch_stats, x, True, epsilon=16.0, **limits)
    assert_close(y, np.array(expected)[:, None], atol=8 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unclipped_batch_renorm_trains_on_what_inference_computes(rng, momentum):
    """Ioffe 2017, section 3: with r and d unclipped, y only depends on the running statistics."""
    params, batch_stats, x = small(rng, (16, 3))
    loose = {"r_max": 1e6, "d_max": 1e6}
    y, new = nj.batch_renorm(params, batch_stats, x, True, momentum=momentum, **loose)
    inferred, same = nj.batch_renorm(params, batch_stats, x, False, momentum=momentum, **loose)
    assert_identical(same, batch_stats)
    assert_close(y, inferred, rtol=32 * EPS, atol=32 * EPS * float(jnp.abs(inferred).max()))
    assert (jnp.abs(new["mean"] - batch_stats["mean"]) > 1e-3).all()


@pytest.mark.slow
def test_the_gradient_of_batch_renorm_treats_r_and_d_as_constants(rng):
    params, batch_stats, x = small(rng, (8, 3), mean=0.5)
    cotangent = jnp.asarray(draw_normal(rng, x.shape, np.float32))
    std, old_std = (jnp.sqrt(var + 1e-5) for var in (x.var(0), batch_stats["var"]))
    r, d = std / old_std, (x.mean(0) - batch_stats["mean"]) / old_std

    def renorm(params, x):
        return jnp.sum(
            cotangent * nj.batch_renorm(params, batch_stats, x, True, r_max=1e6, d_max=1e6)[0]
        )

    def constants(params, x):
        normalized = nj.batch_norm({}, batch_stats, x, True)[0]
        return jnp.sum(cotangent * (params["scale"] * (normalized * r + d) + params["bias"]))

    actual, expected = (
        jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (renorm, constants)
    )
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert_trees_close(actual, expected, rtol=64 * EPS, atol=64 * EPS * largest)


@pytest.mark.slow
def test_no_gradient_reaches_the_old_statistics_through_r_and_d(rng):
    params, batch_stats, x = small(rng)

    def loss(mean, var):
        return jnp.sum(
            nj.batch_renorm(params, {"mean": mean, "var": var}, x, True, r_max=1e6, d_max=1e6)[0]
            ** 2
        )

    for grad in jax.grad(loss, argnums=(0, 1))(batch_stats["mean"], batch_stats["var"]):
        assert_close(grad, np.zeros(3))
