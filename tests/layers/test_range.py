"""Large and small numbers: y and gradients are right wherever float32 holds the statistics.

The batch's variance goes into the running one, so it must fit float32. Nothing stores that of an
example, only its deviation must.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, widest
from tests.platforms import Platform

EPSILON = 1e-5
SHAPE = (6, 5, 4)
SCALES = [1e-25, 1e-10, 1e3, 1e13, 1e18, 1e25]
LARGEST = {True: 1e18, False: 1e25}  # for layers with running statistics, and without


def with_state(layer, **settings):
    def apply(x, train=True):
        batch_stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
        return layer({}, batch_stats, x, train, **settings)[0]

    return apply


def stateless(layer, **settings):
    return lambda x: layer({}, {}, x, True, epsilon=EPSILON, **settings)[0]


# Each with the axes of its statistics, and whether it subtracts the mean.
LAYERS = {
    "batch_norm": (with_state(nj.batch_norm), (0, 1), True),
    "batch_norm of ghosts": (with_state(nj.batch_norm, virtual_batch_size=6), (0, 1), True),
    "batch_renorm": (with_state(nj.batch_renorm, r_max=1.0, d_max=0.0), (0, 1), True),
    "activated_batch_norm": (
        with_state(nj.activated_batch_norm, activation="identity"),
        (0, 1),
        True,
    ),
    "layer_norm": (stateless(nj.layer_norm), (2,), True),
    "rms_norm": (stateless(nj.rms_norm), (2,), False),
    "group_norm": (stateless(nj.group_norm, num_groups=1), (1, 2), True),
    "instance_norm": (stateless(nj.instance_norm), (1,), True),
    "filter_response_norm": (stateless(nj.filter_response_norm), (1,), False),
}


def fits(name, scale):
    return scale <= LARGEST["batch" in name]


def formula(x, axes, centered):
    x = widest(x)
    x = x - x.mean(axes, keepdims=True) * centered
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + EPSILON)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_y_is_that_of_the_formula(on_platform, rng, name, dtype):
    apply, axes, centered = LAYERS[name]
    numbers = rng.normal(0.3, 1, SHAPE)
    run = on_platform.compiled(apply, jnp.asarray(numbers, dtype))
    precision = 1e-5 if dtype == jnp.float32 else 1e-2
    for scale in (scale for scale in SCALES if fits(name, scale)):
        x = jnp.asarray(scale * numbers, dtype)
        expected = formula(x, axes, centered)
        assert_close(run(x), expected, atol=precision * np.abs(expected).max(), case=scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_scale_with_the_inverse_of_x(on_platform, rng, name):
    apply, _, _ = LAYERS[name]
    x, weight = (jnp.asarray(rng.normal(0.3, 1, SHAPE), jnp.float32) for _ in range(2))
    gradient = jax.grad(lambda x: jnp.sum(weight * apply(x)))
    run = on_platform.compiled(gradient, x)
    expected = widest(run(x * 1e3)) * 1e3
    for scale in (1e6, 1e12, 1e13, 1e17) if "batch" in name else (1e6, 1e12, 1e17, 1e19, 1e25):
        actual = widest(run(x * np.float32(scale))) * scale
        assert_close(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_finite(on_platform, rng, name):
    apply, _, _ = LAYERS[name]
    x, v = (jnp.asarray(rng.normal(0.3, 1, SHAPE), jnp.float32) for _ in range(2))

    def curvature(x):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(apply(x))))
        return jax.jvp(gradient, (x,), (v,))[1], jax.grad(lambda x: jnp.vdot(gradient(x), v))(x)

    forward, reverse = on_platform.quickly(curvature, x)
    assert_close(forward, reverse, atol=1e-4 * float(jnp.abs(reverse).max()))


@pytest.mark.slow
def test_a_sum_of_squares_may_overflow_where_their_mean_does_not(on_platform):
    x = jnp.tile(jnp.array([[-1e17], [1e17]]), (50_000, 1))  # variance 1e34, sum 1e39

    def step(x):
        batch_stats = nj.batch_norm_init(1)[1]
        return nj.batch_norm({}, batch_stats, x, True, momentum=0.0)

    y, new = on_platform(step, x)
    assert_close(y[:2].ravel(), [-1, 1], rtol=1e-6)
    assert_close(new["var"], [1e34], rtol=1e-5)


@pytest.mark.slow
def test_of_a_variance_that_float32_cannot_hold_y_is_the_bias(on_platform):
    x = jnp.array([[-1e20], [1e20]])

    def step(x):
        return nj.batch_norm({"bias": jnp.ones(1)}, nj.batch_norm_init(1)[1], x, True)

    y, new = on_platform(step, x)
    assert_close(y.ravel(), [1, 1])
    assert np.isinf(new["var"]).all() and np.isfinite(new["mean"]).all()
    _, kept = nj.batch_norm({}, nj.batch_norm_init(1)[1], x, True, skip_nonfinite=True)
    assert_close(kept["var"], [1.0])


def test_small_squares_count_in_float64():
    """A deviation of 1e-6 beside an epsilon of 1e-3: its square is 1e-9 of epsilon."""
    x = np.float64([[1.0, 1.0 + 2e-6]])
    with jax.enable_x64(True):
        y, _ = jax.jit(lambda x: nj.layer_norm({}, {}, x, True, epsilon=1e-3))(x)
        var = Platform("cuda")(
            partial(nj.batch_norm, train=True, momentum=0.0, epsilon=1e-3),
            {},
            nj.batch_norm_init(1, param_dtype=jnp.float64)[1],
            jnp.asarray(x.T),
        )[1]["var"]
    root = np.sqrt(x.var() + 1e-3)
    assert_close(y[0, 1], (x[0, 1] - x.mean()) / root, rtol=1e-9)
    assert_close(var, [x.var()], rtol=1e-9)
