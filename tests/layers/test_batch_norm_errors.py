"""Every unfit argument is refused at trace time, with its value in the message."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import normjax as nj

PARAMS, BATCH_STATS = nj.batch_norm_init(3)
X = jnp.ones((4, 3))


def refuses(error, *values, params=PARAMS, batch_stats=BATCH_STATS, x=X, train=True, **settings):
    """Asserts that the call and its abstract evaluation raise `error` with all `values`."""
    with pytest.raises(error) as eager:
        nj.batch_norm(params, batch_stats, x, train, **settings)
    with pytest.raises(error) as traced:
        jax.eval_shape(lambda x: nj.batch_norm(params, batch_stats, x, train, **settings), x)
    for raised in (eager, traced):
        message = str(raised.value)
        assert re.fullmatch(r"batch_norm: .*\. Expected .*; got .*\. .*\.", message, re.DOTALL), (
            message
        )
        for value in values:
            assert str(value) in message, f"{value!r} is not in: {message}"


def test_a_scalar():
    refuses(ValueError, "x.ndim=0", "x.shape=()", x=jnp.float32(1))


@pytest.mark.parametrize("train", [True, False])
def test_another_number_of_features(train):
    refuses(ValueError, "(3,)", "(5,)", x=jnp.ones((4, 5)), train=train)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("axes", [2, -3, (0, 5), (1, 1), (1, -1)], ids=str)
def test_axes_out_of_range_or_repeated(axes, train):
    refuses(ValueError, f"feature_axes={axes!r}", "x.shape=(4, 3)", feature_axes=axes, train=train)


@pytest.mark.parametrize("axes", [1.0, "1", None, (0.5,)], ids=str)
def test_axes_that_are_no_ints(axes):
    refuses((TypeError, ValueError), f"feature_axes={axes!r}", feature_axes=axes)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_x_that_is_not_floating_point(dtype):
    refuses(
        TypeError,
        f"x.dtype={dtype.__name__.rstrip('_')}",
        "x.shape=(4, 3)",
        x=jnp.ones((4, 3), dtype),
    )


@pytest.mark.parametrize("train", [1, 0, None, "train", 0.0], ids=repr)
def test_train_that_is_no_bool(train):
    refuses(TypeError, f"train={train!r}", train=train)


def test_train_that_is_traced():
    with pytest.raises(TypeError, match=r"batch_norm: .*train.*static"):
        jax.jit(nj.batch_norm)(PARAMS, BATCH_STATS, X, True)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("running_var", ["unbaised", None, True], ids=repr)
def test_an_unknown_running_var(running_var, train):
    refuses(
        ValueError,
        f"running_var={running_var!r}",
        "'biased'",
        "'unbiased'",
        running_var=running_var,
        train=train,
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "momentum", [-0.1, 1.01, 9, float("nan"), np.float32(2), np.float64(2)], ids=repr
)
def test_a_momentum_out_of_range(momentum, train):
    refuses(
        ValueError,
        "momentum=",
        str(float(momentum)).removesuffix(".0"),
        momentum=momentum,
        train=train,
    )


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), np.float32(-1)], ids=repr)
def test_an_epsilon_out_of_range(epsilon, train):
    refuses(ValueError, "epsilon=", epsilon=epsilon, train=train)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 3), {}),
        ((3,), {}),
        ((1, 1, 3), {}),
        ((4, 3), {"virtual_batch_size": 1}),
        ((4, 1, 3), {"virtual_batch_size": 1}),
    ],
    ids=str,
)
def test_one_value_per_feature_in_training(shape, settings):
    refuses(ValueError, f"x.shape={shape}", "at least 2", x=jnp.ones(shape), **settings)
    nj.batch_norm(PARAMS, BATCH_STATS, jnp.ones(shape), False, **settings)


def test_one_value_per_feature_is_several_where_devices_share():
    function = jax.vmap(
        lambda x: nj.batch_norm(PARAMS, BATCH_STATS, x, True, axis_name="i")[0], axis_name="i"
    )
    assert function(jnp.arange(6.0).reshape(2, 1, 3)).shape == (2, 1, 3)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 1), (4, 2), (1, 4, 3)], ids=str)
def test_a_mask_that_does_not_broadcast(shape, train):
    refuses(ValueError, f"mask.shape={shape}", "(4, 3)", mask=jnp.ones(shape, bool), train=train)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_a_mask_that_is_neither_boolean_nor_real(dtype):
    refuses(TypeError, f"mask.dtype={dtype.__name__}", mask=jnp.ones((4, 1), dtype))


@pytest.mark.parametrize("train", [True, False])
def test_batch_stats_of_another_structure(train):
    refuses(ValueError, "batch_stats", "['mean']", batch_stats={"mean": jnp.zeros(3)}, train=train)
    refuses(
        ValueError,
        "batch_stats",
        "'std'",
        batch_stats=BATCH_STATS | {"std": jnp.ones(3)},
        train=train,
    )
    refuses(ValueError, "batch_stats", "[]", batch_stats={}, train=train)
    refuses(TypeError, "batch_stats", "tuple", batch_stats=tuple(BATCH_STATS.values()), train=train)
    refuses(TypeError, "batch_stats", "NoneType", batch_stats=None, train=train)
    refuses(
        TypeError,
        "batch_stats",
        "FrozenDict",
        "unfreeze",
        batch_stats=freeze(BATCH_STATS),
        train=train,
    )


@pytest.mark.parametrize("leaf", ["mean", "var", "count"])
def test_batch_stats_of_another_shape(leaf):
    refuses(
        ValueError, f"batch_stats['{leaf}']", "(2,)", batch_stats=BATCH_STATS | {leaf: jnp.ones(2)}
    )


@pytest.mark.parametrize("leaf", ["mean", "var"])
def test_batch_stats_that_are_integers(leaf):
    batch_stats = BATCH_STATS | {leaf: jnp.ones(3, jnp.int32)}
    refuses((TypeError, ValueError), f"batch_stats['{leaf}']", "int32", batch_stats=batch_stats)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "bool"])
def test_a_count_that_cannot_count(dtype):
    """A float32, which averages of states make of it, can: see tests/statistics/test_average.py."""
    batch_stats = BATCH_STATS | {"count": jnp.zeros((), dtype)}
    refuses(
        (TypeError, ValueError),
        "batch_stats['count']",
        dtype,
        batch_stats=batch_stats,
        momentum=None,
    )


def test_params_of_another_structure():
    refuses(ValueError, "params", "'gamma'", params={"gamma": jnp.ones(3)})
    refuses(ValueError, "params['scale']", "(2,)", "(3,)", params={"scale": jnp.ones(2)})
    refuses(TypeError, "params", "NoneType", params=None)
    refuses(TypeError, "params", "FrozenDict", "unfreeze", params=freeze(PARAMS))
    refuses(ValueError, "params", "'params'", params={"params": PARAMS, "batch_stats": BATCH_STATS})


def test_params_that_are_integers():
    refuses(
        (TypeError, ValueError),
        "params['scale']",
        "int32",
        params={"scale": jnp.ones(3, jnp.int32)},
    )


@pytest.mark.parametrize("train", [True, False])
def test_a_cumulative_mean_without_a_count(train):
    refuses(ValueError, "momentum=None", "'mean', 'var'", "count=True", momentum=None, train=train)


@pytest.mark.parametrize("train", [True, False])
def test_complex_x_with_a_real_running_mean(train):
    refuses((TypeError, ValueError), "float32", "complex64", x=X.astype(jnp.complex64), train=train)


def test_an_axis_name_that_is_not_bound():
    refuses(NameError, "axis_name='devices'", "no axis is in scope", axis_name="devices")
    with pytest.raises(NameError, match="batch_norm: .*'devcies'.*'devices'"):
        jax.vmap(
            lambda x: nj.batch_norm(PARAMS, BATCH_STATS, x, True, axis_name="devcies")[0],
            axis_name="devices",
        )(X[None])


def test_evaluation_and_init_never_touch_the_axis():
    y, _ = nj.batch_norm(
        PARAMS, BATCH_STATS, X, False, axis_name="devices", axis_index_groups=[[0], [1]]
    )
    assert y.shape == X.shape


@pytest.mark.parametrize(
    "groups", [[[0, 1], [2]], [[0, 1], [1, 2]], [[0, 1]], [[0, 1], [2, 4]], []], ids=str
)
def test_groups_that_do_not_partition_the_axis(groups):
    def per_device(x):
        return nj.batch_norm(PARAMS, BATCH_STATS, x, True, axis_name="i", axis_index_groups=groups)[
            0
        ]

    with pytest.raises(ValueError, match=f"batch_norm: .*{re.escape(repr(groups))}"):
        jax.eval_shape(jax.vmap(per_device, axis_name="i"), jnp.ones((4, 4, 3)))


def test_groups_without_an_axis():
    refuses(ValueError, "axis_index_groups=[[0, 1]]", axis_index_groups=[[0, 1]])


@pytest.mark.parametrize("size", [3, 5, 0, -2, 2.0], ids=repr)
def test_ghosts_that_do_not_divide_the_batch(size):
    refuses(
        (TypeError, ValueError),
        f"virtual_batch_size={size!r}",
        "4 examples",
        virtual_batch_size=size,
    )


def test_ghosts_across_a_feature_axis():
    x = jnp.ones((3, 4))
    refuses(ValueError, "virtual_batch_size=3", "(3, 4)", x=x, feature_axes=0, virtual_batch_size=3)


@pytest.mark.parametrize("train", [True, False])
def test_a_dtype_that_cannot_hold_y(train):
    refuses(TypeError, "dtype=int32", "x.dtype=float32", dtype=jnp.int32, train=train)
    complex_stats = nj.batch_norm_init(3, param_dtype=jnp.complex64)
    settings = {
        "params": complex_stats[0],
        "batch_stats": complex_stats[1],
        "x": X.astype(jnp.complex64),
    }
    refuses(
        TypeError, "dtype=float32", "x.dtype=complex64", dtype=jnp.float32, train=train, **settings
    )


def test_a_dtype_that_does_not_exist():
    refuses((TypeError, ValueError), "flaot32", dtype="flaot32")


@pytest.mark.parametrize("num_features", [0, -1, (3, 0), 2.5], ids=repr)
def test_init_of_no_features(num_features):
    with pytest.raises(
        (TypeError, ValueError), match=f"batch_norm_init: .*{re.escape(repr(num_features))}"
    ):
        nj.batch_norm_init(num_features)


def test_init_with_an_integer_param_dtype():
    with pytest.raises(TypeError, match="batch_norm_init: .*int32"):
        nj.batch_norm_init(3, param_dtype=jnp.int32)


def test_init_with_a_random_initializer_and_no_key():
    with pytest.raises(TypeError, match="batch_norm_init: .*key"):
        nj.batch_norm_init(3, scale_init=jax.nn.initializers.normal())
