"""`moments` and `merge_moments` against float64, and the merge's algebra."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_finite, assert_identical, assert_trees_close

EPS = float(jnp.finfo(jnp.float32).eps)
# One pass is taken up to a mean of 8 standard deviations: (1 + 8^2) roundings of the variance, and
# a few for the sums.
ROUNDINGS = 100


@st.composite
def inputs(draw, dtype):
    """An array of rank 1 to 4, axes to reduce, and a mask that broadcasts or none."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    axes = draw(st.lists(st.sampled_from(range(len(shape))), unique=True, max_size=len(shape)))
    axes = tuple(axis - draw(st.sampled_from((0, len(shape)))) for axis in axes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(draw(st.sampled_from((0.0, 3.0, 100.0))), 1.0, shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    kept = tuple(draw(st.sampled_from((1, size))) for size in shape)[
        draw(st.integers(0, len(shape))) :
    ]
    mask = rng.random(kept) < 0.6 if draw(st.booleans()) else None
    return x.astype(dtype), axes, mask


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64, jnp.complex64)
over_rows = functools.partial(nj.moments, reduction_axes=0)


def masked(x, mask):
    return nj.moments(x, 0, mask=mask)


@pytest.mark.slow
@hypothesis.settings(max_examples=10)  # on each platform
@given(data=st.data())
def test_moments_are_those_of_float64_for_any_axes_and_mask(on_platform, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    x, axes, mask = data.draw(inputs(jnp.dtype(dtype)))

    def moments(x, mask):
        return nj.moments(x, axes, mask=mask)

    with jax.enable_x64(dtype == jnp.float64):
        actual = on_platform(moments, x, mask)
    expected = reference.moments(x, axes, mask)
    wide = {jnp.float64: np.float64, jnp.complex64: np.complex64}.get(dtype, np.float32)
    eps = float(np.finfo(wide).eps)
    largest = np.abs(reference.widest(x)).max()
    np.testing.assert_array_equal(
        np.broadcast_to(actual.count, expected.count.shape), expected.count
    )
    assert_close(actual.mean, expected.mean, atol=ROUNDINGS * eps * largest, dtype=wide)
    assert_close(
        actual.var,
        expected.var,
        rtol=ROUNDINGS * eps,
        atol=(ROUNDINGS * eps * largest) ** 2,
        dtype=np.finfo(wide).dtype,
    )


def check_huge_offset(x, actual):
    expected = reference.moments(x, 0)
    assert_close(actual.mean, expected.mean, rtol=8 * EPS)
    assert_close(actual.var, expected.var, rtol=1e-5)


def test_a_huge_offset_costs_no_variance(on_platform, rng):
    x = rng.normal(1e4, 1, (4096, 3)).astype(np.float32)
    check_huge_offset(x, on_platform(over_rows, x))


def test_a_huge_offset_costs_no_variance_without_jit(rng):
    x = rng.normal(1e4, 1, (4096, 3)).astype(np.float32)
    check_huge_offset(x, over_rows(jnp.asarray(x)))


def test_one_feature_far_off_does_not_disturb_the_others(on_platform, rng):
    x = (rng.normal(size=(512, 4)) * [1e-3, 1, 1, 10] + [0, 0, 1e5, -1e6]).astype(np.float32)
    assert_close(on_platform(over_rows, x).var, reference.moments(x, 0).var, rtol=1e-5)


def test_float16_at_60000_does_not_overflow(on_platform, rng):
    x = (60_000 + 32 * rng.integers(-8, 9, (1000, 2))).astype(np.float16)
    actual, expected = on_platform(over_rows, x), reference.moments(x, 0)
    assert_close(actual.mean, expected.mean, rtol=8 * EPS, dtype=jnp.float32)
    assert_close(actual.var, expected.var, rtol=1e-5, dtype=jnp.float32)


def test_what_the_mask_hides_may_be_anything(on_platform, rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    mask = rng.random((8, 3)) < 0.5
    garbage = rng.choice([np.nan, np.inf, -np.inf, 3e38], (8, 3)).astype(np.float32)
    run = on_platform.compiled(masked, x, mask)
    assert_identical(run(np.where(mask, x, garbage), mask), run(x, mask))


@pytest.mark.slow
def test_where_nothing_counts_moments_are_zero_and_finite(on_platform):
    nothing = nj.Moments(*jnp.zeros((3, 2)))
    x, mask = jnp.full((4, 2), jnp.nan), jnp.zeros((4, 1), bool)
    assert_identical(on_platform(masked, x, mask), nothing)
    assert_identical(on_platform(over_rows, x[:0]), nothing)


def test_a_nan_that_counts_shows(on_platform):
    x = jnp.ones((4, 2)).at[1, 0].set(jnp.nan)
    _, mean, var = on_platform(over_rows, x)
    assert jnp.isnan(mean[0]) and jnp.isnan(var[0])
    assert_close(mean[1], 1.0)
    assert_close(var[1], 0.0)


@pytest.mark.parametrize("axes", [2, -3, (0, -2), (0, 0)], ids=str)
def test_axes_out_of_range_or_repeated_are_refused(axes):
    with pytest.raises(ValueError, match=r"moments: .*reduction_axes=.* for x.shape=\(4, 2\)"):
        jax.eval_shape(lambda x: nj.moments(x, axes), jnp.zeros((4, 2)))


def parts(rng, count=3):
    """Moments of disjoint sets of different size, offset and scale, and of their union."""
    sets = [rng.normal(5 * k, 1 + k, (2 + 3 * k, 4)).astype(np.float32) for k in range(count)]
    return [nj.moments(jnp.asarray(x), 0) for x in sets], reference.moments(np.concatenate(sets), 0)


@pytest.mark.slow
def test_the_merge_is_the_moments_of_the_union_in_any_order_and_grouping(rng):
    sets, expected = parts(rng)
    a, b, c = sets
    merges = [functools.reduce(nj.merge_moments, order) for order in itertools.permutations(sets)]
    for merged in [*merges, nj.merge_moments(a, nj.merge_moments(b, c))]:
        assert_close(merged.count, expected.count)
        assert_close(merged.mean, expected.mean, rtol=ROUNDINGS * EPS)
        assert_close(merged.var, expected.var, rtol=ROUNDINGS * EPS)


def test_the_merge_commutes_bit_for_bit(rng):
    (a, b), _ = parts(rng, 2)
    assert_identical(nj.merge_moments(a, b), nj.merge_moments(b, a))


def test_the_merge_of_halves_far_from_zero_keeps_the_variance(rng):
    x = rng.normal(1e4, 1, (2, 1000, 3)).astype(np.float32)
    a, b = (nj.moments(jnp.asarray(half), 0) for half in x)
    # A quarter of the squared distance of the halves' means adds to the variance; each mean is
    # rounded to half a ulp.
    distance = np.abs(np.diff(x.mean(1, dtype=np.float64), axis=0)).max()
    rounded = distance / 2 * (1e4 * EPS)
    assert_close(
        nj.merge_moments(a, b).var, reference.moments(x, (0, 1)).var, rtol=1e-5, atol=rounded
    )


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_an_empty_set_changes_nothing_whatever_its_mean_and_variance(rng, garbage):
    (a,), _ = parts(rng, 1)
    empty = nj.Moments(
        jnp.zeros(4), jnp.full(4, garbage, jnp.float32), jnp.full(4, garbage, jnp.float32)
    )
    assert_identical(nj.merge_moments(a, empty), a)
    assert_identical(nj.merge_moments(empty, a), a)


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_an_empty_set_leaves_no_trace_in_the_gradient_of_a_merge(rng, garbage):
    (a,), _ = parts(rng, 1)
    empty = nj.Moments(
        jnp.zeros(4), jnp.full(4, garbage, jnp.float32), jnp.full(4, garbage, jnp.float32)
    )

    def loss(mean, other):
        _, merged_mean, merged_var = nj.merge_moments(a._replace(mean=mean), other)
        return jnp.sum(merged_mean + merged_var)

    # The union is `a` itself: its mean has derivative 1, its variance does not depend on its own
    # mean.
    assert_close(jax.grad(loss)(a.mean, empty), np.ones(4))


def test_merging_empty_sets_is_empty_and_finite():
    empty = nj.Moments(*jnp.zeros((3, 4)))
    assert_identical(nj.merge_moments(empty, empty), empty)


def test_features_are_merged_each_with_its_own_count(rng):
    x = rng.normal(3, 2, (12, 4)).astype(np.float32)
    mask = rng.random((12, 4)) < 0.5
    mask[:6, 0] = mask[:, 1] = False
    halves = [
        nj.moments(jnp.asarray(x[s]), 0, mask=jnp.asarray(mask[s]))
        for s in (slice(6), slice(6, 12))
    ]
    expected = reference.moments(x, 0, mask)
    assert_trees_close(
        tuple(nj.merge_moments(*halves)), tuple(expected), rtol=ROUNDINGS * EPS, atol=EPS
    )


@pytest.mark.slow
def test_complex_moments_merge_too(rng):
    x = (rng.normal(size=(9, 2)) + 1j * rng.normal(2, 1, (9, 2))).astype(np.complex64)
    merged = nj.merge_moments(nj.moments(jnp.asarray(x[:4]), 0), nj.moments(jnp.asarray(x[4:]), 0))
    assert_trees_close(tuple(merged), tuple(reference.moments(x, 0)), rtol=ROUNDINGS * EPS)


@pytest.mark.slow
def test_the_derivative_of_moments_is_that_of_their_definition(on_platform, rng):
    x = rng.normal(1, 2, (6, 2))
    mask = rng.random((6, 2)) < 0.7
    n = mask.sum(0)
    with jax.enable_x64(True):
        _, mean, var = on_platform(jax.jacobian(masked), x, mask)
    for feature in range(2):
        deviation = np.where(mask, x - reference.moments(x, 0, mask).mean, 0)
        assert_close(mean[feature, :, feature], mask[:, feature] / n[feature], rtol=1e-14)
        assert_close(var[feature, :, feature], 2 * deviation[:, feature] / n[feature], rtol=1e-13)
        assert_close(mean[feature, :, 1 - feature], np.zeros(6))


@pytest.mark.slow
def test_gradients_of_moments_are_finite_where_the_mask_hides_nan(on_platform):
    def total(x, mask):
        return sum(jnp.sum(part) for part in masked(x, mask))

    x = jnp.full((4, 2), jnp.nan).at[:2].set(1.5)
    assert_finite(on_platform(jax.grad(total), x, (jnp.arange(4) < 2)[:, None]))


def one_by_one(start, values):
    """Merges single elements into `start`, one after the other."""

    def step(total, value):
        one = nj.Moments(jnp.ones_like(total.count), value, jnp.zeros_like(value))
        return nj.merge_moments(total, one), None

    return jax.jit(lambda start, values: jax.lax.scan(step, start, values)[0])(start, values)


def test_counts_that_are_ints_are_exact_beyond_float32(rng):
    start = nj.Moments(jnp.int32([2**24]), jnp.float32([3]), jnp.float32([2]))
    values = rng.normal(1e3, 1, (5000, 1)).astype(np.float32)
    merged = one_by_one(start, jnp.asarray(values))
    n, wide = 2.0**24, np.float64(values)
    total = n + len(values)
    mean = (3 * n + wide.sum(0)) / total
    var = (n * (2 + (3 - mean) ** 2) + ((wide - mean) ** 2).sum(0)) / total
    assert_identical(merged.count, jnp.int32([2**24 + 5000]))
    assert_close(merged.mean, mean, rtol=1e-4)
    assert_close(merged.var, var, rtol=1e-4)


def test_an_int_count_stops_at_the_largest_one():
    one = nj.Moments(jnp.int32(2**31 - 3), jnp.float32(1), jnp.float32(1))
    for other in (one, one._replace(count=jnp.int32(5))):
        assert_identical(nj.merge_moments(one, other).count, jnp.int32(2**31 - 1))


def test_a_mean_does_not_drift_over_many_small_sets():
    start = nj.Moments(jnp.float32([12345678]), jnp.float32([3.1]), jnp.float32([0]))
    merged = one_by_one(start, jnp.full((100_000, 1), 3.1, jnp.float32))
    assert_identical(merged.mean, start.mean)
    assert_identical(merged.var, start.var)


def test_a_mask_of_more_than_2_to_24_elements_is_counted_exactly():
    """Added up in float32 they may stop counting there."""
    size = 2**24 + 2
    x, mask = jnp.zeros((2, size), jnp.float16), jnp.ones((2, size), bool)
    assert nj.moments(x, (0, 1), mask=mask).count == 2 * size
