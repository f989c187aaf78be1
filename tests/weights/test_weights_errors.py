"""Wrong kernels, leaves and numbers raise errors at trace time, with their values."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax.core import freeze

import normjax as nj

KERNEL = jnp.arange(1.0, 13.0).reshape(4, 3)
STATES = {
    "weight_norm": nj.weights.weight_norm_init(KERNEL),
    "weight_standardization": nj.weights.weight_standardization_init(3),
    "spectral_norm": nj.weights.spectral_norm_init(KERNEL, key=jax.random.key(0)),
}
every_layer = pytest.mark.parametrize("name", STATES)


def refuses(
    name, error, *values, kernel=KERNEL, train=True, params=None, batch_stats=None, **settings
):
    """Asserts that the call and its abstract evaluation raise `error` with all of `values`."""
    own_params, own_stats = STATES[name]
    params = own_params if params is None else params
    batch_stats = own_stats if batch_stats is None else batch_stats

    def call(kernel):
        return getattr(nj.weights, name)(params, batch_stats, kernel, train, **settings)

    for run in (call, lambda kernel: jax.eval_shape(call, kernel)):
        with pytest.raises(error) as refused:
            run(kernel)
        message = str(refused.value)
        assert re.fullmatch(name + r": .*\. Expected .*; got .*\. .*\.", message, re.DOTALL), (
            message
        )
        for value in values:
            assert str(value) in message, f"{value!r} is not in: {message}"


@every_layer
def test_kernels_that_are_none(name):
    refuses(name, ValueError, "shape=()", kernel=jnp.float32(1))
    refuses(name, TypeError, "int32", "(4, 3)", kernel=KERNEL.astype(jnp.int32))
    for train in (True, False):
        refuses(name, ValueError, "3", "5", kernel=jnp.ones((4, 5)), train=train)


@every_layer
@pytest.mark.parametrize("axes", [2, -3, (0, 5), (1, 1), (1, -1)], ids=str)
def test_feature_axes_out_of_range_or_repeated(name, axes):
    for train in (True, False):
        refuses(
            name, ValueError, f"feature_axes={axes!r}", "(4, 3)", feature_axes=axes, train=train
        )


@every_layer
@pytest.mark.parametrize("train", [1, None, "train"], ids=repr)
def test_train_that_is_no_bool(name, train):
    refuses(name, TypeError, f"train={train!r}", train=train)


@every_layer
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan")], ids=repr)
def test_an_epsilon_out_of_range(name, epsilon):
    refuses(name, ValueError, f"epsilon={epsilon}", epsilon=epsilon)


@every_layer
def test_a_dtype_that_cannot_hold_the_kernel(name):
    refuses(name, TypeError, "dtype=int32", "float32", dtype=jnp.int32)


@every_layer
def test_params_of_another_structure_or_shape(name):
    params, batch_stats = STATES[name]
    for leaf in ("gamma", "bias"):
        refuses(name, ValueError, "params", f"'{leaf}'", params=params | {leaf: jnp.ones(3)})
    refuses(name, TypeError, "params", "FrozenDict", params=freeze(params))
    if params:
        refuses(name, ValueError, "params['scale']", "(4,)", "(3,)", params={"scale": jnp.ones(4)})
        refuses(
            name,
            (TypeError, ValueError),
            "params['scale']",
            "int32",
            params={"scale": jnp.ones(3, jnp.int32)},
        )


@every_layer
def test_batch_stats_of_another_structure(name):
    refuses(
        name,
        ValueError,
        "batch_stats",
        "'mean'",
        batch_stats=STATES[name][1] | {"mean": jnp.zeros(3)},
    )
    refuses(name, TypeError, "batch_stats", "tuple", batch_stats=())


def test_a_direction_that_does_not_fit():
    params, batch_stats = STATES["spectral_norm"]
    for train in (True, False):
        refuses("spectral_norm", ValueError, "batch_stats", "[]", batch_stats={}, train=train)
        unfit = batch_stats | {"u": jnp.ones((1, 4))}
        refuses(
            "spectral_norm",
            ValueError,
            "batch_stats['u']",
            "(1, 4)",
            "(1, 3)",
            batch_stats=unfit,
            train=train,
        )
        unfit = batch_stats | {"sigma": jnp.ones(3)}
        refuses(
            "spectral_norm",
            ValueError,
            "batch_stats['sigma']",
            "(3,)",
            batch_stats=unfit,
            train=train,
        )


def test_spectral_norm_of_a_complex_kernel():
    refuses("spectral_norm", TypeError, "complex64", "(4, 3)", kernel=KERNEL.astype(jnp.complex64))
    with pytest.raises(TypeError, match="spectral_norm_init: .*complex64"):
        nj.weights.spectral_norm_init(KERNEL.astype(jnp.complex64), key=jax.random.key(0))


@pytest.mark.parametrize("n_steps", [0, -1, 1.5, True, "1", None], ids=repr)
def test_steps_that_are_no_number_of_them(n_steps):
    refuses("spectral_norm", (TypeError, ValueError), f"n_steps={n_steps!r}", n_steps=n_steps)


def test_init_of_what_is_no_kernel():
    for name, extra in (("weight_norm", {}), ("spectral_norm", {"key": jax.random.key(0)})):
        init = getattr(nj.weights, f"{name}_init")
        with pytest.raises(TypeError, match=f"{name}_init: .*int32"):
            init(KERNEL.astype(jnp.int32), **extra)
        with pytest.raises(ValueError, match=rf"{name}_init: .*feature_axes=2.*\(4, 3\)"):
            init(KERNEL, feature_axes=2, **extra)
    with pytest.raises((TypeError, ValueError), match="weight_standardization_init: .*0"):
        nj.weights.weight_standardization_init(0)
    with pytest.raises(TypeError, match="key"):
        nj.weights.spectral_norm_init(KERNEL)
