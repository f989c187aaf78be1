"""Other tools of JAX around layers: donation, checkify, debug_nans, ensembles, rank promotion."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from tests.compare import assert_close, assert_trees_close
from tests.contract.cases import CASES, REORDERED, every_case, of, step


def given(case, rng):
    params, batch_stats, x = case.arguments(rng)
    return params, batch_stats, x, case.mask()


@pytest.fixture
def expected(case):
    return jax.jit(step(case))(*given(case, np.random.default_rng(0)))


@cache
def checked(case):
    return jax.jit(
        checkify.checkify(step(case), errors=checkify.float_checks | checkify.index_checks)
    )


@every_case
def test_checkify_finds_no_error_and_changes_nothing(case, rng, expected):
    error, outcome = checked(case)(*given(case, rng))
    error.throw()
    assert_trees_close(outcome, expected, **REORDERED)


@of([case for case in CASES if not case.masked])
def test_checkify_finds_a_nan(case, rng):
    params, batch_stats, x, mask = given(case, rng)
    error, _ = checked(case)(params, batch_stats, x.at[0, 0, 0].set(jnp.inf) * 0, mask)
    with pytest.raises(checkify.JaxRuntimeError, match="nan generated"):
        error.throw()


@every_case
def test_no_nan_is_made_on_the_way(case, rng, expected):
    """Also of what a mask hides, and of an x that is constant."""
    params, batch_stats, x, mask = given(case, rng)
    with jax.debug_nans(True):
        outcome = jax.jit(step(case))(params, batch_stats, x, mask)
        jax.jit(step(case))(params, batch_stats, jnp.full_like(x, 3.0), mask)
    assert_trees_close(outcome, expected, **REORDERED)


@every_case
def test_statistics_and_x_may_be_donated(case, rng, expected):
    params, batch_stats, x, mask = given(case, rng)
    donating = jax.jit(
        lambda params, batch_stats, x: (*case.apply(True)(params, batch_stats, x),),
        donate_argnums=(1, 2),
    )
    state = jax.tree.map(jnp.copy, (batch_stats, x))
    y, new = donating(params, *state)
    assert_trees_close((y, new), (expected.y, expected.new), **REORDERED)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state) if leaf.ndim)
    second = donating(params, new, jnp.copy(x))
    assert jax.tree.structure(second) == jax.tree.structure((y, new))


@every_case
def test_members_of_an_ensemble_are_trained_apart(case, rng):
    members = [given(case, rng) for _ in range(3)]
    mask = case.mask()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[member[:3] for member in members])
    outcome = jax.jit(jax.vmap(lambda *arrays: step(case)(*arrays, mask)))(*stacked)
    alone = jax.jit(step(case))
    for place, member in enumerate(members):
        own = jax.tree.map(lambda leaf, place=place: leaf[place], outcome)
        assert_trees_close(own, alone(*member), rtol=1e-4, atol=1e-4)


@every_case
def test_ranks_are_never_promoted_silently(case, rng, expected):
    with jax.numpy_rank_promotion("raise"):
        outcome = jax.jit(step(case))(*given(case, rng))
    assert_close(outcome.y, expected.y, **REORDERED)
