"""What does not fit is refused by every layer at trace time, with its value in the message."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import normjax as nj

X = jnp.ones((4, 2, 3))
# Settings that suit X; those of the layers whose defaults do not.
SETTINGS = {
    "layer_norm": {},
    "rms_norm": {},
    "group_norm": {"num_groups": 1},
    "instance_norm": {},
    "batch_renorm": {},
    "filter_response_norm": {},
    "global_response_norm": {},
    "local_response_norm": {},
    "dynamic_tanh": {},
}
STATELESS = [name for name in SETTINGS if name != "batch_renorm"]
OVER_SPACE = ["instance_norm", "filter_response_norm", "global_response_norm"]
REDUCING = ["layer_norm", "rms_norm", "group_norm", *OVER_SPACE]
MASKED = [*REDUCING, "batch_renorm"]
WITH_EPSILON = MASKED
ONE_AXIS = ["group_norm", "local_response_norm"]
CENTERED = ["layer_norm", "group_norm", "instance_norm"]


def init(name, num_features=3, **settings):
    return getattr(nj, f"{name}_init")(num_features, **settings)


def refuses(name, error, *values, x=X, train=True, params=None, batch_stats=None, **settings):
    """Asserts that the call and its abstract evaluation raise `error` with all `values`."""
    own_params, own_stats = init(name)
    params = own_params if params is None else params
    batch_stats = own_stats if batch_stats is None else batch_stats
    settings = SETTINGS[name] | settings

    def call(x):
        return getattr(nj, name)(params, batch_stats, x, train, **settings)

    with pytest.raises(error) as eager:
        call(x)
    with pytest.raises(error) as abstract:
        jax.eval_shape(call, x)
    for raised in (eager, abstract):
        message = str(raised.value)
        assert re.fullmatch(name + r": .*\. Expected .*; got .*\. .*\.", message, re.DOTALL), (
            message
        )
        for value in values:
            assert str(value) in message, f"{value!r} is not in: {message}"


def every(names):
    return pytest.mark.parametrize("name", names)


@every(SETTINGS)
def test_what_fits_is_taken(name):
    for train in (True, False):
        y, _ = getattr(nj, name)(*init(name), X, train, **SETTINGS[name])
        assert y.shape == X.shape


@every(SETTINGS)
def test_a_scalar(name):
    refuses(name, ValueError, "x.ndim=0", "x.shape=()", x=jnp.float32(1))


@every(SETTINGS)
@pytest.mark.parametrize("train", [True, False])
def test_another_number_of_features(name, train):
    params = init(name, use_scale=True)[0]
    refuses(name, ValueError, "(3,)", "(5,)", x=jnp.ones((4, 2, 5)), train=train, params=params)


@every(SETTINGS)
@pytest.mark.parametrize("axes", [3, -4, (0, 5), (1, 1), (2, -1)], ids=str)
def test_feature_axes_out_of_range_or_repeated(name, axes):
    for train in (True, False):
        refuses(
            name,
            ValueError,
            f"feature_axes={axes!r}",
            "x.shape=(4, 2, 3)",
            feature_axes=axes,
            train=train,
        )


@every(REDUCING)
@pytest.mark.parametrize("axes", [3, -4, (0, 5), (1, 1), (2, -1)], ids=str)
def test_reduction_axes_out_of_range_or_repeated(name, axes):
    for train in (True, False):
        refuses(
            name,
            ValueError,
            f"reduction_axes={axes!r}",
            "x.shape=(4, 2, 3)",
            reduction_axes=axes,
            train=train,
        )


@every(REDUCING)
@pytest.mark.parametrize("axes", [1.0, "1", (0.5,)], ids=repr)
@pytest.mark.parametrize("argument", ["reduction_axes", "feature_axes"])
def test_axes_that_are_no_ints(name, argument, axes):
    refuses(name, (TypeError, ValueError), f"{argument}={axes!r}", **{argument: axes})


@every(SETTINGS)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_x_that_is_not_floating_point(name, dtype):
    refuses(
        name,
        TypeError,
        f"x.dtype={dtype.__name__.rstrip('_')}",
        "x.shape=(4, 2, 3)",
        x=jnp.ones_like(X, dtype),
    )


@every(SETTINGS)
@pytest.mark.parametrize("train", [1, None, "train"], ids=repr)
def test_train_that_is_no_bool(name, train):
    refuses(name, TypeError, f"train={train!r}", train=train)


@every(SETTINGS)
def test_train_that_is_traced_or_left_out(name):
    with pytest.raises(TypeError, match=rf"{name}: .*train.*static"):
        jax.jit(lambda train: getattr(nj, name)(*init(name), X, train, **SETTINGS[name]))(True)
    with pytest.raises(TypeError, match="train"):
        getattr(nj, name)(*init(name), X, **SETTINGS[name])


@every(WITH_EPSILON)
@pytest.mark.parametrize("epsilon", [-1e-5, float("nan"), np.float32(-1), "1e-5"], ids=repr)
def test_an_epsilon_out_of_range(name, epsilon):
    for train in (True, False):
        refuses(name, (TypeError, ValueError), "epsilon=", epsilon=epsilon, train=train)


@every(MASKED)
@pytest.mark.parametrize("shape", [(5,), (2, 1, 3), (4, 3, 1), (1, 4, 2, 3)], ids=str)
def test_a_mask_that_does_not_broadcast(name, shape):
    for train in (True, False):
        refuses(
            name,
            ValueError,
            f"mask.shape={shape}",
            "(4, 2, 3)",
            mask=jnp.ones(shape, bool),
            train=train,
        )


@every(MASKED)
def test_a_mask_that_is_neither_boolean_nor_real(name):
    refuses(name, TypeError, "mask.dtype=int32", mask=jnp.ones(X.shape, jnp.int32))


@every(MASKED)
def test_an_axis_name_that_is_not_bound(name):
    refuses(name, NameError, "axis_name='devices'", "no axis is in scope", axis_name="devices")


@every(MASKED)
def test_groups_without_an_axis(name):
    refuses(name, ValueError, "axis_index_groups=[[0, 1]]", axis_index_groups=[[0, 1]])


@every(STATELESS)
def test_batch_stats_where_there_are_none(name):
    for train in (True, False):
        refuses(
            name,
            ValueError,
            "batch_stats",
            "'mean'",
            batch_stats={"mean": jnp.zeros(3)},
            train=train,
        )
        refuses(name, TypeError, "batch_stats", "tuple", batch_stats=(), train=train)
        refuses(name, TypeError, "batch_stats", "FrozenDict", batch_stats=freeze({}), train=train)


@every(SETTINGS)
def test_params_of_another_structure(name):
    params = init(name)[0]
    refuses(name, ValueError, "params", "'gamma'", params=params | {"gamma": jnp.ones(3)})
    refuses(name, ValueError, "params", "'params'", params={"params": params, "batch_stats": {}})
    refuses(name, TypeError, "params", "tuple", params=tuple(params.values()))
    refuses(name, TypeError, "params", "FrozenDict", params=freeze(params))


@every(SETTINGS)
def test_params_of_another_shape_or_kind(name):
    params = init(name)[0]
    for leaf in params.keys() | {"scale", "bias"}:
        refuses(name, ValueError, f"params['{leaf}']", "(2,)", params=params | {leaf: jnp.ones(2)})
        integers = params | {leaf: jnp.ones(() if leaf == "alpha" else 3, jnp.int32)}
        refuses(name, (TypeError, ValueError), f"params['{leaf}']", "int32", params=integers)


@every(SETTINGS)
def test_a_dtype_that_cannot_hold_y(name):
    refuses(name, TypeError, "dtype=int32", "x.dtype=float32", dtype=jnp.int32)
    refuses(name, (TypeError, ValueError), "flaot32", dtype="flaot32")
    if name != "batch_renorm":
        scale = {leaf: value for leaf, value in init(name)[0].items() if leaf != "threshold"}
        settings = {"x": X.astype(jnp.complex64), "params": scale, "dtype": jnp.float32}
        refuses(name, TypeError, "dtype=float32", "x.dtype=complex64", **settings)


@every(SETTINGS)
@pytest.mark.parametrize("num_features", [0, -1, (3, 0), 2.5], ids=repr)
def test_init_of_no_features(name, num_features):
    with pytest.raises(
        (TypeError, ValueError), match=f"{name}_init: .*{re.escape(repr(num_features))}"
    ):
        init(name, num_features)


@every(SETTINGS)
def test_init_with_an_unfit_dtype_or_no_key(name):
    with pytest.raises(TypeError, match=f"{name}_init: .*int32"):
        init(name, param_dtype=jnp.int32)
    with pytest.raises(TypeError, match=f"{name}_init: .*key"):
        init(name, use_scale=True, scale_init=jax.nn.initializers.normal())


# One by one.


@pytest.mark.parametrize(
    ("name", "shape", "settings"),
    [
        ("layer_norm", (4, 1), {}),
        ("layer_norm", (4, 1, 3), {"reduction_axes": 1}),
        ("layer_norm", (4, 3), {"reduction_axes": ()}),
        ("group_norm", (4, 3), {"num_groups": 3}),
        ("group_norm", (4, 1, 3), {"num_groups": None, "group_size": 1}),
        ("instance_norm", (4, 1, 3), {}),
        ("instance_norm", (4, 3), {}),
    ],
)
def test_one_value_a_statistic_in_training(name, shape, settings):
    x = jnp.full(shape, 5.0)
    params, batch_stats = init(name, shape[-1])
    refuses(name, ValueError, f"x.shape={shape}", "at least 2", x=x, params=params, **settings)
    y, _ = getattr(nj, name)(params, batch_stats, x, False, **SETTINGS[name] | settings)
    np.testing.assert_array_equal(y, np.zeros(shape))


@every(CENTERED)
def test_one_value_a_statistic_is_several_where_devices_share(name):
    x, params = jnp.arange(2.0).reshape(2, 1, 1, 1), init(name, 1)[0]
    function = jax.vmap(
        lambda x: getattr(nj, name)(params, {}, x, True, axis_name="i", **SETTINGS[name])[0],
        axis_name="i",
    )
    np.testing.assert_allclose(function(x).ravel(), [-1, 1], rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"num_groups": 0}, ["num_groups=0"]),
        ({"num_groups": -1}, ["num_groups=-1"]),
        ({"num_groups": 2}, ["num_groups=2", "3"]),
        ({"num_groups": 1.0}, ["num_groups=1.0"]),
        ({"num_groups": None, "group_size": 2}, ["group_size=2", "3"]),
        ({"num_groups": None, "group_size": 0}, ["group_size=0"]),
        ({"num_groups": None, "group_size": 6}, ["group_size=6"]),
        ({"num_groups": 1, "group_size": 3}, ["num_groups=1", "group_size=3"]),
        ({"num_groups": None}, ["32"]),
        ({"reduction_axes": 1}, ["reduction_axes=(1,)", "feature axis 2", "x.shape=(4, 2, 3)"]),
        ({"reduction_axes": ()}, ["reduction_axes=()"]),
    ],
    ids=str,
)
def test_groups_that_do_not_fit(settings, values):
    for train in (True, False):
        refuses("group_norm", (TypeError, ValueError), *values, train=train, **settings)


@every(ONE_AXIS)
@pytest.mark.parametrize("axes", [(1, 2), (0, 2), ()], ids=str)
def test_layers_of_one_feature_axis(name, axes):
    refuses(name, ValueError, f"feature_axes={axes!r}", params={}, feature_axes=axes)


@every(OVER_SPACE)
@pytest.mark.parametrize(
    "settings",
    [
        {"reduction_axes": (0, 1)},
        {"reduction_axes": (0,)},
        {"feature_axes": (0,)},
        {"feature_axes": (0, 2)},
    ],
    ids=str,
)
def test_statistics_of_one_example_leave_axis_0_alone(name, settings):
    ((argument, axes),) = settings.items()
    for train in (True, False):
        refuses(
            name,
            ValueError,
            f"{argument}={axes!r}",
            "x.shape=(4, 2, 3)",
            params={},
            train=train,
            **settings,
        )


def test_instance_norm_over_a_feature_axis():
    refuses(
        "instance_norm",
        ValueError,
        "reduction_axes=(1, 2)",
        "feature_axes=(2,)",
        reduction_axes=(1, 2),
    )


def test_a_threshold_for_complex_x():
    x = X.astype(jnp.complex64)
    refuses("filter_response_norm", TypeError, "threshold", "complex64", x=x)


@pytest.mark.parametrize("value", [None, "1", [1.0, 2.0], float("nan")], ids=repr)
def test_a_scale_offset_that_is_no_number(value):
    refuses("rms_norm", (TypeError, ValueError), "scale_offset=", value, scale_offset=value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("size", 0),
        ("size", -3),
        ("size", 2.5),
        ("k", 0.0),
        ("k", -1.0),
        ("beta", -0.75),
        ("alpha", -1e-4),
    ]
    + [(argument, float("nan")) for argument in ("k", "beta", "alpha")],
)
def test_a_response_out_of_range(argument, value):
    for train in (True, False):
        refuses(
            "local_response_norm",
            (TypeError, ValueError),
            f"{argument}={value}",
            train=train,
            **{argument: value},
        )


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("r_max", 0.99),
        ("r_max", -1.0),
        ("d_max", -0.1),
        ("r_max", float("nan")),
        ("d_max", float("nan")),
    ],
)
def test_limits_of_batch_renorm_out_of_range(argument, value):
    for train in (True, False):
        refuses("batch_renorm", ValueError, f"{argument}={value}", train=train, **{argument: value})


@pytest.mark.parametrize("argument", ["r_max", "d_max"])
def test_limits_of_batch_renorm_that_are_no_scalars(argument):
    for value, shown in (("3", "'3'"), (None, "None"), (jnp.ones(3), "(3,)")):
        refuses("batch_renorm", (TypeError, ValueError), f"{argument}", shown, **{argument: value})


def test_a_schedule_without_a_count():
    _, batch_stats = init("batch_renorm")
    del batch_stats["count"]
    for argument in ("r_max", "d_max"):
        limit = {argument: lambda count: 1.0}
        refuses(
            "batch_renorm",
            ValueError,
            argument,
            "'mean', 'var'",
            "count",
            batch_stats=batch_stats,
            **limit,
        )
    nj.batch_renorm({}, batch_stats, X, True, r_max=2.0, d_max=1.0)


def test_statistics_of_batch_renorm_of_another_structure():
    _, batch_stats = init("batch_renorm")
    assert batch_stats.keys() == {"mean", "var", "count"}
    refuses(
        "batch_renorm", ValueError, "batch_stats", "['mean']", batch_stats={"mean": jnp.zeros(3)}
    )
    refuses(
        "batch_renorm",
        ValueError,
        "batch_stats",
        "'std'",
        batch_stats=batch_stats | {"std": jnp.ones(3)},
    )
    refuses(
        "batch_renorm", TypeError, "batch_stats", "tuple", batch_stats=tuple(batch_stats.values())
    )
