"""`batch_norm` against the formula in float64, and its contract on inputs and outputs."""

from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_identical, assert_same_kind, assert_trees_close
from tests.layers.cases import DTYPES, cases, check_against_reference, small

EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.mark.slow
@hypothesis.settings(max_examples=15)
@given(data=st.data())
def test_it_computes_the_formula_for_any_arguments(on_platform, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    with jax.enable_x64(dtype == jnp.float64):
        check_against_reference(on_platform, data.draw(cases(dtype)))


def in_both_modes(params, batch_stats, x):
    return [nj.batch_norm(params, batch_stats, x, train) for train in (True, False)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_the_formula_for_a_plain_batch(on_platform, rng, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        wide = jnp.dtype(dtype) if jnp.dtype(dtype).itemsize > 2 else jnp.dtype(jnp.float32)
        params, batch_stats, x = small(rng, dtype=wide)
        batch_stats["var"] = jnp.abs(batch_stats["var"])
        x = x.astype(dtype)
        outcomes = on_platform(in_both_modes, params, batch_stats, x)
        for train, (y, new) in zip((True, False), outcomes, strict=True):
            expected, expected_new = reference.batch_norm(params, batch_stats, x, train)
            assert_close(
                y,
                expected,
                rtol=4 * jnp.finfo(dtype).eps,
                atol=100 * jnp.finfo(wide).eps,
                dtype=dtype,
            )
            assert_trees_close(new, expected_new, rtol=100 * float(jnp.finfo(wide).eps))
            assert_same_kind(new, batch_stats)


@pytest.mark.parametrize("leaf", ["scale", "bias", None])
def test_an_absent_leaf_is_left_out_of_the_formula(on_platform, rng, leaf):
    params, batch_stats, x = small(rng)
    params = {name: value for name, value in params.items() if name == leaf}
    outcomes = on_platform(in_both_modes, params, batch_stats, x)
    for train, (y, _) in zip((True, False), outcomes, strict=True):
        assert_close(y, reference.batch_norm(params, batch_stats, x, train)[0], atol=1e-5)


def test_evaluation_returns_the_statistics_unchanged(rng):
    params, batch_stats, x = small(rng)
    batch_stats["count"] = jnp.array(3, jnp.int32)
    for momentum in (0.5, None):
        assert_identical(
            nj.batch_norm(params, batch_stats, x, False, momentum=momentum)[1], batch_stats
        )


def test_evaluation_after_training_applies_the_statistics_of_training(rng):
    params, batch_stats = nj.batch_norm_init(3)
    for mean in (1.0, 2.0, 3.0):
        _, batch_stats = nj.batch_norm(
            params, batch_stats, small(rng, mean=mean)[2], True, momentum=0.5
        )
    x = small(rng)[2]
    y, _ = nj.batch_norm(params, batch_stats, x, False)
    by_hand = (np.float64(x) - np.float64(batch_stats["mean"])) / np.sqrt(
        np.float64(batch_stats["var"]) + 1e-5
    )
    assert_close(y, by_hand, atol=16 * EPS * np.abs(by_hand).max())


def test_nothing_is_mutated(rng):
    arguments = small(rng)
    copies = jax.tree.map(jnp.copy, arguments)
    nj.batch_norm(*arguments, True)
    assert_identical(arguments, copies)


@pytest.mark.parametrize("train", [True, False])
def test_numpy_arguments_do(rng, train):
    arguments = small(rng)
    assert_identical(
        nj.batch_norm(*jax.tree.map(np.asarray, arguments), train), nj.batch_norm(*arguments, train)
    )


def test_several_feature_axes_mean_the_same_in_any_order_and_sign(on_platform, rng):
    x = jnp.asarray(rng.normal(size=(4, 3, 5, 2)), jnp.float32)
    params = {"scale": jnp.arange(6.0, dtype=jnp.float32).reshape(3, 2), "bias": jnp.ones((3, 2))}
    _, batch_stats = nj.batch_norm_init((3, 2))
    orders = [(1, 3), (3, 1), (-1, 1), (-3, -1), [3, -3]]

    def in_each_order(params, batch_stats, x):
        layer = partial(nj.batch_norm, params, batch_stats, x, True)
        return [layer(feature_axes=feature_axes) for feature_axes in orders]

    flat = x.transpose(0, 2, 1, 3).reshape(20, 6)
    expected, expected_new = reference.batch_norm(
        *jax.tree.map(jnp.ravel, (params, batch_stats)), flat, True
    )
    for y, new in on_platform(in_each_order, params, batch_stats, x):
        assert new["mean"].shape == (3, 2)
        assert_close(y.transpose(0, 2, 1, 3).reshape(20, 6), expected, atol=1e-5)
        assert_trees_close(jax.tree.map(jnp.ravel, new), expected_new, rtol=1e-5, atol=EPS)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "given, returned", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)], ids=str
)
def test_the_dtype_argument_is_that_of_y_and_of_nothing_else(
    on_platform, rng, given, returned, train
):
    params, batch_stats, x = small(rng)
    x = x.astype(given)

    def narrow_and_wide(params, batch_stats, x):
        layer = partial(nj.batch_norm, params, batch_stats, train=train)
        return layer(x=x, dtype=returned), layer(x=x.astype(jnp.float32))

    (y, new), (wide, wide_new) = on_platform(narrow_and_wide, params, batch_stats, x)
    assert_close(
        y, wide.astype(returned), rtol=float(jnp.finfo(returned).eps), atol=8 * EPS, dtype=returned
    )
    assert_trees_close(new, wide_new, rtol=8 * EPS)


