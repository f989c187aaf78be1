"""First and second derivatives against autodiff of the textbook formula, in float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_trees_close
from tests.layers.cases import small

EPS64 = float(jnp.finfo(jnp.float64).eps)
MODES = ["train", "eval", "masked", "ghosts"]


def textbook(params, batch_stats, x, mode, mask):
    """Algorithms 1 and 2 of the paper in jnp; returns y, and running statistics of momentum 0.9."""
    if mode == "ghosts":
        x = x.reshape(2, -1, x.shape[-1])
    mean, var = batch_stats["mean"], batch_stats["var"]
    if mode != "eval":
        where = mask if mode == "masked" else None
        mean = jnp.mean(x, -2, where=where, keepdims=True)
        var = jnp.mean((x - mean) ** 2, -2, where=where, keepdims=True)
    y = params["scale"] * (x - mean) / jnp.sqrt(var + 1e-5) + params["bias"]
    if mode != "eval":
        flat = x.reshape(-1, x.shape[-1])
        mean = jnp.mean(flat, 0, where=mask if mode == "masked" else None)
        var = jnp.mean((flat - mean) ** 2, 0, where=mask if mode == "masked" else None)
        batch_stats = {
            "mean": 0.9 * batch_stats["mean"] + 0.1 * mean,
            "var": 0.9 * batch_stats["var"] + 0.1 * var,
        }
    return y.reshape(-1, y.shape[-1]), batch_stats


def layer(params, batch_stats, x, mode, mask):
    return nj.batch_norm(
        params,
        batch_stats,
        x,
        mode != "eval",
        momentum=0.9,
        mask=mask if mode == "masked" else None,
        virtual_batch_size=4 if mode == "ghosts" else None,
    )


def arguments():
    rng = np.random.default_rng(0)
    given = small(rng, dtype=np.float64)
    mask = jnp.asarray(rng.random(given[2].shape) < 0.7)
    return given, mask, jnp.asarray(rng.normal(size=mask.shape))


def loss_of(function, mode, mask, weights):
    """A loss in which y, the new mean and the new variance all take part, none of them linearly."""

    def loss(params, batch_stats, x):
        y, new = function(params, batch_stats, x, mode, mask)
        return jnp.sum(weights * jnp.tanh(y)) + jnp.sum(jnp.sin(new["mean"]) * jnp.log(new["var"]))

    return loss


def gradients(loss):
    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def hessian(loss):
    return jax.hessian(loss, argnums=(0, 2))


def gradient_of_gradient_norm(loss):
    def penalty(*given):
        return jnp.sum(jax.grad(loss, argnums=2)(*given) ** 2)

    return jax.grad(penalty, argnums=(0, 1, 2))


@cache
def of_the_textbook(derivative, mode):
    _, mask, weights = arguments()
    return jax.jit(derivative(loss_of(textbook, mode, mask, weights)))


@pytest.mark.parametrize(
    ("derivative", "mode"),
    [
        *((gradients, mode) for mode in MODES),
        *(pytest.param(hessian, mode, marks=pytest.mark.slow) for mode in MODES),
        pytest.param(gradient_of_gradient_norm, "train", marks=pytest.mark.slow),
        pytest.param(gradient_of_gradient_norm, "masked", marks=pytest.mark.slow),
    ],
)
def test_derivatives_are_those_of_the_textbook_formula(on_platform, derivative, mode):
    with jax.enable_x64(True):
        given, mask, weights = arguments()
        # Large programs of higher order take seconds to optimize for CPUs.
        on_platform = on_platform if derivative is gradients else on_platform.quickly
        ours = on_platform(derivative(loss_of(layer, mode, mask, weights)), *given)
        theirs = of_the_textbook(derivative, mode)(*given)
        roundings = (1e4 if derivative is gradient_of_gradient_norm else 1e3) * EPS64
        assert_trees_close(ours, theirs, rtol=roundings, atol=roundings)


def test_gradients_are_right_far_from_zero_where_the_second_pass_is_taken(on_platform):
    with jax.enable_x64(True):
        (params, batch_stats, x), mask, weights = arguments()
        given = (params, batch_stats, x + 1e4)
        _, ours = on_platform(gradients(loss_of(layer, "train", mask, weights)), *given)
        _, theirs = of_the_textbook(gradients, "train")(*given)
        # The mean at 1e4 is rounded to 1e4 EPS64, in units of a deviation near 1.
        rounded = 1e3 * 1e4 * EPS64
        assert_trees_close(ours[::2], theirs[::2], rtol=rounded, atol=rounded)


def test_the_gradient_of_x_is_orthogonal_to_ones_and_to_x(on_platform):
    # y does not change when x is shifted, nor (epsilon aside) when it is scaled: Ioffe & Szegedy,
    # section 3.3.
    with jax.enable_x64(True):
        (params, batch_stats, x), _, weights = arguments()

        def loss(x):
            return jnp.sum(weights * nj.batch_norm(params, batch_stats, x, True, epsilon=0.0)[0])

        dx = on_platform(jax.grad(loss), x)
        assert jnp.abs(dx).max() > 1e-2
        assert_close(dx.sum(0), np.zeros(3), atol=1e3 * EPS64)
        assert_close((dx * x).sum(0), np.zeros(3), atol=1e3 * EPS64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gradients_are_those_of_float32_rounded_once(on_platform, rng, dtype):
    params, batch_stats, x = small(rng, (64, 3))
    weights = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)

    def loss(params, x):
        y, _ = nj.batch_norm(params, batch_stats, x, True, dtype=jnp.float32)
        return jnp.sum(weights * y)

    def narrow_and_wide(params, x):
        gradients = partial(jax.grad(loss, argnums=(0, 1)), params)
        return gradients(x), gradients(x.astype(jnp.float32))

    (dparams, dx), (wide_dparams, wide_dx) = on_platform(narrow_and_wide, params, x.astype(dtype))
    assert_trees_close(dparams, wide_dparams, rtol=1e-5, atol=1e-5)
    assert_close(dx, wide_dx, rtol=float(jnp.finfo(dtype).eps), atol=1e-6, dtype=dtype)


@pytest.mark.slow
def test_complex_gradients_are_those_of_real_and_imaginary_parts(on_platform, rng):
    x = (rng.normal(size=(6, 2)) + 1j * rng.normal(size=(6, 2))).astype(np.complex64)
    params, batch_stats = nj.batch_norm_init(2, param_dtype=jnp.complex64)
    weights = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)

    def loss(real, imaginary):
        y, _ = nj.batch_norm(params, batch_stats, jax.lax.complex(real, imaginary), True)
        return jnp.sum(weights * jnp.abs(y) ** 2)

    def expected(real, imaginary):
        real, imaginary = real - real.mean(0), imaginary - imaginary.mean(0)
        squares = real**2 + imaginary**2
        return jnp.sum(weights * squares / (squares.mean(0) + 1e-5))

    parts = jnp.asarray(x.real), jnp.asarray(x.imag)
    assert_trees_close(
        on_platform(jax.grad(loss, argnums=(0, 1)), *parts),
        jax.jit(jax.grad(expected, argnums=(0, 1)))(*parts),
        rtol=1e-5,
        atol=1e-5,
    )
