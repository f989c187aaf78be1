"""Ghost batches: each slice on its own, the running statistics of all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.layers.cases import small

EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [2, 3, 6, 12])
def test_each_slice_is_normalized_on_its_own_and_the_statistics_are_merged(rng, size, masked):
    params, batch_stats, x = small(rng, (12, 5, 3))
    mask = jnp.asarray(rng.random((12, 5, 1)) < 0.7) if masked else jnp.ones((12, 5, 1), bool)
    settings = {"mask": mask} if masked else {}
    y, new = nj.batch_norm(params, batch_stats, x, True, virtual_batch_size=size, **settings)
    slices = [slice(start, start + size) for start in range(0, 12, size)]
    for s in slices:
        alone, _ = nj.batch_norm(
            params, batch_stats, x[s], True, **({"mask": mask[s]} if masked else {})
        )
        assert_close(y[s], alone, rtol=1e-5, atol=1e-5)
    merged = functools.reduce(
        nj.merge_moments, [nj.moments(x[s], (0, 1), mask=mask[s]) for s in slices]
    )
    assert_trees_close(new, nj.update_batch_stats(batch_stats, merged), rtol=32 * EPS)
    assert_trees_close(
        new, nj.batch_norm(params, batch_stats, x, True, **settings)[1], rtol=32 * EPS
    )


@pytest.mark.slow
def test_gradients_are_those_of_the_slices(rng):
    params, batch_stats, x = small(rng, (8, 3))
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def loss(params, x, weights, size):
        return jnp.sum(
            weights * nj.batch_norm(params, batch_stats, x, True, virtual_batch_size=size)[0]
        )

    grads, dx = jax.grad(loss, argnums=(0, 1))(params, x, weights, 4)
    halves = [
        jax.grad(loss, argnums=(0, 1))(params, x[s], weights[s], None)
        for s in (slice(4), slice(4, 8))
    ]
    assert_trees_close(
        grads, jax.tree.map(jnp.add, halves[0][0], halves[1][0]), rtol=64 * EPS, atol=64 * EPS
    )
    assert_close(dx, jnp.concatenate([halves[0][1], halves[1][1]]), atol=64 * EPS)


def test_a_slice_of_which_nothing_counts_uses_the_running_statistics(rng):
    params, batch_stats, x = small(rng)
    mask = (jnp.arange(8) < 4)[:, None]
    y, new = nj.batch_norm(
        params, batch_stats, x.at[4:].set(jnp.nan), True, mask=mask, virtual_batch_size=4
    )
    alone, alone_new = nj.batch_norm(params, batch_stats, x[:4], True)
    assert_close(y[:4], alone, atol=16 * EPS)
    assert_close(y[4:], np.tile(params["bias"], (4, 1)), atol=8 * EPS)
    assert_trees_close(new, alone_new, rtol=16 * EPS)
    y, _ = nj.batch_norm(params, batch_stats, x, True, mask=mask, virtual_batch_size=4)
    assert_close(y[4:], nj.batch_norm(params, batch_stats, x[4:], False)[0], atol=16 * EPS)


def test_evaluation_knows_no_ghosts(rng):
    params, batch_stats, x = small(rng, (7, 3))
    ghosts = nj.batch_norm(params, batch_stats, x, False, virtual_batch_size=4)
    assert_identical(ghosts, nj.batch_norm(params, batch_stats, x, False))


def test_slices_are_cut_along_axis_0_wherever_the_features_are(rng):
    params, batch_stats, x = small(rng, (6, 5, 3))
    y, new = nj.batch_norm(params, batch_stats, x, True, virtual_batch_size=2)
    moved, moved_new = nj.batch_norm(
        params, batch_stats, x.transpose(0, 2, 1), True, virtual_batch_size=2, feature_axes=1
    )
    assert_close(moved.transpose(0, 2, 1), y, atol=1e-5)
    assert_trees_close(moved_new, new, rtol=32 * EPS)


def test_no_examples_are_no_ghosts_and_change_nothing(rng):
    params, batch_stats, x = small(rng)
    y, new = nj.batch_norm(params, batch_stats, x[:0], True, virtual_batch_size=4)
    assert y.shape == (0, 3)
    assert_identical(new, batch_stats)


def test_far_from_zero_each_slice_keeps_its_variance(rng):
    x = rng.normal(np.repeat([1e4, -1e4], 512)[:, None], 1, (1024, 2)).astype(np.float32)
    y, new = nj.batch_norm(
        *nj.batch_norm_init(2), jnp.asarray(x), True, virtual_batch_size=512, momentum=0.0
    )
    assert_close(np.float64(y).reshape(2, 512, 2).std(1), np.ones((2, 2)), atol=1e-3)
    assert_close(new["var"], x.astype(np.float64).var(0), rtol=1e-5)
