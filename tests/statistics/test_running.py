"""`update_batch_stats` against closed form, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_identical, assert_same_kind, assert_trees_close

EPS = float(jnp.finfo(jnp.float32).eps)
STEPS = 100


def batches(rng, size=5):
    """STEPS batches that wander: their means and variances are all different."""
    drift = np.arange(STEPS)[:, None, None] / STEPS
    return (rng.normal(size=(STEPS, size, 3)) * (1 + drift) + 3 * drift).astype(np.float32)


def closed_form(xs, momentum, running_var):
    """Returns the weighted sum over all batches; the start has the weight momentum ** steps."""
    steps, size = len(xs), xs.shape[1]
    mean, var = (
        xs.astype(np.float64).mean(1),
        xs.astype(np.float64).var(1, ddof=running_var == "unbiased"),
    )
    assert size > 1
    if momentum is None:
        return {"mean": mean.mean(0), "var": var.mean(0)}
    weights = (1 - momentum) * momentum ** np.arange(steps)[::-1]
    return {"mean": weights @ mean, "var": weights @ var + momentum**steps}


def start(count=False):
    return nj.batch_norm_init(3, count=count)[1]


@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize("momentum", [0.9, 0.99, None, 0.0, 1.0])
def test_running_statistics_at_steps_1_10_and_100_are_the_closed_form(rng, momentum, running_var):
    xs = batches(rng)
    update = jax.jit(
        functools.partial(nj.update_batch_stats, momentum=momentum, running_var=running_var)
    )
    batch_stats = start(count=momentum is None)
    for step, x in enumerate(jnp.asarray(xs), 1):
        batch_stats = update(batch_stats, nj.moments(x, 0))
        if step in (1, 10, 100):
            expected = closed_form(xs[:step], momentum, running_var)
            # Each of the steps rounds the running value twice or thrice, and the batch's own
            # moments once.
            for leaf in ("mean", "var"):
                assert_close(
                    batch_stats[leaf], expected[leaf], rtol=(4 + 3 * step**0.5) * EPS, atol=8 * EPS
                )
            if momentum is None:
                assert batch_stats["count"] == step


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.9, None])
def test_float64_statistics_keep_their_precision(rng, momentum):
    xs = batches(rng)[:10].astype(np.float64)
    with jax.enable_x64(True):
        batch_stats = nj.batch_norm_init(3, param_dtype=jnp.float64, count=True)[1]
        for x in jnp.asarray(xs):
            batch_stats = nj.update_batch_stats(batch_stats, nj.moments(x, 0), momentum=momentum)
    expected = closed_form(xs, momentum, "biased")
    assert_close(batch_stats["mean"], expected["mean"], rtol=1e-14, atol=1e-14, dtype=jnp.float64)
    assert_close(batch_stats["var"], expected["var"], rtol=1e-13, dtype=jnp.float64)


def test_scan_carries_running_statistics_as_a_loop_would(rng):
    xs = jnp.asarray(batches(rng))

    def step(batch_stats, x):
        return nj.update_batch_stats(batch_stats, nj.moments(x, 0), momentum=None), None

    final, _ = jax.lax.scan(step, start(count=True), xs)
    assert_same_kind(final, start(count=True))
    expected = closed_form(np.asarray(xs), None, "biased") | {"count": STEPS}
    assert_trees_close(final, expected, rtol=40 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
def test_an_empty_batch_leaves_everything_count_included(rng, momentum, running_var):
    batch_stats = {
        "mean": jnp.asarray(rng.normal(size=3), jnp.float32),
        "var": jnp.asarray(rng.gamma(1, size=3), jnp.float32),
        "count": jnp.array(7, jnp.int32),
    }
    for garbage in (0.0, jnp.nan, jnp.inf):
        empty = nj.Moments(jnp.zeros(3), jnp.full(3, garbage), jnp.full(3, garbage))
        new = nj.update_batch_stats(batch_stats, empty, momentum=momentum, running_var=running_var)
        assert_identical(new, batch_stats)


def test_a_count_is_kept_with_a_fixed_momentum_too():
    batch_stats = nj.update_batch_stats(
        start(count=True), nj.moments(jnp.ones((2, 3)), 0), momentum=0.9
    )
    assert batch_stats["count"] == 1


def test_features_that_nothing_counts_for_keep_their_values():
    seen = nj.Moments(jnp.array([4.0, 0.0, 1.0]), jnp.full(3, 2.0), jnp.array([3.0, 3.0, 0.0]))
    new = nj.update_batch_stats(start(), seen, momentum=0.5, running_var="unbiased")
    assert_close(new["mean"], np.array([1.0, 0.0, 1.0]))
    # 4 elements: (1 + 3 * 4 / 3) / 2; none: as it was; one: no unbiased variance, so as it was.
    assert_close(new["var"], np.array([2.5, 1.0, 1.0]))


@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_microbatches_merged_and_updated_once_equal_the_whole_batch(rng, momentum, running_var):
    x = rng.normal(3, 2, (24, 3)).astype(np.float32)
    settings = {"momentum": momentum, "running_var": running_var}
    microbatches = [nj.moments(jnp.asarray(part), 0) for part in np.split(x, [4, 12, 20])]
    merged = functools.reduce(nj.merge_moments, microbatches)
    accumulated = nj.update_batch_stats(start(count=True), merged, **settings)
    whole = nj.update_batch_stats(start(count=True), nj.moments(jnp.asarray(x), 0), **settings)
    assert_trees_close(accumulated, whole, rtol=16 * EPS)
    assert_trees_close(
        whole, reference.update(start(count=True), reference.moments(x, 0), **settings), rtol=1e-5
    )


def test_momentum_may_be_traced_as_on_a_schedule(rng):
    seen = nj.moments(jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), 0)
    traced = jax.jit(lambda momentum: nj.update_batch_stats(start(), seen, momentum=momentum))(
        jnp.float32(0.25)
    )
    assert_trees_close(traced, nj.update_batch_stats(start(), seen, momentum=0.25), rtol=4 * EPS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_dtypes_of_the_running_statistics_are_those_of_the_old(dtype):
    """Float32, whatever x is."""
    moments = nj.moments(jnp.ones((2, 3), dtype), 0)
    new = nj.update_batch_stats(start(), moments, momentum=0.5)
    assert_same_kind(new, start())
    assert_close(new["mean"], np.full(3, 0.5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_coarse_running_statistics_are_named(dtype):
    batch_stats = jax.tree.map(lambda leaf: leaf.astype(dtype), start())
    with pytest.raises(TypeError, match=f"too imprecise to train with.*{dtype.__name__}"):
        nj.update_batch_stats(batch_stats, nj.moments(jnp.ones((2, 3)), 0), momentum=0.5)


def test_unfit_arguments_are_refused_with_their_values():
    seen = nj.moments(jnp.ones((2, 3)), 0)
    with pytest.raises(ValueError, match="update_batch_stats: .*1.5"):
        nj.update_batch_stats(start(), seen, momentum=1.5)
    with pytest.raises(ValueError, match="update_batch_stats: .*'unbaised'"):
        nj.update_batch_stats(start(), seen, running_var="unbaised")
    with pytest.raises(ValueError, match="update_batch_stats: .*'mean', 'var'"):
        nj.update_batch_stats(start(), seen, momentum=None)
    with pytest.raises(ValueError, match=r"update_batch_stats: .*\(3,\).*\(4,\)"):
        nj.update_batch_stats(nj.batch_norm_init(4)[1], seen)
