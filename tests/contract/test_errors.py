"""Every layer and every adapter names the argument that does not fit, in its own words."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.adapters import ADAPTERS, WRAPPERS
from tests.compare import assert_close, assert_identical, at_once
from tests.contract.cases import CASES, of

LAYERS_OF_X = pytest.mark.parametrize(
    "adapter", [each for each in ADAPTERS if each.name not in WRAPPERS], ids=repr
)
PLAIN = of([case for case in CASES if case.variant == "plain"])
WEIGHTS = ("weight_norm", "weight_standardization", "spectral_norm")
FORM = r"\w+: .*\. Expected .*; got .*\. .*\."


def refuses(error, call, *values):
    """Asserts that a call raises one of normjax's errors, with all of `values` in it."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert re.fullmatch(FORM, message, re.DOTALL), message
    for value in values:
        assert str(value) in message, f"{value!r} is not in: {message}"


def lists(leaf):
    return np.asarray(leaf).tolist()


@PLAIN
@pytest.mark.parametrize("train", [True, False])
def test_a_leaf_that_is_a_list_is_named(case, train, rng):
    params, batch_stats, x = case.arguments(rng)
    for name, tree in (("params", params), ("batch_stats", batch_stats)):
        for leaf in tree:
            if tree[leaf].ndim == 0:
                continue
            given = {"params": params, "batch_stats": batch_stats}
            given[name] = tree | {leaf: lists(tree[leaf])}
            refuses(
                TypeError,
                lambda given=given: case.apply(train)(*given.values(), x),
                f"{name}[{leaf!r}]",
                "list",
                case.layer.name,
            )


@PLAIN
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("given", [None, "x", {"x": 1.0}], ids=repr)
def test_x_that_is_no_array_is_named(case, train, given, rng):
    params, batch_stats, _ = case.arguments(rng)
    refuses(
        TypeError,
        lambda: case.apply(train)(params, batch_stats, given),
        case.layer.name,
        "is not an array",
        type(given).__name__,
    )


@LAYERS_OF_X
def test_x_that_is_no_array_is_named_by_the_adapters(adapter):
    refuses(
        TypeError, lambda: adapter.call(adapter.make(), None), adapter.name, "x of type NoneType"
    )


def test_moments_that_do_not_fit_each_other():
    a, b = nj.moments(jnp.ones((4, 3)), 0), nj.moments(jnp.ones((4, 2)), 0)
    refuses(ValueError, lambda: nj.merge_moments(a, b), "a.mean.shape=(3,)", "b.mean.shape=(2,)")
    refuses(TypeError, lambda: nj.merge_moments(a, None), "b of type NoneType")
    refuses(
        TypeError, lambda: nj.merge_moments(a, nj.Moments(4, [0.0] * 3, a.var)), "b.mean", "list"
    )
    _, batch_stats = nj.batch_norm_init(3)
    mixed = a._replace(var=b.var)
    refuses(
        ValueError,
        lambda: nj.update_batch_stats(batch_stats, mixed),
        "moments.mean.shape=(3,)",
        "moments.var.shape=(2,)",
    )
    refuses(TypeError, lambda: nj.update_batch_stats(batch_stats, None), "moments of type NoneType")


@pytest.mark.parametrize("name", ["instance_norm", "filter_response_norm"])
@pytest.mark.parametrize("axes", [{"feature_axes": 0}, {"reduction_axes": (0, 1)}], ids=str)
def test_the_axis_of_the_examples_is_named_before_leaves_that_do_not_fit_either(name, axes):
    params, batch_stats = getattr(nj, f"{name}_init")(7)
    refuses(
        ValueError,
        lambda: getattr(nj, name)(params, batch_stats, jnp.ones((6, 3, 4)), True, **axes),
        "axis 0 holds the examples",
        "x.shape=(6, 3, 4)",
    )


@pytest.mark.parametrize("name", ["group_norm", "local_response_norm"])
def test_several_feature_axes_are_named_before_leaves_that_do_not_fit_either(name):
    params, batch_stats = getattr(nj, f"{name}_init")(7, use_scale=True)
    refuses(
        ValueError,
        lambda: getattr(nj, name)(
            params, batch_stats, jnp.ones((6, 3, 4)), True, feature_axes=(1, 2)
        ),
        "there is not exactly one feature axis",
        "feature_axes=(1, 2)",
    )


WITH_EPSILON = of(
    [
        case
        for case in CASES
        if case.variant == "plain"
        and case.layer.name not in ("local_response_norm", "dynamic_tanh")
    ]
)