@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_that_counts_shows_in_its_feature_alone(on_platform, rng, masked):
    params, batch_stats, x = given = small(rng)
    mask = jnp.ones((8, 1), bool) if masked else None
    run = on_platform.compiled(partial(nj.batch_norm, train=True, mask=mask), *given)
    y, new = run(params, batch_stats, x.at[2, 1].set(jnp.nan))
    assert jnp.isnan(y[:, 1]).all() and jnp.isnan(new["mean"][1]) and jnp.isnan(new["var"][1])
    clean, clean_new = run(*given)
    rest = jnp.array([0, 2])
    # The NaN calls for a second pass, which rounds the others' statistics otherwise: relative
    # errors, then a sum.
    assert_close(y[:, rest], clean[:, rest], rtol=16 * EPS, atol=16 * EPS)
    assert_close(new["mean"][rest], clean_new["mean"][rest], rtol=4 * EPS)


@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_shows_at_evaluation_unless_it_is_masked(on_platform, rng, masked):
    params, batch_stats, x = small(rng)
    x = x.at[2, 1].set(jnp.nan)
    mask = jnp.ones((8, 1), bool) if masked else None
    layer = partial(nj.batch_norm, train=False, mask=mask)
    y, _ = on_platform(layer, params, batch_stats, x)
    assert_identical(jnp.isnan(y), jnp.isnan(x))


def test_momentum_may_be_a_traced_schedule(rng):
    arguments = small(rng)
    traced = jax.jit(lambda momentum: nj.batch_norm(*arguments, True, momentum=momentum)[1])(
        jnp.float32(0.3)
    )
    # Two programs: whether a product and a difference are rounded once or twice shows in a variance
    # around zero.
    assert_trees_close(traced, nj.batch_norm(*arguments, True, momentum=0.3)[1], rtol=16 * EPS)


def test_the_start_is_the_identity_at_evaluation_but_for_epsilon(rng):
    x = small(rng)[2]
    y, _ = nj.batch_norm(*nj.batch_norm_init(3), x, False, epsilon=0.0)
    assert_identical(y, x)


def test_init_makes_the_leaves_that_were_asked_for():
    params, batch_stats = nj.batch_norm_init((2, 3), use_bias=False, count=True)
    assert_identical(params, {"scale": jnp.ones((2, 3))})
    assert_identical(
        batch_stats, {"mean": jnp.zeros((2, 3)), "var": jnp.ones((2, 3)), "count": jnp.int32(0)}
    )
    assert nj.batch_norm_init(2, use_bias=False, use_scale=False)[0] == {}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_init_keeps_param_dtype_and_at_least_float32_for_statistics(dtype):
    params, batch_stats = nj.batch_norm_init(2, param_dtype=dtype)
    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    assert params["scale"].dtype == params["bias"].dtype == dtype
    assert (batch_stats["mean"].dtype, batch_stats["var"].dtype) == (wide, jnp.float32)


@pytest.mark.slow
def test_init_hands_each_random_initializer_a_key_of_its_own():
    normal = jax.nn.initializers.normal(1.0)
    make = lambda key: nj.batch_norm_init(64, scale_init=normal, bias_init=normal, key=key)[0]  # noqa: E731
    params = make(jax.random.key(0))
    assert not jnp.allclose(params["scale"], params["bias"])
    assert not jnp.allclose(params["scale"], make(jax.random.key(1))["scale"])
    assert 0.5 < params["scale"].std() < 1.5


def test_no_feature_axes_is_one_mean_and_variance_of_all(on_platform):
    layer = partial(nj.batch_norm, train=True, feature_axes=(), momentum=0.0)
    y, new = on_platform(layer, *nj.batch_norm_init(()), jnp.arange(12.0).reshape(4, 3))
    assert_close(new["mean"], np.float64(5.5), rtol=EPS)
    assert_close(new["var"], np.arange(12.0).var(), rtol=4 * EPS)
    assert_close(y.std(), np.float64(1), rtol=1e-5)
