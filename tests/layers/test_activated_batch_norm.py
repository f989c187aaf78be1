"""In-place activated batch norm: gradients are exact, and only the output is stored."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import normjax as nj
from tests.compare import assert_close, assert_finite, assert_trees_close
from tests.distributed.mapped import DEVICES, SPLIT, WHOLE, assert_steps_close, collectives, mesh
from tests.layers.cases import small
from tests.xla import AS_FOR_USERS

EPS64 = float(jnp.finfo(jnp.float64).eps)
ACTIVATIONS = {
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.01),
    "elu": jax.nn.elu,
    "identity": lambda y: y,
}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_that_bends = pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
both_modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def two_layers(params, batch_stats, x, train, activation):
    """Plain batch norm with the gain of the paper, then the activation."""
    gain = jnp.abs(params["scale"]) + 1e-5
    y, new = nj.batch_norm(params | {"scale": gain}, batch_stats, x, train, momentum=0.9)
    return ACTIVATIONS[activation](y), new


def one_layer(params, batch_stats, x, train, activation):
    return nj.activated_batch_norm(
        params, batch_stats, x, train, momentum=0.9, activation=activation
    )


def loss_of(layer, train, activation, weights):
    """A loss in which z, the new mean and the new variance all take part, none of them linearly."""

    def loss(params, batch_stats, x):
        z, new = layer(params, batch_stats, x, train, activation)
        penalty = jnp.sum(jnp.sin(new["mean"]) * jnp.log(new["var"])).astype(jnp.float32)
        return jnp.sum(weights * jnp.tanh(z).astype(weights.dtype)) + penalty.astype(weights.dtype)

    return loss


def arguments(rng, dtype=np.float64, shape=(8, 3)):
    params, batch_stats, x = small(rng, shape, dtype=dtype)
    return (params, batch_stats, x), jnp.asarray(rng.normal(size=shape), dtype)


@cache
def gradients_of_two_layers(train, activation):
    """Compiled, and compiled again for other shapes and dtypes."""

    def run(params, batch_stats, x, weights):
        loss = loss_of(two_layers, train, activation, weights)
        return jax.value_and_grad(loss, (0, 1, 2))(params, batch_stats, x)

    return jax.jit(run)


def gradients_of_one_layer(train, activation):
    def run(params, batch_stats, x, weights):
        loss = loss_of(one_layer, train, activation, weights)
        return jax.value_and_grad(loss, (0, 1, 2))(params, batch_stats, x)

    return run


@both_modes
@each_activation
def test_values_and_gradients_are_those_of_two_layers(on_platform, rng, activation, train):
    with jax.enable_x64(True):
        given, weights = arguments(rng)
        given[0]["scale"] = jnp.asarray([-1.5, 0.7, 1.2])
        ours = on_platform(gradients_of_one_layer(train, activation), *given, weights)
        theirs = gradients_of_two_layers(train, activation)(*given, weights)
        # The penalty on the statistics is float32 in value.
        assert_close(ours[0], theirs[0], rtol=1e-6)
        assert_trees_close(ours[1][0], theirs[1][0], rtol=1e4 * EPS64, atol=1e4 * EPS64)
        assert_trees_close(ours[1][1:], theirs[1][1:], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, roundings", [(jnp.float32, 32), (jnp.bfloat16, 4)])
@each_activation
def test_the_error_of_the_gradients_is_rounding(on_platform, rng, activation, dtype, roundings):
    """In root mean square over x: `roundings` of the dtype, in units of the gradient's own."""
    (params, batch_stats, x), weights = arguments(rng, np.float32, (256, 3))
    params["scale"] = jnp.asarray([-1.5, 0.7, 1.2], jnp.float32)
    x = x.astype(dtype)
    run = gradients_of_one_layer(True, activation)
    _, ours = on_platform(run, params, batch_stats, x, weights)
    wide = x.astype(jnp.float32)
    _, theirs = gradients_of_two_layers(True, activation)(params, batch_stats, wide, weights)
    of_params_and_x = jax.tree.leaves(ours[::2]), jax.tree.leaves(theirs[::2])
    for actual, expected in zip(*of_params_and_x, strict=True):
        error = jnp.sqrt(
            jnp.mean((actual.astype(jnp.float32) - expected) ** 2) / jnp.mean(expected**2)
        )
        assert error < roundings * float(jnp.finfo(dtype).eps)


