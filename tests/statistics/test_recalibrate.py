"""`recalibrate`'s numbers, against the statistics of all elements in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_same_kind, assert_trees_close, widest
from tests.statistics.populations import EPS, PROMISED, ROUNDED, algorithm_2, make, merged


def layer(variables, x, norm=nj.batch_norm, train=True, **settings):
    return norm(*variables, x, train=train, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 3)])
def test_merged_is_that_of_all_elements_together(rng, shape, running_var):
    batches = make(rng, shape=shape)
    variables = nj.batch_norm_init(3)
    apply_fn = functools.partial(layer, running_var=running_var)
    params, batch_stats = nj.recalibrate(apply_fn, variables, batches)
    assert params is variables[0]
    assert_same_kind(batch_stats, variables[1])
    assert_trees_close(batch_stats, merged(batches, ddof=running_var == "unbiased"), **PROMISED)


@pytest.mark.slow
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 3)])
def test_averaged_is_the_papers_algorithm_2_whatever_the_layer_stores(rng, shape, running_var):
    batches = make(rng, shape=shape)
    apply_fn = functools.partial(layer, running_var=running_var)
    _, batch_stats = nj.recalibrate(apply_fn, nj.batch_norm_init(3), batches, estimate="averaged")
    assert_trees_close(batch_stats, algorithm_2(batches), **PROMISED)
    assert np.abs(merged(batches)["var"] / batch_stats["var"] - 1).min() > 0.1, (
        "the two estimates differ here"
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimate, expected", [("merged", merged), ("averaged", algorithm_2)])
def test_neither_many_batches_nor_a_large_mean_cost_digits(rng, estimate, expected):
    batches = [x.astype(np.float32) for x in rng.normal(1e4, 1, (1500, 4, 3))]
    _, batch_stats = nj.recalibrate(layer, nj.batch_norm_init(3), batches, estimate=estimate)
    exact = expected(batches)
    assert_close(batch_stats["mean"], exact["mean"], rtol=EPS)
    # A batch's mean is rounded to 5e-4 of a deviation here, and its own variance right to 1e-5.
    assert_close(batch_stats["var"], exact["var"], rtol=4e-5)


@pytest.mark.slow
def test_the_sum_keeps_what_rounding_loses():
    """2 ** 24 + 1 + 1 + ... in float32 is 2 ** 24."""
    _, batch_stats = nj.batch_norm_init(1)
    population = nj.statistics.population.empty_population(batch_stats, "averaged", False)
    add = jax.jit(
        lambda population, mean: population.add(nj.Moments(2.0, mean, jnp.ones(1)), unbiased=False)
    )
    for mean in [0.0, 2.0**24] + [1.0] * 98:
        population = add(population, jnp.full(1, mean))
    assert_close(population.statistics()[0], [(2.0**24 + 98) / 100], rtol=EPS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64])
def test_other_dtypes(rng, dtype):
    real = make(rng)
    batches = [x + 1j * x[::-1] if dtype == jnp.complex64 else x for x in real]
    batches = [jnp.asarray(x, dtype) for x in batches]
    start = nj.batch_norm_init(3, param_dtype=dtype if dtype == jnp.complex64 else jnp.float32)
    params, batch_stats = nj.recalibrate(layer, start, batches)
    assert_same_kind(batch_stats, start[1])
    everything = np.concatenate([widest(x) for x in batches])
    assert_close(batch_stats["mean"], everything.mean(0), rtol=8 * EPS)
    assert_close(batch_stats["var"], everything.var(0), **PROMISED)


@pytest.mark.slow
def test_float64_keeps_its_precision(rng):
    with jax.enable_x64(True):
        batches = [jnp.asarray(x, jnp.float64) for x in make(rng, dtype=np.float64)]
        _, batch_stats = nj.recalibrate(
            layer, nj.batch_norm_init(3, param_dtype=jnp.float64), batches
        )
        assert_trees_close(batch_stats, merged(batches), rtol=1e-14)


def masked_layer(variables, batch, **settings):
    x, mask = batch
    return layer(variables, x, mask=mask, **settings)


def with_masks(rng):
    """Batch 1 has no element of feature 0, batch 2 one, no batch any of feature 3."""
    xs = make(rng, shape=(4,))
    masks = [rng.random(x.shape) < 0.6 for x in xs]
    masks[0][:, 0], masks[1][:, 0] = False, np.arange(8) == 3
    for mask in masks:
        mask[:, 3] = False
    return [
        (np.where(mask, x, np.nan).astype(np.float32), mask)
        for x, mask in zip(xs, masks, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
@pytest.mark.parametrize("estimate", ["merged", "averaged"])
def test_masked_elements_do_not_count_and_unseen_features_keep_their_own(
    rng, estimate, running_var
):
    batches = with_masks(rng)
    params, start = nj.batch_norm_init(4)
    start = {"mean": start["mean"] + 7, "var": start["var"] + 7}
    apply_fn = functools.partial(masked_layer, running_var=running_var)
    _, batch_stats = nj.recalibrate(apply_fn, (params, start), batches, estimate=estimate)
    for feature in range(3):
        parts = [x[mask[:, feature], feature].astype(np.float64) for x, mask in batches]
        if estimate == "merged":
            mean, var = (
                np.concatenate(parts).mean(),
                np.concatenate(parts).var(ddof=running_var == "unbiased"),
            )
        else:
            mean = np.mean([x.mean() for x in parts if len(x)])
            var = np.mean([x.var(ddof=1) for x in parts if len(x) > 1])
        assert_close(batch_stats["mean"][feature], mean, rtol=8 * EPS)
        assert_close(batch_stats["var"][feature], var, **PROMISED)
    assert batch_stats["mean"][3] == 7 and batch_stats["var"][3] == 8


@pytest.mark.slow
def test_one_element_in_all_has_no_unbiased_variance():
    mask = np.arange(4)[:, None] == 1
    apply_fn = functools.partial(masked_layer, running_var="unbiased")
    _, batch_stats = nj.recalibrate(
        apply_fn, nj.batch_norm_init(1), [(np.arange(4.0)[:, None], mask)]
    )
    assert_trees_close(batch_stats, {"mean": np.ones(1), "var": np.ones(1)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"momentum": 0.0}, {"momentum": 1.0}, {"virtual_batch_size": 4}]
)
def test_settings_of_training_make_no_difference(rng, settings):
    batches = make(rng, sizes=(8, 8, 4))
    _, batch_stats = nj.recalibrate(
        functools.partial(layer, **settings), nj.batch_norm_init(3), batches
    )
    assert_trees_close(batch_stats, merged(batches), **PROMISED)


@pytest.mark.slow
def test_a_cumulative_layer_counts_the_batches_of_the_new_mean_and_others_keep_their_count(rng):
    batches = make(rng)
    params, start = nj.batch_norm_init(3, count=True)
    start = start | {"count": jnp.int32(1000)}
    apply_fn = functools.partial(layer, momentum=None)
    _, batch_stats = nj.recalibrate(apply_fn, (params, start), batches)
    assert batch_stats["count"] == len(batches)
    _, batch_stats = nj.recalibrate(layer, (params, start), batches)
    assert batch_stats["count"] == 1000


@pytest.mark.slow
def test_batch_renorm_collects_what_batch_norm_does_whatever_it_starts_from(rng):
    """Its correction would bring in the statistics that are to be replaced."""
    batches = make(rng)

    def two_layers(variables, x, norm):
        params, (first, second) = variables
        x, first = norm(params, first, x, True)
        x, second = norm(params, second, jax.nn.relu(x), True)
        return x, (first, second)

    params, start = nj.batch_renorm_init(3)
    stale = {"mean": start["mean"] + 50, "var": start["var"] * 9, "count": jnp.int32(30)}
    _, expected = nj.recalibrate(
        functools.partial(two_layers, norm=nj.batch_norm), (params, (start, start)), batches
    )
    _, found = nj.recalibrate(
        functools.partial(two_layers, norm=nj.batch_renorm), (params, (stale, stale)), batches
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.pop("count") == 30 and theirs.pop("count") == 0
        assert_trees_close(mine, theirs, **ROUNDED)
