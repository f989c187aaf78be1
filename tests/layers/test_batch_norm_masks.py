"""What does not count leaves no trace: masks, empty batches, empty features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_finite, assert_identical, assert_trees_close
from tests.layers.cases import small

EPS = float(jnp.finfo(jnp.float32).eps)


def gradients(params, batch_stats, x, weights, **settings):
    """Derivatives of a weighted sum of y and of the new statistics: of params, old statistics and x."""

    def loss(params, batch_stats, x):
        y, new = nj.batch_norm(params, batch_stats, x, True, **settings)
        return jnp.sum(weights * y) + jnp.sum(new["mean"]) + jnp.sum(new["var"])

    return jax.grad(loss, argnums=(0, 1, 2))(params, batch_stats, x)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_masked_elements_leave_no_trace_whatever_they_hold(rng, garbage, train):
    params, batch_stats, x = small(rng, (12, 3))
    kept = jnp.asarray(rng.permutation(12) < 7)
    dirty = jnp.where(kept[:, None], x, jnp.float32(garbage))
    weights = jnp.where(kept[:, None], jnp.asarray(rng.normal(size=x.shape), jnp.float32), 0)
    y, new = nj.batch_norm(params, batch_stats, dirty, train, mask=kept[:, None])
    clean, clean_new = nj.batch_norm(params, batch_stats, x[kept], train)
    assert_finite((y, new))
    assert_close(y[kept], clean, atol=32 * EPS)
    assert_trees_close(new, clean_new, rtol=32 * EPS)
    if train:
        *grads, dx = gradients(params, batch_stats, dirty, weights, mask=kept[:, None])
        *clean_grads, clean_dx = gradients(params, batch_stats, x[kept], weights[kept])
        assert_trees_close(grads, clean_grads, rtol=64 * EPS, atol=64 * EPS)
        assert_close(dx[kept], clean_dx, atol=64 * EPS)
        assert_close(dx[~kept], np.zeros((5, 3)))


def test_where_a_masked_element_is_not_finite_y_is_the_bias(rng):
    params, batch_stats, x = small(rng)
    x = x.at[:2].set(jnp.array([[jnp.nan], [jnp.inf]]))
    mask = (jnp.arange(8) > 2)[:, None]
    for train in (True, False):
        y, _ = nj.batch_norm(params, batch_stats, x, train, mask=mask)
        assert_close(y[:2], np.tile(params["bias"], (2, 1)), atol=8 * EPS)


def test_masked_elements_are_normalized_like_the_others(rng):
    params, batch_stats, x = small(rng)
    mask = (jnp.arange(8) > 2)[:, None]
    y, _ = nj.batch_norm(params, batch_stats, x, True, mask=mask)
    assert_close(y, reference.batch_norm(params, batch_stats, x, True, mask=mask)[0], atol=1e-5)


def test_garbage_in_masked_elements_poisons_no_second_derivative(rng):
    params, batch_stats, x = small(rng, (4, 2))
    mask = (jnp.arange(4) > 0)[:, None]

    def hessian(x):
        def loss(x):
            return jnp.sum(
                jnp.where(mask, nj.batch_norm(params, batch_stats, x, True, mask=mask)[0], 0) ** 3
            )

        return jax.jit(jax.hessian(loss))(x)

    expected = hessian(x)
    assert_close(
        hessian(x.at[0].set(jnp.nan)), expected, atol=64 * EPS * float(jnp.abs(expected).max())
    )


@pytest.mark.parametrize(
    "shape", [(), (3,), (1, 1), (4, 1), (1, 4, 3), (6, 4, 1), (6, 1, 3), (6, 4, 3)], ids=str
)
def test_any_mask_that_broadcasts_is_taken(rng, shape):
    params, batch_stats, x = small(rng, (6, 4, 3))
    mask = rng.random(shape) < 0.6
    y, new = nj.batch_norm(params, batch_stats, x, True, mask=jnp.asarray(mask))
    expected, expected_new = reference.batch_norm(params, batch_stats, x, True, mask=mask)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(new, expected_new, rtol=1e-5)


def test_a_mask_of_features_leaves_the_others_to_their_running_statistics(rng):
    params, batch_stats, x = small(rng)
    y, new = nj.batch_norm(params, batch_stats, x, True, mask=jnp.array([True, False, True]))
    trained, trained_new = nj.batch_norm(params, batch_stats, x, True)
    evaluated, _ = nj.batch_norm(params, batch_stats, x, False)
    assert_close(y, jnp.where(jnp.array([True, False, True]), trained, evaluated), atol=16 * EPS)
    for leaf in ("mean", "var"):
        assert_close(new[leaf][::2], trained_new[leaf][::2], rtol=8 * EPS)
        assert_identical(new[leaf][1], batch_stats[leaf][1])


def empty_batches(x):
    """The three ways to have nothing that counts, finite or not."""
    mask = jnp.zeros((x.shape[0], 1), bool)
    yield x, {"mask": mask}
    yield jnp.full_like(x, jnp.nan), {"mask": mask}
    yield x[:0], {}


@pytest.mark.parametrize("case", range(3), ids=["masked", "masked nan", "no examples"])
@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
def test_where_nothing_counts_statistics_stay_and_y_and_gradients_are_finite(
    rng, case, momentum, running_var
):
    params, batch_stats, x = small(rng)
    batch_stats["count"] = jnp.array(5, jnp.int32)
    x, settings = list(empty_batches(x))[case]
    settings |= {"momentum": momentum, "running_var": running_var}
    y, new = nj.batch_norm(params, batch_stats, x, True, **settings)
    assert y.shape == x.shape
    assert_finite(y)
    assert_identical(new, batch_stats)

    def loss(params, mean, var, x):
        y, new = nj.batch_norm(
            params, batch_stats | {"mean": mean, "var": var}, x, True, **settings
        )
        return jnp.sum(y) + jnp.sum(new["mean"]) + jnp.sum(new["var"])

    assert_finite(
        jax.grad(loss, argnums=(0, 1, 2, 3))(params, batch_stats["mean"], batch_stats["var"], x)
    )


def test_where_nothing_counts_y_is_that_of_evaluation(rng):
    params, batch_stats, x = small(rng)
    y, _ = nj.batch_norm(params, batch_stats, x, True, mask=jnp.zeros((8, 1), bool))
    assert_close(y, nj.batch_norm(params, batch_stats, x, False)[0], atol=16 * EPS)


def test_one_element_that_counts_is_no_division_by_zero(rng):
    params, batch_stats, x = small(rng)
    mask = (jnp.arange(8) == 3)[:, None]
    y, new = nj.batch_norm(
        params, batch_stats, x, True, mask=mask, momentum=0.0, running_var="unbiased"
    )
    assert_finite(
        (y, gradients(params, batch_stats, x, jnp.ones_like(x), mask=mask, running_var="unbiased"))
    )
    assert_close(y[3], np.asarray(params["bias"]), atol=8 * EPS)
    assert_close(new["mean"], np.asarray(x[3]), rtol=2 * EPS)
    assert_identical(new["var"], batch_stats["var"])
