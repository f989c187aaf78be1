"""The running normalizer: the formulas of reinforcement learning, its count, masks and devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close, widest

FEATURES = 3
run = partial(nj.running_norm, {})


class RunningMeanStd:
    """Mean and variance as Stable-Baselines3 and Gymnasium keep them, in float64."""

    def __init__(self, count, shape=(FEATURES,)):
        self.mean, self.var, self.count = np.zeros(shape), np.ones(shape), count

    def update(self, x, weights=None):
        weights = np.ones(len(x)) if weights is None else np.float64(weights)
        n, total = weights.sum(), self.count + weights.sum()
        mean = np.tensordot(weights, widest(x), 1) / n
        var = np.tensordot(weights, (widest(x) - mean) ** 2, 1) / n
        apart = mean - self.mean
        spread = self.var * self.count + var * n + apart**2 * self.count * n / total
        self.mean, self.var, self.count = self.mean + apart * n / total, spread / total, total


def batches(rng, number=20, size=8):
    """Observations of several scales, whose distribution drifts."""
    drift = np.linspace(0, 2, number)[:, None, None]
    x = rng.normal([1.0, 50.0, -0.3], [1.0, 2.0, 0.01], (number, size, FEATURES)) + drift
    return jnp.asarray(x, jnp.float32)


def fresh(**settings):
    return nj.running_norm_init(FEATURES, **settings)[1]


def exact(batch_stats, leaf):
    return widest(batch_stats[leaf]) + widest(batch_stats[f"{leaf}_rest"])


@pytest.mark.parametrize("initial_count", [0.0, 1e-4])
def test_it_is_the_formula_batch_after_batch(on_platform, rng, initial_count):
    theirs = RunningMeanStd(initial_count)
    batch_stats = fresh(initial_count=initial_count)
    xs = batches(rng)
    step = on_platform.compiled(partial(run, train=True, clip=2.0), batch_stats, xs[0])
    for x in xs:
        theirs.update(x)
        y, batch_stats = step(batch_stats, x)
        wanted = (widest(x) - theirs.mean) / np.sqrt(theirs.var + 1e-8)
        assert_close(y, np.clip(wanted, -2, 2), atol=1e-4)
    for leaf in ("mean", "var", "count"):
        assert_close(exact(batch_stats, leaf), getattr(theirs, leaf), rtol=1e-5)
    y, same = run(batch_stats, xs[0], False)
    assert_close(y, (widest(xs[0]) - theirs.mean) / np.sqrt(theirs.var + 1e-8), atol=1e-3)
    assert_identical(same, batch_stats)


def test_rewards_are_divided_by_the_deviation_of_returns(rng):
    theirs, returns = RunningMeanStd(1e-4, ()), jnp.zeros(4)
    batch_stats = nj.running_norm_init((), initial_count=1e-4)[1]
    settings = {"feature_axes": (), "center": False}
    for rewards in rng.normal(1, 2, (30, 4)).astype(np.float32):
        returns = 0.9 * returns + rewards
        theirs.update(returns)
        _, batch_stats = run(batch_stats, returns, True, **settings)
        y, _ = run(batch_stats, jnp.asarray(rewards), False, clip=1.5, **settings)
        wanted = np.clip(rewards / np.sqrt(theirs.var + 1e-8), -1.5, 1.5)
        assert_close(y, wanted, atol=1e-5)


def test_batches_of_any_size_are_the_whole(rng):
    xs = batches(rng).reshape(-1, FEATURES)
    whole = run(fresh(), xs, True)[1]
    assert_close(whole["var"], widest(xs).var(0), rtol=2e-5)
    for sizes in ((1,) * 10, (100, 1, 59), (1, 158, 1)):
        batch_stats, start = fresh(), 0
        for size in sizes:
            _, batch_stats = run(batch_stats, xs[start : start + size], True)
            start += size
        seen = widest(xs[:start])
        assert_close(exact(batch_stats, "mean"), seen.mean(0), rtol=1e-6)
        assert_close(exact(batch_stats, "var"), seen.var(0), rtol=2e-5)
        assert float(batch_stats["count"]) == start


def test_all_axes_but_the_features_are_merged(rng):
    x = jnp.asarray(rng.normal(2, 3, (4, 5, FEATURES, 2)), jnp.float32)
    _, batch_stats = nj.running_norm_init((FEATURES, 2))
    _, batch_stats = run(batch_stats, x, True, feature_axes=(2, 3))
    assert_close(batch_stats["mean"], widest(x).mean((0, 1)), rtol=1e-6, atol=1e-6)
    assert_close(batch_stats["var"], widest(x).var((0, 1)), rtol=1e-5)
    assert float(batch_stats["count"]) == 20


def test_a_count_far_beyond_2_to_the_24_still_counts_one_by_one(on_platform):
    """And the mean still moves, which in float32 alone would stay where it is."""
    start, steps = 10**9, 2000
    batch_stats = nj.running_norm_init((), initial_count=float(start))[1]
    batch_stats["mean"] = jnp.float32(1.0)

    def many(batch_stats):
        def step(i, state):
            return run(state, jnp.full(1, 5.0), True, feature_axes=())[1]

        return jax.lax.fori_loop(0, steps, step, batch_stats)

    new = on_platform(many, batch_stats)
    assert int(new["count"]) + int(new["count_rest"]) == start + steps
    share = steps / (start + steps)
    assert_close(exact(new, "mean") - 1, 4 * share, rtol=1e-4)
    assert_close(exact(new, "var") - 1, share * (16 * (1 - share) - 1), rtol=1e-4)


def test_2_to_the_48_elements_are_counted_exactly():
    batch_stats = fresh(initial_count=2.0**47)
    for size in (1, 3, 5):
        _, batch_stats = run(batch_stats, jnp.ones((size, FEATURES)), True)
    assert int(batch_stats["count"]) + int(batch_stats["count_rest"]) == 2**47 + 9


def test_a_weight_counts_as_so_many_elements(on_platform, rng):
    xs, weights = batches(rng), np.float32(rng.uniform(0, 3, (20, 8)) * (rng.random((20, 8)) > 0.3))
    hidden = jnp.where(weights[..., None] > 0, xs, jnp.nan)
    theirs, batch_stats = RunningMeanStd(0.0), fresh()
    given = batch_stats, hidden[0], weights[0][:, None]
    step = on_platform.compiled(lambda state, x, mask: run(state, x, True, mask=mask), *given)
    for x, mask in zip(hidden, weights, strict=True):
        y, batch_stats = step(batch_stats, x, mask[:, None])
        theirs.update(jnp.where(mask[:, None] > 0, x, 0), mask)
    for leaf in ("mean", "var", "count"):
        assert_close(exact(batch_stats, leaf), getattr(theirs, leaf), rtol=1e-5)
    assert np.isfinite(y).all()
    ones = run(fresh(), xs[0], True, mask=np.float32([1, 0] * 4)[:, None])
    assert_trees_close(ones, run(fresh(), xs[0], True, mask=np.array([True, False] * 4)[:, None]))
    _, same = run(batch_stats, hidden[0], True, mask=np.zeros((8, 1), bool))
    assert_identical(same, batch_stats)


def test_devices_merge_their_batches(rng):
    xs = batches(rng, 8)
    mask = jnp.asarray(rng.random((8, 8, 1)) < 0.6)
    whole = run(fresh(), xs.reshape(-1, FEATURES), True, mask=mask.reshape(-1, 1))
    mesh = jax.make_mesh((8,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))
    cut, same = jax.sharding.PartitionSpec("env"), jax.sharding.PartitionSpec()

    def step(x, mask):
        return run(fresh(), x[0], True, mask=mask[0], axis_name="env")

    mapped = jax.shard_map(step, mesh=mesh, in_specs=cut, out_specs=(cut, same))
    y, new = jax.jit(mapped)(xs, mask)
    assert_close(y, whole[0], atol=1e-4)
    for leaf in ("mean", "var", "count"):
        assert_close(exact(new, leaf), exact(whole[1], leaf), rtol=1e-5)
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    paired = partial(step_of_pairs, pairs)
    new = jax.vmap(paired, axis_name="env")(xs)
    assert_close(new["mean"][5], widest(xs[4:6]).mean((0, 1)), rtol=1e-5)


def step_of_pairs(pairs, x):
    return run(fresh(), x, True, axis_name="env", axis_index_groups=pairs)[1]


@pytest.mark.parametrize("train", [True, False])
def test_statistics_are_constants_to_the_derivative(rng, train):
    x = batches(rng)[0]
    _, batch_stats = run(fresh(), batches(rng)[1], True)
    _, new = run(batch_stats, x, train)
    gradient = jax.grad(lambda x: jnp.sum(run(batch_stats, x, train)[0]))(x)
    slope = 1 / np.sqrt(widest(new["var"]) + 1e-8)
    assert_close(gradient, np.broadcast_to(slope, x.shape), rtol=1e-5)
    moved = jax.grad(lambda x: jnp.sum(run(batch_stats, x, train)[1]["mean"]))(x)
    assert_identical(moved, jnp.zeros_like(x))


def test_one_observation_is_enough_and_a_constant_one_is_0():
    y, batch_stats = run(fresh(), jnp.array([3.0, 1e4, 0.1]), True)
    assert_close(y, np.zeros(FEATURES), atol=1e-6)
    assert float(batch_stats["count"]) == 1
    y, _ = run(batch_stats, jnp.array([3.0, 1e4, 0.1]), True)
    assert_close(y, np.zeros(FEATURES), atol=1e-6)


def test_before_anything_is_seen_x_is_left_as_it_is():
    x = jnp.array([[1.0, -2.0, 30.0]])
    assert_close(run(fresh(), x, False)[0], x, rtol=1e-6)


def test_a_batch_that_is_not_finite_may_be_skipped(rng):
    x = batches(rng)[0]
    _, batch_stats = run(fresh(), x, True)
    bad = x.at[0, 0].set(jnp.inf)
    _, same = run(batch_stats, bad, True, skip_nonfinite=True)
    assert_identical(same, batch_stats)
    assert not np.isfinite(run(batch_stats, bad, True)[1]["mean"]).all()


X = jnp.ones((4, FEATURES))
WRONG = {
    "the mask has a feature axis": {"mask": np.ones((4, FEATURES), bool)},
    "mask does not broadcast": {"mask": np.ones(4, bool)},
    "clip is out of range": {"clip": -1.0},
    "center is not a bool": {"center": 1},
    "x is complex": {"x": X.astype(jnp.complex64)},
    "params has the wrong leaves": {"params": {"scale": jnp.ones(FEATURES)}},
    "batch_stats has the wrong leaves": {"batch_stats": {"mean": X[0], "var": X[0]}},
    "'var'. is too imprecise": {"batch_stats": fresh() | {"var": jnp.ones(FEATURES, jnp.float16)}},
    "'count'. is too imprecise": {"batch_stats": fresh() | {"count": jnp.int32(3)}},
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_does_not_fit_is_named(problem):
    given = {"params": {}, "batch_stats": fresh(), "x": X, "train": True} | WRONG[problem]
    with pytest.raises((ValueError, TypeError), match=f"running_norm: .*{problem}"):
        nj.running_norm(**given)


@pytest.mark.parametrize("count", [-1.0, float("inf"), "many"])
def test_an_initial_count_that_is_none_is_named(count):
    with pytest.raises((ValueError, TypeError), match="running_norm_init: initial_count"):
        fresh(initial_count=count)
