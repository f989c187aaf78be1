"""Empty inputs, as of filters, ragged data, last batches: y is empty, and nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.adapters import ADAPTERS, KEY, WRAPPERS
from tests.compare import assert_identical, assert_trees_close, at_once
from tests.contract.cases import CASES, of, step
from tests.contract.layers import SHAPE

EMPTY = [(0, 3, 4), (6, 0, 4), (6, 3, 0)]
PLAIN = [case for case in CASES if case.variant in ("plain", "ghosts")]


def of_features(number, tree):
    """Leaves for as many features; scalars as they are."""
    return jax.tree.map(lambda leaf: leaf[..., :number] if leaf.ndim else leaf, tree)


def arguments(case, shape, rng):
    params, batch_stats, _ = case.arguments(rng)
    params, batch_stats = of_features(shape[-1], (params, batch_stats))
    mask = np.zeros(shape, bool) if case.masked else None
    return params, batch_stats, jnp.zeros(shape), mask


def assert_nothing_changed(outcome, given, shape):
    params, batch_stats, x, mask = given
    assert_identical((outcome.y, outcome.inferred, outcome.gradients[1]), (x, x, x), case=shape)
    if "count" in batch_stats and not x.shape[-1] and mask is None:
        # A batch of no features counts: as one, or as its elements.
        amount = x.shape[0] * x.shape[1] if "count_rest" in batch_stats else 1
        count = batch_stats["count"] + amount
        assert float(outcome.new["count"]) == float(count)
        exact = {leaf: outcome.new[leaf] for leaf in ("count_rest",) if leaf in batch_stats}
        batch_stats = batch_stats | exact | {"count": count}
    assert_identical(outcome.new, batch_stats, case=shape)
    assert_trees_close(outcome.gradients[0], jax.tree.map(jnp.zeros_like, params))


def with_every_shape(case, run, rng):
    """The arguments of a case by the shape of x, and what its step gives of all of them."""
    given = {str(shape): arguments(case, shape, rng) for shape in EMPTY}

    def steps(given):
        return {shape: step(case)(*each) for shape, each in given.items()}

    return given, run(steps, given)


@pytest.mark.slow
@of([case for case in CASES if case not in PLAIN])
def test_every_layer(case, rng):
    given, outcomes = with_every_shape(case, at_once, rng)
    for shape in given:
        assert_nothing_changed(outcomes[shape], given[shape], shape)


@of(PLAIN)
def test_every_platform(on_platform, case, rng):
    given, outcomes = with_every_shape(case, on_platform, rng)
    for shape in given:
        assert_nothing_changed(outcomes[shape], given[shape], shape)


# nnx.Linear itself cannot be made with 0 features.
@pytest.mark.parametrize(
    ("adapter", "shape"),
    [
        pytest.param(adapter, shape, id=f"{adapter}-{shape}")
        for adapter in ADAPTERS
        for shape in EMPTY
        if shape[-1] or adapter.package == "linen" or adapter.name not in WRAPPERS
    ],
)
@pytest.mark.usefixtures("promotion_as_in_flax")
def test_every_adapter(adapter, shape):
    y = adapter.call(adapter.make(shape[-1]), jnp.zeros(shape))
    assert y.shape == shape


# Spectral norm's statistics move by the kernel, which is not empty.
LINEN = [each for each in ADAPTERS if each.package == "linen" and each.name != "SpectralNorm"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", EMPTY[:2], ids=str)
@pytest.mark.parametrize("adapter", LINEN, ids=repr)
@pytest.mark.usefixtures("promotion_as_in_flax")
def test_variables_of_linen_keep_their_values(adapter, shape):
    module = adapter.make()
    variables = module.init(KEY, jnp.ones(SHAPE))

    def loss(params):
        given = variables | {"params": params}
        y, updates = module.apply(given, jnp.zeros(shape), mutable="batch_stats")
        return jnp.sum(y), updates

    params = variables.get("params", {})
    gradient, updates = jax.grad(loss, has_aux=True)(params)
    assert_trees_close(gradient, jax.tree.map(jnp.zeros_like, params))
    assert_identical(updates.get("batch_stats", {}), variables.get("batch_stats", {}))


@pytest.mark.slow
def test_moments_of_nothing():
    for shape, axes in (((0, 3), 0), ((3, 0), (0, 1)), ((2, 0, 3), (0, 1))):
        moments = nj.moments(jnp.zeros(shape), axes)
        zeros = jnp.zeros(moments.var.shape)
        assert_identical(moments, nj.Moments(zeros, zeros, zeros))
        some = nj.Moments(zeros + 2, zeros + 1, zeros + 3)
        assert_identical(nj.merge_moments(some, moments), some)
    _, batch_stats = nj.batch_norm_init(3)
    for running_var in ("biased", "unbiased"):
        nothing = nj.moments(jnp.zeros((0, 3)), 0)
        new = nj.update_batch_stats(batch_stats, nothing, running_var=running_var)
        assert_identical(new, batch_stats)
