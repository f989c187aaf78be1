"""Global response norm: at zero, of large and small numbers, masks, and the identity it begins as.

Its formula is tested with all others in test_family_reference.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference_family as family
from tests.compare import assert_close, assert_identical, widest

SHAPE = (2, 4, 3, 5)
SCALE = {"scale": jnp.array([1.0, -2.0, 0.5, 0.0, 3.0])}
run = partial(nj.global_response_norm, train=True)


def draw(rng):
    return jnp.asarray(rng.normal(0.5, 1, SHAPE), jnp.float32)


def test_at_first_y_is_x(rng):
    x = draw(rng)
    assert_identical(run(*nj.global_response_norm_init(5), x)[0], x)


@pytest.mark.parametrize("epsilon", [1e-6, 0.0])
def test_where_x_is_zero_the_derivative_is_that_of_the_identity(rng, epsilon):
    """Also if one channel alone is zero; and the gradients of all else are finite."""
    x = draw(rng)
    dead = x.at[..., 1].set(0)

    def gradient(x):
        return jax.jit(jax.grad(lambda x: jnp.sum(run(SCALE, {}, x, epsilon=epsilon)[0])))(x)

    assert_close(gradient(jnp.zeros_like(x)), np.ones(SHAPE))
    assert_close(gradient(dead)[..., 1], np.ones((2, 4, 3)))
    # The other channels see one more channel in the mean.
    rest = {"scale": SCALE["scale"][jnp.array([0, 2, 3, 4])]}
    alone = jnp.delete(x, 1, -1)
    scaled = {"scale": rest["scale"] * 5 / 4}

    def others(x):
        return jax.grad(lambda x: jnp.sum(run(scaled, {}, x, epsilon=epsilon)[0]))(x)

    assert_close(jnp.delete(gradient(dead), 1, -1), others(alone), rtol=1e-5, atol=1e-5)


def test_large_and_small_numbers(on_platform, rng):
    x, weight = widest(draw(rng)), draw(rng)

    def both(x):
        def loss(x):
            return jnp.sum(weight * run(SCALE, {}, x)[0])

        forward = jax.jvp(loss, (x,), (weight,))[1]
        return run(SCALE, {}, x)[0], jax.grad(loss)(x), forward

    program = on_platform.quickly.compiled(both, jnp.asarray(x, jnp.float32))
    at_one = program(jnp.asarray(1e3 * x, jnp.float32))
    for scale in (1e-25, 1e-12, 1e-10, 1e-3, 1e6, 1e18, 1e23):
        given = jnp.asarray(scale * x, jnp.float32)
        y, gradient, forward = program(given)
        wanted = family.global_response_norm(SCALE, given)
        assert_close(y, wanted, atol=1e-6 * np.abs(wanted).max(), case=scale)
        if scale > 1e-3:
            assert_close(gradient, at_one[1], rtol=1e-4, atol=1e-4, case=scale)
            assert_close(forward, at_one[2], rtol=1e-4, case=scale)


def test_what_a_mask_hides_is_left_out(rng):
    x = draw(rng)
    mask = np.arange(4)[:, None, None] < 3
    y, _ = run(SCALE, {}, jnp.where(mask, x, jnp.nan), mask=mask)
    assert_close(y[:, :3], run(SCALE, {}, x[:, :3])[0], rtol=1e-6, atol=1e-6)
    assert_identical(y[:, 3], jnp.zeros_like(y[:, 3]))
    channels = np.array([True, True, False, True, True])
    y, _ = run(SCALE, {}, x, mask=channels)
    kept = {"scale": SCALE["scale"][channels]}
    assert_close(y[..., channels], run(kept, {}, x[..., channels])[0], rtol=1e-6, atol=1e-6)
    assert_close(y[..., 2], x[..., 2])
    weighted, _ = run(SCALE, {}, x, mask=np.full((1, 1, 1), 4, np.float32))
    assert_close(weighted, run(SCALE, {}, x)[0], rtol=1e-5, atol=1e-6)


def test_without_positions_the_norm_is_the_absolute_value(rng):
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    y, _ = run({}, {}, x)
    share = np.abs(widest(x)) / np.abs(widest(x)).mean(-1, keepdims=True)
    assert_close(y, widest(x) * (1 + share), rtol=1e-5)
