"""Averages of running statistics: of a mixture of populations, and as optax takes them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close

EPS = float(jnp.finfo(jnp.float32).eps)
CLOSE = {"rtol": 8 * EPS, "atol": 8 * EPS}


def state(rng, count=None):
    mean, var = rng.normal(0, 3, 4), rng.uniform(0.1, 2, 4)
    layer = {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32)}
    return layer if count is None else layer | {"count": jnp.int32(count)}


def expected(states, shares):
    """By NumPy, in float64."""
    mean, var = (np.float64([each[leaf] for each in states]) for leaf in ("mean", "var"))
    shares = np.float64(shares)[:, None] / np.sum(shares)
    center = (shares * mean).sum(0)
    return {"mean": center, "var": (shares * (var + (mean - center) ** 2)).sum(0)}


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.0, 1.0, 0.5], np.float32([3, 0, 0])])
def test_it_is_the_law_of_total_variance(rng, weights):
    states = [state(rng) for _ in range(3)]
    shares = [1, 1, 1] if weights is None else weights
    for average in (nj.average_batch_stats, jax.jit(nj.average_batch_stats)):
        assert_trees_close(average(states, weights), expected(states, shares), **CLOSE)


def test_it_is_the_statistics_of_all_elements_together(rng):
    parts = [rng.normal(mean, 1 + mean, (size, 4)) for mean, size in ((0, 10), (3, 30), (1, 5))]
    states = [{"mean": x.mean(0), "var": x.var(0)} for x in parts]
    whole = np.concatenate(parts)
    average = nj.average_batch_stats(
        jax.tree.map(jnp.float32, states), [len(part) for part in parts]
    )
    assert_trees_close(average, {"mean": whole.mean(0), "var": whole.var(0)}, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_equal_means_stay_as_they_are_far_from_zero():
    layer = {"mean": jnp.float32([1e6 + 1 / 16, 3.1]), "var": jnp.float32([1e-6, 2.0])}
    average = nj.average_batch_stats([layer] * 7, [0.1, 0.7, 0.3, 0.9, 0.2, 0.1, 0.1])
    assert_identical(average["mean"], layer["mean"])
    assert_close(average["var"], layer["var"], **CLOSE)


@pytest.mark.slow
def test_counts_take_the_mean_and_stay_exact_ints():
    layer = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    counts = [2**30 + 1, 2**30 + 4]
    states = [layer | {"count": jnp.int32(count)} for count in counts]
    average = nj.average_batch_stats(states, [1, 2])
    assert_identical(average["count"], jnp.int32(2**30 + 3))


def test_a_state_of_weight_zero_leaves_no_trace(rng):
    states = [jax.tree.map(lambda leaf: leaf * jnp.nan, state(rng)), state(rng), state(rng)]
    average = nj.average_batch_stats(states, [0, 1, 3])
    assert_trees_close(average, expected(states[1:], [1, 3]), **CLOSE)


@pytest.mark.slow
def test_a_moving_average_under_scan_is_the_mixture_with_decaying_weights(rng):
    states = [state(rng, count=k) for k in range(1, 6)]

    def step(average, new):
        return nj.average_batch_stats([average, new], [0.5, 0.5]), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[1:])
    average, _ = jax.lax.scan(step, states[0], stacked)
    shares = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    count = average.pop("count")
    assert count.dtype == jnp.int32 and 3 <= count <= 5
    assert_trees_close(average, expected(states, shares), **CLOSE)


@pytest.mark.slow
def test_whole_models_of_linen_and_nnx(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nj.linen.BatchNorm(use_running_average=False)(x)
            return nj.linen.BatchRenorm(use_running_average=False)(x * x)

    variables = Net().init(jax.random.key(0), jnp.ones((2, 4)))
    states = []
    for _ in range(2):
        x = jnp.asarray(rng.normal(1, 2, (8, 4)), jnp.float32)
        states.append(Net().apply(variables, x, mutable="batch_stats")[1]["batch_stats"])
    average = nj.average_batch_stats(states)
    for name, layer in average.items():
        own = [each[name] for each in states]
        for leaf, value in expected(own, [1, 1]).items():
            assert_close(layer[leaf], value, rtol=1e-6, atol=1e-6)
    assert average["BatchRenorm_0"]["count"] == 1

    norms = [nj.nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0)) for _ in range(2)]
    for shift, norm in enumerate(norms):
        norm(x + shift)
    pure = [nnx.state(norm, nnx.BatchStat) for norm in norms]
    own = [{leaf: each[leaf][...] for leaf in ("mean", "var")} for each in pure]
    average = nj.average_batch_stats(pure)
    nnx.update(norms[0], average)
    assert_close(norms[0].var[...], expected(own, [1, 1])["var"], **CLOSE)


@pytest.mark.slow
def test_kept_dtypes_complex_means_and_other_leaves():
    layer = {"mean": jnp.complex64([1j]), "var": jnp.bfloat16([1])}
    average = nj.average_batch_stats([layer, layer | {"mean": jnp.complex64([3j])}])
    assert_identical(average, {"mean": jnp.complex64([2j]), "var": jnp.bfloat16([2])})
    spectral = {"u": jnp.float32([[0.0, 1.0]]), "sigma": jnp.float32(2)}
    average = nj.average_batch_stats([spectral, spectral | {"sigma": jnp.float32(4)}])
    assert_identical(average, spectral | {"sigma": jnp.float32(3)})
    assert nj.average_batch_stats([{}, {}]) == {}


@pytest.mark.parametrize(
    ("states", "weights", "words"),
    [
        ([], None, "no states"),
        ({"mean": jnp.ones(2), "var": jnp.ones(2)}, None, "type dict"),
        ([{"var": jnp.ones(2)}] * 2, None, "['var']"),
        ([{"mean": jnp.ones(2)}, {"mean": jnp.ones(3)}], None, "(3,) for states[1]['mean']"),
        ([{"mean": jnp.ones(2)}, {}], None, "states[0]['mean']"),
        ([{"mean": "abc"}], None, "states[0]['mean']"),
        ([{"mean": jnp.ones(2)}] * 2, [1, 1, 1], "[1, 1, 1]"),
        ([{"mean": jnp.ones(2)}] * 2, [1, -1], "[1, -1]"),
        ([{"mean": jnp.ones(2)}] * 2, [0, 0.0], "[0, 0.0]"),
        ([{"mean": jnp.ones(2)}] * 2, [1, np.nan], "nan"),
    ],
)
def test_what_cannot_be_averaged_is_refused(states, weights, words):
    with pytest.raises((ValueError, TypeError)) as raised:
        nj.average_batch_stats(states, weights)
    message = str(raised.value)
    assert re.fullmatch(r"average_batch_stats: .*\. Expected .*; got .*\. .*\.", message, re.DOTALL)
    assert words in message


# What optax makes of a count.


def averages(old, new):
    """Of two states, as people take them."""
    ema = optax.ema(0.9)
    _, mean = ema.update(new, ema.init(old))
    return {
        "incremental_update": optax.incremental_update(new, old, 0.3),
        "ema": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mean.ema),
        "mean": jax.tree.map(lambda a, b: (a + b) / 2, old, new),
    }


LAYERS = {
    "batch_norm": (nj.batch_norm_init(4, count=True), nj.batch_norm, {"momentum": None}),
    "batch_renorm": (nj.batch_renorm_init(4), nj.batch_renorm, {"momentum": 0.9}),
    "scheduled": (
        nj.batch_renorm_init(4),
        nj.batch_renorm,
        {"r_max": lambda count: jnp.arange(1.0, 9.0)[count], "d_max": 0.5},
    ),
    "activated_batch_norm": (
        nj.activated_batch_norm_init(4, count=True),
        nj.activated_batch_norm,
        {"momentum": None},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("promotion_as_in_flax")
def test_layers_take_averages_with_a_float_count(name, rng):
    (params, old), layer, settings = LAYERS[name]
    old = old | {"count": jnp.int32(3)}
    x = jnp.asarray(rng.normal(1, 2, (8, 4)), jnp.float32)
    _, new = layer(params, old, x, True, **settings)
    for average in averages(old, new).values():
        assert average["count"].dtype == jnp.float32
        rounded = average | {"count": jnp.int32(np.round(average["count"]))}
        for train in (False, True):
            y, after = layer(params, average, x, train, **settings)
            expected_y, expected_after = layer(params, rounded, x, train, **settings)
            assert_identical(y, expected_y)
            assert_identical(after["mean"], expected_after["mean"])
            assert_identical(after["var"], expected_after["var"])
            assert after["count"].dtype == jnp.float32
            assert after["count"] == (rounded["count"] + 1 if train else average["count"])


@pytest.mark.usefixtures("promotion_as_in_flax")
def test_adapters_take_averages_with_a_float_count(rng):
    x = jnp.asarray(rng.normal(1, 2, (8, 4)), jnp.float32)
    module = nj.linen.BatchRenorm(use_running_average=False, momentum=0.9)
    variables = module.init(jax.random.key(0), x)
    _, updates = module.apply(variables, x, mutable="batch_stats")
    mean = optax.incremental_update(updates["batch_stats"], variables["batch_stats"], 0.75)
    average = variables | {"batch_stats": mean}
    y = module.clone(use_running_average=True).apply(average, x)
    assert jnp.isfinite(y).all()
    _, updates = module.apply(average, x, mutable="batch_stats")
    assert_identical(updates["batch_stats"]["count"], jnp.float32(2))

    norm = nj.nnx.BatchNorm(4, momentum=None, rngs=nnx.Rngs(0))
    norm.count = nnx.BatchStat(jnp.float32(1.6))
    norm.mean[...] = jnp.ones(4)
    norm(x)
    assert_identical(norm.count[...], jnp.float32(3))
    assert_close(norm.mean[...], 2 / 3 + x.mean(0) / 3, rtol=1e-6)
    norm(x, use_running_average=True)


def test_a_half_precision_count_is_refused():
    params, batch_stats = nj.batch_renorm_init(2)
    batch_stats["count"] = jnp.bfloat16(3)
    with pytest.raises(TypeError, match=r"batch_stats\['count'\].*bfloat16"):
        nj.batch_renorm(params, batch_stats, jnp.ones((4, 2)), False)


@pytest.mark.slow
def test_a_count_stops_at_the_largest_number():
    params, batch_stats = nj.batch_norm_init(2, count=True)
    x = jnp.ones((4, 2))
    for dtype in (jnp.int32, jnp.uint8):
        full = batch_stats | {"count": jnp.asarray(jnp.iinfo(dtype).max, dtype)}
        _, new = nj.batch_norm(params, full, x, True, momentum=None)
        assert_identical(new["count"], full["count"])
        assert_close(new["mean"], x[0] * 0, atol=1.1 / 255)
