"""The variance that others lose: far from zero, on the first step, in half precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference
from tests.compare import assert_close

STARTS = {"zero": 0.0, "near": 9_990.0, "far": -1e5, "opposite": -1e4, "exact": 1e4}
step = partial(nj.batch_norm, train=True, momentum=0.0)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_huge_offset_is_normalized_exactly_wherever_the_running_mean_is(on_platform, rng, start):
    x = rng.normal(1e4, 1, (4096, 8)).astype(np.float32)
    params, batch_stats = nj.batch_norm_init(8)
    batch_stats["mean"] += start
    check_normalized(x, on_platform(step, params, batch_stats, x))


def test_a_huge_offset_is_normalized_exactly_without_jit(rng):
    x = rng.normal(1e4, 1, (4096, 8)).astype(np.float32)
    check_normalized(x, step(*nj.batch_norm_init(8), jnp.asarray(x)))


def check_normalized(x, outcome):
    """Checks y and the batch's statistics of noise around 1e4."""
    y, new = outcome
    expected = reference.moments(x, 0)
    assert_close(np.float64(y).std(0), np.ones(8), atol=1e-3)
    assert_close(new["var"], expected.var, rtol=1e-5)
    # The mean is stored with a relative error of a few roundings.
    assert_close(new["mean"], expected.mean, rtol=4 * float(jnp.finfo(jnp.float32).eps))
    # Normalizing subtracts that rounded mean: an absolute error of a few ulps of 1e4, in units of
    # the deviation, 1.
    assert_close(
        y,
        (x - expected.mean) / np.sqrt(expected.var + 1e-5),
        rtol=1e-5,
        atol=2 * np.spacing(np.float32(1e4)),
    )


@pytest.mark.slow
def test_gradients_survive_a_huge_offset(on_platform, rng):
    noise = rng.normal(0, 1, (64, 3))
    weights = rng.normal(size=(64, 3))

    def grad(x):
        params, batch_stats = nj.batch_norm_init(3)
        weight = jnp.asarray(weights, x.dtype)
        return jax.grad(lambda x: jnp.sum(weight * nj.batch_norm(params, batch_stats, x, True)[0]))(
            x
        )

    x = (1e4 + noise).astype(np.float32)
    with jax.enable_x64(True):
        expected = jax.jit(grad)(jnp.asarray(x, jnp.float64))
    # The mean is off by a few ulps of 1e4 (1e-3), and it enters the gradient times the deviation
    # and the weights.
    assert_close(on_platform(grad, x), np.asarray(expected), atol=4e-3)


@pytest.mark.slow
def test_a_running_mean_that_was_moved_does_not_matter(on_platform, rng):
    x = jnp.asarray(rng.normal(1e4, 1, (1024, 2)), jnp.float32)
    params, batch_stats = nj.batch_norm_init(2)
    run = on_platform.compiled(step, params, batch_stats, x)
    _, batch_stats = run(params, batch_stats, x)
    for shift in (0.0, 20.0, -3e3, 1e6):
        moved = batch_stats | {"mean": batch_stats["mean"] + shift}
        _, new = run(params, moved, x)
        assert_close(new["var"], reference.moments(x, 0).var, rtol=1e-5)


@pytest.mark.slow
def test_float16_near_its_largest_value_is_normalized(on_platform, rng):
    x = (60_000 + 32 * rng.integers(-8, 9, (512, 2))).astype(np.float16)
    y, new = on_platform(step, *nj.batch_norm_init(2), x)
    expected, expected_new = reference.batch_norm(*nj.batch_norm_init(2), x, True, momentum=0.0)
    assert_close(y, expected, rtol=2**-10, atol=1e-4, dtype=jnp.float16)
    assert_close(new["var"], expected_new["var"], rtol=1e-5, dtype=jnp.float32)


@pytest.mark.slow
def test_bfloat16_inputs_are_averaged_in_float32(on_platform):
    # 1 + 1/128 in bfloat16; a bfloat16 sum of 4096 of them stalls at 256.
    x = jnp.tile(jnp.array([[1.0, 1.0078125]], jnp.bfloat16).T, (2048, 1))
    _, new = on_platform(step, *nj.batch_norm_init(1), x)
    assert_close(new["mean"], np.array([1.00390625]), rtol=1e-6, dtype=jnp.float32)
    assert_close(new["var"], np.array([0.00390625**2]), rtol=1e-5, dtype=jnp.float32)


def test_bfloat16_keeps_its_digits_at_evaluation(on_platform):
    batch_stats = {"mean": jnp.full(1, 1000.3, jnp.float32), "var": jnp.ones(1)}
    infer = partial(nj.batch_norm, train=False, epsilon=0.0)
    y, _ = on_platform(infer, {}, batch_stats, jnp.full((1, 1), 1004.0, jnp.bfloat16))
    assert_close(y, np.full((1, 1), 3.7), rtol=2**-8, dtype=jnp.bfloat16)


@pytest.mark.slow
def test_a_constant_feature_gives_the_bias_and_a_finite_gradient(on_platform):
    x = jnp.full((16, 2), 12_345.678, jnp.float32)
    params, batch_stats = nj.batch_norm_init(2)

    def loss(x):
        y, new = step(params, batch_stats, x)
        return jnp.sum(y**2), (y, new)

    dx, (y, new) = on_platform(jax.grad(loss, has_aux=True), x)
    # The mean of equal values is that value up to one ulp (1e-3), which sqrt(1e-5) magnifies by
    # 316.
    assert_close(y, np.zeros((16, 2)), atol=316 * np.spacing(np.float32(12_345)))
    assert (new["var"] >= 0).all()
    assert jnp.isfinite(dx).all()
