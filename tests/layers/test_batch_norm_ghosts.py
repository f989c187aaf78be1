"""Ghost batches: each slice on its own, the running statistics of all."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.layers.cases import small

EPS = float(jnp.finfo(jnp.float32).eps)


def with_ghosts(params, batch_stats, x, mask=None, *, size):
    return nj.batch_norm(params, batch_stats, x, True, mask=mask, virtual_batch_size=size)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [2, 6, 12])
def test_each_slice_is_normalized_on_its_own_and_the_statistics_are_merged(
    on_platform, rng, size, masked
):
    params, batch_stats, x = small(rng, (12, 5, 3))
    mask = jnp.asarray(rng.random((12, 5, 1)) < 0.7) if masked else None
    y, new = on_platform(partial(with_ghosts, size=size), params, batch_stats, x, mask)
    expected, expected_new = reference.batch_norm(
        params, batch_stats, x, True, mask=mask, virtual_batch_size=size
    )
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(new, expected_new, rtol=1e-5)
    cuts = [slice(start, start + size) for start in range(0, 12, size)]
    moments = [nj.moments(x[cut], (0, 1), mask=mask if mask is None else mask[cut]) for cut in cuts]
    merged = nj.update_batch_stats(batch_stats, reduce(nj.merge_moments, moments))
    assert_trees_close(new, merged, rtol=32 * EPS)


@pytest.mark.slow
def test_gradients_are_those_of_the_slices(on_platform, rng):
    params, batch_stats, x = small(rng, (8, 3))
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def loss(params, x, weights, size):
        y, _ = with_ghosts(params, batch_stats, x, size=size)
        return jnp.sum(weights * y)

    def ghosts_and_slices(params, x):
        gradients = partial(jax.grad(loss, argnums=(0, 1)), params)
        halves = [gradients(x[cut], weights[cut], None) for cut in (slice(4), slice(4, 8))]
        return gradients(x, weights, 4), halves

    (grads, dx), halves = on_platform(ghosts_and_slices, params, x)
    assert_trees_close(
        grads, jax.tree.map(jnp.add, halves[0][0], halves[1][0]), rtol=64 * EPS, atol=64 * EPS
    )
    assert_close(dx, jnp.concatenate([halves[0][1], halves[1][1]]), atol=64 * EPS)


@pytest.mark.slow
def test_a_slice_of_which_nothing_counts_uses_the_running_statistics(on_platform, rng):
    params, batch_stats, x = small(rng)
    mask = (jnp.arange(8) < 4)[:, None]
    run = on_platform.compiled(partial(with_ghosts, size=4), params, batch_stats, x, mask)
    y, new = run(params, batch_stats, x.at[4:].set(jnp.nan), mask)
    alone, alone_new = reference.batch_norm(params, batch_stats, x[:4], True)
    assert_close(y[:4], alone, atol=1e-5)
    assert_close(y[4:], np.tile(params["bias"], (4, 1)), atol=8 * EPS)
    assert_trees_close(new, alone_new, rtol=1e-5)
    y, _ = run(params, batch_stats, x, mask)
    assert_close(y[4:], reference.batch_norm(params, batch_stats, x[4:], False)[0], atol=1e-5)


def test_evaluation_knows_no_ghosts(rng):
    params, batch_stats, x = small(rng, (7, 3))
    ghosts = nj.batch_norm(params, batch_stats, x, False, virtual_batch_size=4)
    assert_identical(ghosts, nj.batch_norm(params, batch_stats, x, False))


def test_slices_are_cut_along_axis_0_wherever_the_features_are(on_platform, rng):
    params, batch_stats, x = small(rng, (6, 5, 3))

    def features_last_and_in_the_middle(params, batch_stats, x):
        layer = partial(nj.batch_norm, params, batch_stats, train=True, virtual_batch_size=2)
        return layer(x=x), layer(x=x.transpose(0, 2, 1), feature_axes=1)

    outcomes = on_platform(features_last_and_in_the_middle, params, batch_stats, x)
    (y, new), (moved, moved_new) = outcomes
    assert_close(moved.transpose(0, 2, 1), y, atol=1e-5)
    assert_trees_close(moved_new, new, rtol=32 * EPS)


def test_no_examples_are_no_ghosts_and_change_nothing(on_platform, rng):
    params, batch_stats, x = small(rng)
    y, new = on_platform(partial(with_ghosts, size=4), params, batch_stats, x[:0])
    assert y.shape == (0, 3)
    assert_identical(new, batch_stats)


@pytest.mark.slow
def test_far_from_zero_each_slice_keeps_its_variance(on_platform, rng):
    x = rng.normal(np.repeat([1e4, -1e4], 512)[:, None], 1, (1024, 2)).astype(np.float32)
    layer = partial(nj.batch_norm, train=True, virtual_batch_size=512, momentum=0.0)
    y, new = on_platform(layer, *nj.batch_norm_init(2), x)
    assert_close(np.float64(y).reshape(2, 512, 2).std(1), np.ones((2, 2)), atol=1e-3)
    assert_close(new["var"], x.astype(np.float64).var(0), rtol=1e-5)