def hessian_of(layer, activation):
    def run(params, batch_stats, x, weights):
        def loss(params, x):
            z, _ = layer(params, batch_stats, x, True, activation)
            return jnp.sum(weights * jnp.tanh(z))

        return jax.hessian(loss, (0, 1))(params, x)

    return run


@cache
def hessian_of_two_layers(activation):
    return jax.jit(hessian_of(two_layers, activation))


@pytest.mark.slow
@each_that_bends
def test_second_derivatives_are_those_of_two_layers(on_platform, rng, activation):
    with jax.enable_x64(True):
        given, weights = arguments(rng)
        given[0]["scale"] = jnp.asarray([-1.5, 0.7, 1.2])
        ours = on_platform.quickly(hessian_of(one_layer, activation), *given, weights)
        theirs = hessian_of_two_layers(activation)(*given, weights)
        assert_trees_close(ours, theirs, rtol=1e5 * EPS64, atol=1e5 * EPS64)


@pytest.mark.slow
@each_activation
def test_the_output_is_all_that_is_kept(rng, activation):
    (params, batch_stats, x), _ = arguments(rng, np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        z, backward = jax.vjp(
            lambda x: one_layer(params, batch_stats, x, True, activation)[0], x.astype(dtype)
        )  # noqa: B023
        (kept,) = [leaf for leaf in jax.tree.leaves(backward) if leaf.size == x.size]
        assert kept.dtype == dtype
        np.testing.assert_array_equal(kept.astype(jnp.float32), z.astype(jnp.float32))


def plain_loss(layer, params, batch_stats, x, weights):
    return jnp.sum(weights * layer(params, batch_stats, x, True, "leaky_relu")[0])


plain_gradients_of_two_layers = jax.jit(jax.grad(partial(plain_loss, two_layers), (0, 2)))


@pytest.mark.slow
def test_a_scale_near_zero_still_learns(on_platform, rng):
    """The bias is 0, as it starts: then little is lost. At 0 the derivative is that from above."""
    (params, batch_stats, x), weights = arguments(rng, np.float32)
    params = jax.tree.map(jnp.zeros_like, params)
    gradients = jax.grad(partial(plain_loss, one_layer), (0, 2))
    run = on_platform.compiled(gradients, params, batch_stats, x, weights)
    for scale, nearby in ((0.0, 1e-12), (1e-4, 1e-4), (-1e-4, -1e-4)):
        ours = run(params | {"scale": jnp.full(3, scale)}, batch_stats, x, weights)
        beside = params | {"scale": jnp.full(3, nearby)}
        theirs = plain_gradients_of_two_layers(beside, batch_stats, x, weights)
        assert jnp.abs(ours[0]["scale"]).min() > 1e-3
        assert_steps_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_scale_near_zero_beside_a_bias_stays_finite(on_platform, rng, dtype):
    """Then z says little about x. What is wrong in its gradient is as small as the gain."""
    (params, batch_stats, x), weights = arguments(rng, np.float32)
    params = params | {"scale": jnp.zeros(3)}

    def loss(params, x):
        z = one_layer(params, batch_stats, x.astype(dtype), True, "leaky_relu")[0]
        return jnp.sum(weights * z.astype(jnp.float32))

    gradients = on_platform(jax.grad(loss, (0, 1)), params, x)
    assert_finite(gradients)
    assert jnp.abs(gradients[1]).max() < 1e-1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_elu_rounds_to_minus_one_stays_finite(on_platform, dtype):
    x = jnp.concatenate([jnp.zeros(999), jnp.full(1, -100.0)])[:, None].astype(dtype)
    params, batch_stats = nj.batch_norm_init(1)

    def loss(params, x):
        z, _ = nj.activated_batch_norm(params, batch_stats, x, True, activation="elu")
        return jnp.sum(jnp.sin(z.astype(jnp.float32))), z

    gradients, z = on_platform(jax.grad(loss, (0, 1), has_aux=True), params, x)
    assert z.min() == -1
    assert_finite(gradients)


def synced_step(params, batch_stats, x, weights, *, summed=False, **settings):
    """Returns z, the new statistics, and the gradients of params and x."""

    def loss(params, x):
        z, new = nj.activated_batch_norm(params, batch_stats, x, True, **settings)
        return jnp.sum(weights * jnp.tanh(z)), (z, new)

    (d_params, dx), (z, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return z, new, lax.psum(d_params, "data") if summed else d_params, dx


def synced(check_vma):
    return jax.shard_map(
        partial(synced_step, axis_name="data", summed=not check_vma),
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT),
        out_specs=(SPLIT, WHOLE, WHOLE, SPLIT),
        check_vma=check_vma,
    )


alone = jax.jit(synced_step)


def batch_of_all_devices(rng):
    params, batch_stats, x = small(rng, (4 * DEVICES, 5, 3))
    return params, batch_stats, x, jnp.asarray(rng.normal(size=x.shape), jnp.float32)


@pytest.mark.parametrize("check_vma", [True, False])
def test_synced_over_devices_it_is_one_device_on_the_whole_batch(on_platform, rng, check_vma):
    given = batch_of_all_devices(rng)
    assert_steps_close(on_platform(synced(check_vma), *given), alone(*given))


@pytest.mark.parametrize("check_vma", [True, False])
def test_synced_over_devices_it_sends_little(rng, check_vma):
    given = batch_of_all_devices(rng)
    sent = collectives(jax.jit(synced(check_vma)).lower(*given).compile(AS_FOR_USERS))
    assert len(sent) <= 2 + (not check_vma), "one forward, one backward (and that of the test)"


@pytest.mark.slow
@each_that_bends
def test_it_is_recalibrated_like_batch_norm(rng, activation):
    batches = [jnp.asarray(rng.normal(3, 2, (8, 3)), jnp.float32) for _ in range(4)]
    for layer_by_layer in (False, True):
        given = {"layer_by_layer": layer_by_layer}

        def apply_fn(variables, x):
            return one_layer(*variables, x, True, activation)

        ours = nj.recalibrate(apply_fn, nj.batch_norm_init(3), batches, **given)
        theirs = nj.recalibrate(
            lambda v, x: nj.batch_norm(*v, x, True), nj.batch_norm_init(3), batches, **given
        )
        assert_trees_close(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    "settings, error, value",
    [
        ({"activation": "relu"}, ValueError, "'relu'"),
        ({"negative_slope": 0.0}, ValueError, "negative_slope=0.0"),
        ({"negative_slope": -1}, ValueError, "negative_slope=-1"),
        ({"negative_slope": float("inf")}, ValueError, "inf"),
        ({"x": jnp.ones((4, 3), jnp.complex64)}, TypeError, "complex64"),
        ({"x": jnp.ones((1, 3))}, ValueError, "(1, 3)"),
        ({"x": jnp.ones((4, 2))}, ValueError, "(2,)"),
        ({"axis_name": "data"}, NameError, "data"),
    ],
)
def test_unfit_arguments_are_refused(settings, error, value):
    params, batch_stats = nj.activated_batch_norm_init(3)
    x = settings.pop("x", jnp.ones((4, 3)))
    with pytest.raises(error) as raised:
        jax.eval_shape(
            lambda x: nj.activated_batch_norm(params, batch_stats, x, True, **settings), x
        )
    assert re.fullmatch(
        r"activated_batch_norm: .*\. Expected .*; got .*\. .*\.", str(raised.value), re.DOTALL
    )
    assert value in str(raised.value)


def test_there_is_no_mask():
    with pytest.raises(TypeError, match="mask"):
        nj.activated_batch_norm(*nj.activated_batch_norm_init(3), jnp.ones((4, 3)), True, mask=None)
