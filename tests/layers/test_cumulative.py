"""Group norm whose statistics grow along time: the formula, causality, paddings, precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference_family as family
from tests.compare import assert_close, assert_identical, widest

SHAPE, TIME = (3, 7, 2, 4), 1
GROUPS = {"num_groups": 2}
EPSILON = 1e-3  # Gemma 3n's
causal = partial(nj.group_norm, train=True, cumulative_axis=TIME, epsilon=EPSILON, **GROUPS)


def draw(rng, mean=0.5, dtype=jnp.float32):
    return jnp.asarray(rng.normal(mean, 1, SHAPE), dtype)


def expected(x, mask=True, axis=TIME, **groups):
    mean, var = family.cumulative_moments(x, axis, mask=mask, **GROUPS | groups)
    return (family.cleaned(x, mask) - mean) / np.sqrt(var + EPSILON)


def paddings(rng):
    """Of shape (batch, time): examples of several lengths, and one that begins late."""
    lengths = np.array([7, 4, 7])[:, None]
    steps = np.arange(SHAPE[TIME])
    return ((steps >= lengths) | ((steps < 3) & (np.arange(3)[:, None] == 2))).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_it_is_the_formula_with_paddings_and_without(on_platform, rng, dtype):
    x, mask = draw(rng, dtype=dtype), (paddings(rng) == 0)[..., None, None]
    hidden = jnp.where(mask, x, jnp.nan)
    y, masked = on_platform.quickly(
        lambda x, hidden: (causal({}, {}, x)[0], causal({}, {}, hidden, mask=mask)[0]), x, hidden
    )
    precision = 4 * float(jnp.finfo(dtype).eps)
    assert_close(y, expected(x), rtol=precision, atol=1e-5, dtype=dtype)
    wanted = np.where(mask, expected(hidden, mask), 0)
    assert_close(masked, wanted, rtol=precision, atol=1e-5, dtype=dtype)


def test_time_may_be_any_axis_but_that_of_the_channels(on_platform, rng):
    x = draw(rng)
    first = jnp.moveaxis(x, (0, 1, 3), (1, 0, 2))  # (time, batch, channels, space)
    y, _ = on_platform(
        partial(
            nj.group_norm, {}, {}, train=True, cumulative_axis=-4, reduction_axes=(0, 2, 3),
            feature_axes=2, epsilon=EPSILON, num_groups=2,
        ),
        first,
    )  # fmt: skip
    assert_close(jnp.moveaxis(y, (1, 0, 2), (0, 1, 3)), expected(x), atol=1e-5)
    for axis in (3, 0, (1, 2), 4, "time"):
        with pytest.raises((ValueError, TypeError), match="group_norm.*cumulative_axis"):
            nj.group_norm({}, {}, x, True, num_groups=2, cumulative_axis=axis)


def test_y_does_not_depend_on_what_comes_later_in_any_bit(on_platform, rng):
    x, mask = draw(rng, 10.0), (paddings(rng) == 0)[..., None, None]

    def both(x):
        return causal({}, {}, x)[0], causal({}, {}, x, mask=mask)[0]

    run = on_platform.quickly.compiled(both, x)
    whole = run(x)
    for later in (1e4, 1e30, jnp.nan, -jnp.inf):
        for cut in (1, 4):
            parts = zip(run(x.at[:, cut:].set(later)), whole, strict=True)
            for part, given in parts:
                assert_identical(part[:, :cut], given[:, :cut], case=f"{later} from {cut}")


def test_gradients_flow_from_later_to_earlier_alone(on_platform, rng):
    x, weight = draw(rng), draw(rng)

    def loss(x):
        return jnp.sum((weight * causal({}, {}, x)[0])[:, 3])

    gradient = on_platform.quickly(jax.grad(loss), x)
    assert_identical(gradient[:, 4:], jnp.zeros_like(gradient[:, 4:]))
    assert (np.abs(gradient[:, :4]).max((2, 3)) > 1e-4).all()


def test_at_the_last_position_it_is_group_norm(rng):
    x, mask = draw(rng), (paddings(rng) == 0)[..., None, None]
    plain = partial(nj.group_norm, {}, {}, x, True, epsilon=EPSILON, **GROUPS)
    for given in ({}, {"mask": mask}):
        y, _ = causal({}, {}, x, **given)
        assert_close(y[:, -1], plain(**given)[0][:, -1], atol=2e-6)


def test_before_anything_counts_the_mean_is_0_and_the_variance_1(rng):
    x, mask = draw(rng), (paddings(rng) == 0)[..., None, None]
    y, _ = causal({}, {}, x, mask=mask)
    assert_close(y[2, :3], x[2, :3] / np.sqrt(1 + EPSILON), rtol=1e-6)
    nothing = causal({}, {}, x, mask=mask & False)[0]
    assert_close(nothing, x / np.sqrt(1 + EPSILON), rtol=1e-6)


def variance_seen(y, x):
    """The variance and epsilon that y of the two channels of a group was divided by."""
    apart = (widest(x)[..., 0] - widest(x)[..., 1]) / (widest(y)[..., 0] - widest(y)[..., 1])
    return apart**2


def test_the_variance_is_right_far_from_zero_and_where_the_mean_moves(on_platform, rng):
    """To 5e-5 of var + epsilon; x is apart within a group, so that y shows its divisor."""
    steps = np.arange(300)[:, None]
    means = {
        "far": 1e4 + 0 * steps,
        "jump": np.where(steps < 1, 300.0, -200.0),
        "drift": 1e3 + 0.05 * steps,
        "silence": np.where(steps < 100, -25.0, 5.0),
    }
    apart = np.array([-0.7, 0.7]) + 0.01 * rng.normal(size=(4, 300, 2))
    x = jnp.asarray(np.stack([*means.values()]) + apart, jnp.float32)
    y, _ = on_platform(partial(causal, {}, {}, num_groups=1), x)
    _, var = family.cumulative_moments(x, TIME, num_groups=1)
    # The difference of two y has no error of the mean.
    for path, seen, wanted in zip(means, variance_seen(y, x), var[..., 0] + EPSILON, strict=True):
        assert_close(seen, wanted, rtol=5e-5, case=path)


def test_it_is_not_what_gemma_adds_up(rng):
    """Squares around each position's own mean miss that the mean moves."""
    x = jnp.asarray(np.linspace(0, 5, 6)[None, :, None] + np.zeros((1, 6, 2)), jnp.float32)
    means = np.cumsum(widest(x).mean(-1, keepdims=True), 1) / np.arange(1, 7)[:, None]
    theirs = np.cumsum(((widest(x) - means) ** 2).mean(-1), 1) / np.arange(1, 7)
    y, _ = nj.group_norm({}, {}, x, True, num_groups=1, cumulative_axis=1, epsilon=0.0)
    ours = ((widest(x) - means) / np.where(y == 0, 1, widest(y)))[0, 1:, 0] ** 2
    assert_close(ours, [widest(x)[0, : t + 1].var() for t in range(1, 6)], rtol=1e-5)
    assert (theirs[0, 1:] < 0.8 * ours).all()


def test_y_and_gradients_of_large_and_small_numbers(on_platform, rng):
    x, weight = widest(draw(rng)), draw(rng)

    def both(x):
        return causal({}, {}, x)[0], jax.grad(lambda x: jnp.sum(weight * causal({}, {}, x)[0]))(x)

    run = on_platform.quickly.compiled(both, jnp.asarray(x, jnp.float32))
    at_one = widest(run(jnp.asarray(1e3 * x, jnp.float32))[1]) * 1e3
    for scale in (1e-25, 1e-10, 1e6, 1e25):
        given = jnp.asarray(scale * x, jnp.float32)
        y, gradient = run(given)
        wanted = expected(given)
        assert_close(y, wanted, atol=1e-5 * np.abs(wanted).max(), case=scale)
        if scale > 1:
            close = 2e-5 * np.abs(at_one).max()
            assert_close(widest(gradient) * scale, at_one, atol=close, case=scale)


@pytest.mark.slow
def test_time_may_be_sharded(rng):
    x = jnp.asarray(rng.normal(3, 1, (2, 16, 4)), jnp.float32)
    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "time")
    cut = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    run = jax.jit(lambda x: causal({}, {}, x)[0])
    assert_close(run(cut), run(x), atol=1e-5)
