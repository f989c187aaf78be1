"""What does not count leaves no trace: masks, empty batches, empty features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_finite, assert_identical, assert_trees_close
from tests.layers.cases import small

EPS = float(jnp.finfo(jnp.float32).eps)
GARBAGE = (np.nan, np.inf, -np.inf, 1e30)


def step(params, batch_stats, x, weights, mask=None, *, train=True, **settings):
    """Returns y, the new statistics, and the derivatives of params, old statistics and x.

    They are those of a weighted sum of y and of the new mean and variance.
    """

    def loss(params, mean, var, x):
        old = batch_stats | {"mean": mean, "var": var}
        y, new = nj.batch_norm(params, old, x, train, mask=mask, **settings)
        return jnp.sum(weights * y) + jnp.sum(new["mean"]) + jnp.sum(new["var"]), (y, new)

    running = batch_stats["mean"], batch_stats["var"]
    derivatives, (y, new) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(params, *running, x)
    return y, new, derivatives[:3], derivatives[3]


@pytest.mark.parametrize("train", [True, False])
def test_masked_elements_leave_no_trace_whatever_they_hold(on_platform, rng, train):
    params, batch_stats, x = small(rng, (12, 3))
    kept = jnp.asarray(rng.permutation(12) < 7)
    weights = jnp.where(kept[:, None], jnp.asarray(rng.normal(size=x.shape), jnp.float32), 0)
    masked = params, batch_stats, x, weights, kept[:, None]
    run = on_platform.compiled(partial(step, train=train), *masked)
    alone = params, batch_stats, x[kept], weights[kept]
    clean, clean_new, clean_gradients, clean_dx = on_platform(partial(step, train=train), *alone)
    for garbage in GARBAGE:
        dirty = jnp.where(kept[:, None], x, jnp.float32(garbage))
        y, new, gradients, dx = run(params, batch_stats, dirty, *masked[3:])
        assert_finite((y, new))
        assert_close(y[kept], clean, atol=32 * EPS)
        assert_trees_close(new, clean_new, rtol=32 * EPS)
        assert_trees_close(gradients, clean_gradients, rtol=64 * EPS, atol=64 * EPS)
        assert_close(dx[kept], clean_dx, atol=64 * EPS)
        assert_close(dx[~kept], np.zeros((5, 3)))


def test_where_a_masked_element_is_not_finite_y_is_the_bias(on_platform, rng):
    params, batch_stats, x = small(rng)
    x = x.at[:2].set(jnp.array([[jnp.nan], [jnp.inf]]))
    mask = (jnp.arange(8) > 2)[:, None]

    def in_both_modes(*given):
        return [nj.batch_norm(*given, train, mask=mask)[0] for train in (True, False)]

    for y in on_platform(in_both_modes, params, batch_stats, x):
        assert_close(y[:2], np.tile(params["bias"], (2, 1)), atol=8 * EPS)


@pytest.mark.slow
def test_garbage_in_masked_elements_poisons_no_second_derivative(on_platform, rng):
    params, batch_stats, x = small(rng, (4, 2))
    mask = (jnp.arange(4) > 0)[:, None]

    def hessian(x):
        def loss(x):
            y, _ = nj.batch_norm(params, batch_stats, x, True, mask=mask)
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return jax.hessian(loss)(x)

    run = on_platform.compiled(hessian, x)
    expected = run(x)
    assert_close(
        run(x.at[0].set(jnp.nan)), expected, atol=64 * EPS * float(jnp.abs(expected).max())
    )


@pytest.mark.parametrize(
    "shape", [(), (3,), (1, 1), (4, 1), (1, 4, 3), (6, 4, 1), (6, 1, 3), (6, 4, 3)], ids=str
)
def test_any_mask_that_broadcasts_is_taken(on_platform, rng, shape):
    """What the mask hides is normalized like the rest."""
    params, batch_stats, x = small(rng, (6, 4, 3))
    mask = rng.random(shape) < 0.6

    def masked(params, batch_stats, x, mask):
        return nj.batch_norm(params, batch_stats, x, True, mask=mask)

    y, new = on_platform(masked, params, batch_stats, x, mask)
    expected, expected_new = reference.batch_norm(params, batch_stats, x, True, mask=mask)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(new, expected_new, rtol=1e-5)


@pytest.mark.slow
def test_a_mask_of_features_leaves_the_others_to_their_running_statistics(on_platform, rng):
    params, batch_stats, x = given = small(rng)
    counted = jnp.array([True, False, True])
    y, new = on_platform(partial(nj.batch_norm, train=True, mask=counted), *given)
    trained, trained_new = reference.batch_norm(params, batch_stats, x, True)
    evaluated, _ = reference.batch_norm(params, batch_stats, x, False)
    assert_close(y, np.where(counted, trained, evaluated), atol=1e-5)
    for leaf in ("mean", "var"):
        assert_close(new[leaf][::2], trained_new[leaf][::2], rtol=1e-5)
        assert_identical(new[leaf][1], batch_stats[leaf][1])


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
def test_where_nothing_counts_statistics_stay_and_y_and_gradients_are_finite(
    on_platform, rng, momentum, running_var
):
    params, batch_stats, x = small(rng)
    batch_stats["count"] = jnp.array(5, jnp.int32)
    nothing, ones = jnp.zeros((8, 1), bool), jnp.ones_like(x)
    run = partial(step, momentum=momentum, running_var=running_var)
    masked = on_platform.compiled(run, params, batch_stats, x, ones, nothing)
    outcomes = [
        masked(params, batch_stats, x, ones, nothing),
        masked(params, batch_stats, jnp.full_like(x, jnp.nan), ones, nothing),
        on_platform(run, params, batch_stats, x[:0], ones[:0]),
    ]
    for y, new, gradients, dx in outcomes:
        assert y.shape == dx.shape
        assert_finite((y, gradients, dx))
        assert_identical(new, batch_stats)
    evaluated, _ = reference.batch_norm(params, batch_stats, x, False)
    assert_close(outcomes[0][0], evaluated, atol=1e-5)


def test_one_element_that_counts_is_no_division_by_zero(on_platform, rng):
    params, batch_stats, x = small(rng)
    mask = (jnp.arange(8) == 3)[:, None]
    run = partial(step, momentum=0.0, running_var="unbiased")
    y, new, *gradients = on_platform(run, params, batch_stats, x, jnp.ones_like(x), mask)
    assert_finite((y, gradients))
    assert_close(y[3], np.asarray(params["bias"]), atol=8 * EPS)
    assert_close(new["mean"], np.asarray(x[3]), rtol=2 * EPS)
    assert_identical(new["var"], batch_stats["var"])