@WITH_EPSILON
@pytest.mark.parametrize("train", [True, False])
def test_epsilon_may_be_a_jax_scalar_but_not_a_traced_one(case, train, rng):
    given = case.arguments(rng)

    def apply(epsilon):
        return case.apply(train, epsilon=epsilon)(*given)

    for scalar in (jnp.float32(0.25), np.float32(0.25), jnp.bfloat16(0.25)):
        assert_identical(apply(scalar), apply(0.25))
    words = (case.layer.name, "epsilon is traced", "Pass a Python float")
    refuses(TypeError, lambda: jax.jit(apply)(0.25), *words)
    refuses(TypeError, lambda: jax.grad(lambda e: apply(e)[0].sum())(0.25), *words)
    for value in (-1.0, jnp.float32(-1), jnp.float32(jnp.inf), float("nan")):
        refuses(ValueError, lambda value=value: apply(value), case.layer.name, "epsilon")
    for value in ("small", jnp.ones(2), None):
        refuses(
            (TypeError, ValueError), lambda value=value: apply(value), case.layer.name, "epsilon"
        )


@pytest.mark.slow
def test_other_numbers_are_named_when_they_are_traced():
    def lrn(**settings):
        return nj.local_response_norm({}, {}, jnp.ones((2, 4)), True, **settings)

    for name in ("alpha", "beta", "k"):
        assert_identical(lrn(**{name: jnp.float32(0.5)}), lrn(**{name: 0.5}))
        refuses(
            TypeError, lambda n=name: jax.jit(lambda v: lrn(**{n: v}))(0.5), f"{name} is traced"
        )
    params, _ = nj.rms_norm_init(4)
    refuses(
        TypeError,
        lambda: jax.jit(lambda o: nj.rms_norm(params, {}, jnp.ones(4), True, scale_offset=o))(1.0),
        "scale_offset is traced",
    )


EIGHT_BITS = (jnp.float8_e4m3fn, jnp.float8_e5m2)


@pytest.mark.slow
@of(CASES)
def test_x_of_eight_bits_is_normalized_in_float32(case, rng):
    """In one of the dtypes for each case, by turns."""
    dtype = EIGHT_BITS[CASES.index(case) % len(EIGHT_BITS)]
    params, batch_stats, x = case.arguments(rng)

    def run(x):
        def loss(x):
            y, _ = case.apply(True, dtype=jnp.float32)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y))

        modes = [case.apply(train)(params, batch_stats, x) for train in (True, False)]
        return modes, jax.grad(loss)(x)

    narrow = x.astype(dtype)
    modes, gradient = at_once(run, narrow)
    wide_modes, wide = at_once(run, narrow.astype(jnp.float32))
    for (y, new), (wide_y, wide_new) in zip(modes, wide_modes, strict=True):
        assert_identical(y, wide_y.astype(dtype))
        assert_identical(new, wide_new)
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    assert_close(gradient, wide, rtol=2 * eps, atol=8 * eps * tiny + 1e-5, dtype=dtype)


@LAYERS_OF_X
@pytest.mark.usefixtures("promotion_as_in_flax")
def test_adapters_take_x_of_eight_bits_with_a_dtype_for_y(adapter, rng):
    x = jnp.asarray(rng.normal(size=(6, 3, 4)), jnp.float8_e4m3fn)
    y = adapter.call(adapter.make(dtype=jnp.bfloat16), x)
    wide_y = adapter.call(adapter.make(dtype=jnp.bfloat16), x.astype(jnp.float32))
    assert_identical(y, wide_y)
    if adapter.name == "LocalResponseNorm":  # has no parameters
        return
    refuses(
        TypeError, lambda: adapter.call(adapter.make(), x), adapter.name, "float8_e4m3fn", "float32"
    )


@PLAIN
def test_arrays_in_the_hosts_memory_are_named(case, rng):
    given = dict(zip(("params", "batch_stats", "x"), case.arguments(rng), strict=True))
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    for name in [name for name, tree in given.items() if jax.tree.leaves(tree)]:
        moved = given | {name: jax.device_put(given[name], host)}
        named = "kernel" if case.layer.name in WEIGHTS and name == "x" else name

        def call(*arguments):
            return case.apply(True)(*arguments)

        for run in (call, jax.jit(call)):
            refuses(
                ValueError,
                lambda run=run, moved=moved: run(*moved.values()),
                case.layer.name,
                f"{named}",
                "in host memory",
                "<host>",
            )

        def back(*arguments):
            return call(*jax.device_put(arguments, jax.memory.Space.Device))

        jax.eval_shape(back, *moved.values())
