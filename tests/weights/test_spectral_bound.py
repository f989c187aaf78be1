"""Spectral norm with a bound: it divides larger kernels, and leaves smaller ones as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj

BOUND = 0.95


def kernel_of(sigma):
    """A kernel whose largest singular value is sigma."""
    orthogonal = jax.nn.initializers.orthogonal()(jax.random.key(0), (6, 4))
    return sigma * orthogonal * jnp.array([1.0, 0.5, 0.25, 0.125])


def normed(kernel, **settings):
    params, batch_stats = nj.weights.spectral_norm_init(kernel, key=jax.random.key(1))
    return nj.weights.spectral_norm(params, batch_stats, kernel, True, n_steps=20, **settings)


@pytest.mark.parametrize(("sigma", "left"), [(5.0, 0.95), (0.96, 0.95), (0.5, 0.5), (0.0, 0.0)])
def test_the_largest_singular_value_is_at_most_the_bound(sigma, left):
    kernel = kernel_of(sigma)
    w, batch_stats = normed(kernel, bound=BOUND)
    np.testing.assert_allclose(jnp.linalg.norm(w, 2), left, rtol=1e-5)
    np.testing.assert_allclose(batch_stats["sigma"], sigma, rtol=1e-5)
    if sigma <= BOUND:
        np.testing.assert_array_equal(w, kernel)


@pytest.mark.parametrize("sigma", [5.0, 0.5])
def test_gradients_are_those_of_the_quotient(sigma):
    kernel = kernel_of(sigma)
    weight = jax.random.normal(jax.random.key(2), kernel.shape)
    by_norm = jax.grad(lambda kernel: jnp.sum(weight * normed(kernel, bound=BOUND)[0]))(kernel)

    def quotient(kernel):
        return jnp.sum(weight * kernel) / jnp.maximum(1, jnp.linalg.norm(kernel, 2) / BOUND)

    np.testing.assert_allclose(by_norm, jax.grad(quotient)(kernel), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("sigma", "left"), [(5.0, 0.95), (0.5, 0.5)])
def test_the_wrappers_take_a_bound(sigma, left):
    layer = nn.Dense(4, use_bias=False, kernel_init=lambda *_: kernel_of(sigma))
    linen = nj.linen.SpectralNorm(layer, n_steps=20, bound=BOUND)
    y, _ = linen.init_with_output(jax.random.key(0), jnp.eye(6), update_stats=True)
    np.testing.assert_allclose(jnp.linalg.norm(y, 2), left, rtol=1e-5)

    dense = nnx.Linear(
        6, 4, use_bias=False, kernel_init=lambda *_: kernel_of(sigma), rngs=nnx.Rngs(0)
    )
    y = nj.nnx.SpectralNorm(dense, n_steps=20, bound=BOUND, rngs=nnx.Rngs(0))(jnp.eye(6))
    np.testing.assert_allclose(jnp.linalg.norm(y, 2), left, rtol=1e-5)


@pytest.mark.parametrize("bound", [0, -1.0, "one"])
def test_a_bound_is_above_0(bound):
    with pytest.raises((TypeError, ValueError), match=r"spectral_norm: .*bound"):
        normed(kernel_of(1.0), bound=bound)
