"""What JAX's transformations make of every layer, on each platform's program.

They are compared with programs that are optimized as for users, but are not optimized themselves.
Functions are kept by their case, since JAX traces one function once for all platforms.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close, assert_trees_close, largest
from tests.contract.cases import CASES, EPS, REORDERED, every_case, of, program

# What is worth it of the costliest tests: each layer, and what batch norm does beyond.
CHOSEN = [case for case in CASES if case.variant == "plain" or case.layer.name == "batch_norm"]
each_layer = of(CHOSEN)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@cache
def in_both_modes(case):
    def run(params, batch_stats, x):
        return [case.apply(train)(params, batch_stats, x) for train in (True, False)]

    return run


def one_by_one(on_platform, case, given):
    """What `in_both_modes` gives, by the program of a single step."""
    run = program(on_platform, case)
    outcomes = [run(*each, case.mask()) for each in given]
    modes = [[(o.y, o.new), (o.inferred, each[1])] for o, each in zip(outcomes, given, strict=True)]
    return stacked(modes)


@cache
def over_x(case):
    return jax.vmap(in_both_modes(case), (None, None, 0))


@each_layer
def test_vmap_over_x_is_a_loop(on_platform, case, rng):
    params, batch_stats, x = case.arguments(rng)
    xs = jnp.stack([x, 3 * x - 100, x[::-1] + 1e3])
    ours = on_platform.quickly(over_x(case), params, batch_stats, xs)
    expected = one_by_one(on_platform, case, [(params, batch_stats, x) for x in xs])
    # At 1e3 the mean is rounded to 1e3 EPS, in units of a deviation near 1.
    assert_trees_close(ours, expected, rtol=100 * EPS, atol=1e5 * EPS)


@cache
def over_params(case):
    def run(params, batch_stats, xs, x):
        own = jax.vmap(in_both_modes(case))(params, batch_stats, xs)
        return own, jax.vmap(in_both_modes(case), (0, 0, None))(params, batch_stats, x)

    return run


@pytest.mark.slow
@each_layer
def test_vmap_over_parameters_and_statistics_is_a_loop(on_platform, case, rng):
    given = [case.arguments(rng) for _ in range(3)]
    x = given[0][2]
    shared = [(params, batch_stats, x) for params, batch_stats, _ in given]
    ours = on_platform.quickly(over_params(case), *stacked(given), x)
    expected = tuple(one_by_one(on_platform, case, each) for each in (given, shared))
    assert_trees_close(ours, expected, **REORDERED)


@cache
def epoch(case):
    def run(params, batch_stats, xs):
        def body(carry, x):
            (y, new), (inferred, _) = in_both_modes(case)(params, carry, x)
            return new, (y, inferred)

        return jax.lax.scan(body, batch_stats, xs)

    return run


@each_layer
def test_scan_carries_the_statistics(on_platform, case, rng):
    params, batch_stats, x = case.arguments(rng)
    xs = jnp.stack([x, x + 1, 2 * x])
    final, outcomes = on_platform.quickly(epoch(case), params, batch_stats, xs)
    for x, y, inferred in zip(xs, *outcomes, strict=True):
        expected = program(on_platform, case)(params, batch_stats, x, case.mask())
        batch_stats = expected.new
        assert_close(y, expected.y, **REORDERED)
        assert_close(inferred, expected.inferred, **REORDERED)
    assert_trees_close(final, batch_stats, **REORDERED)


@cache
def rematerialized(case):
    layer = jax.checkpoint(case.apply(True))

    def loss(params, batch_stats, x):
        y, new = layer(params, batch_stats, x)
        counted = jnp.where(case.mask(), y, 0) if case.masked else y
        return jnp.sum(jnp.tanh(counted)), (y, new)

    return jax.grad(loss, (0, 2), has_aux=True)


@pytest.mark.slow
@each_layer
def test_remat_changes_neither_values_nor_gradients(on_platform, case, rng):
    given = case.arguments(rng)
    gradients, (y, new) = on_platform.quickly(rematerialized(case), *given)
    expected = program(on_platform, case)(*given, case.mask())
    assert_trees_close(
        (y, new, gradients), (expected.y, expected.new, expected.gradients), **REORDERED
    )


def inner(a, b):
    """The inner product of two trees."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def derivatives(f, at, along, across):
    """A function's value and its gradient g, and along one direction and across another:

    the slope of f and its curvature, both forward; J along, forward over reverse; and J transposed
    times a direction, reverse over forward and reverse over reverse. J is the Jacobian of g.
    """

    def g(at):
        return jax.grad(f)(at)

    def value_and_slope(at):
        return jax.jvp(f, (at,), (along,))

    (value, slope), (_, curvature) = jax.jvp(value_and_slope, (at,), (along,))
    gradient, of_gradient = jax.jvp(g, (at,), (along,))
    return {
        "value": value,
        "gradient": gradient,
        "slope": slope,
        "curvature": curvature,
        "along": of_gradient,
        "of the slope": jax.grad(lambda at: value_and_slope(at)[1])(at),
        "across": jax.grad(lambda at: inner(g(at), across))(at),
    }


@cache
def differentiated(case):
    """The derivatives as a function of parameters and x, where they are, and two directions."""
    rng = np.random.default_rng(0)
    params, batch_stats, x = case.arguments(rng, jnp.float64)
    at = params, x
    along, across = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), at) for _ in range(2)
    )

    def f(at):
        y, new = case.apply(True)(at[0], batch_stats, at[1])
        statistics = [jnp.sum(new[leaf]) for leaf in ("mean", "var") if leaf in new]
        return jnp.sum(jnp.tanh(y) ** 2) + sum(statistics)

    return lambda at: derivatives(f, at, along, across), at, along, across


@pytest.mark.slow
@every_case
def test_derivatives_of_either_mode_and_order_agree(on_platform, case):
    with jax.enable_x64(True):
        run, at, along, across = differentiated(case)
        found = on_platform.quickly(run, at)
        rounded = {"rtol": 1e-10, "atol": 1e-10 * largest(found)}
        assert_close(found["slope"], inner(found["gradient"], along), **rounded)
        assert_close(found["curvature"], inner(found["along"], along), **rounded)
        assert_close(found["curvature"], inner(found["of the slope"], along), **rounded)
        assert_close(inner(found["across"], along), inner(found["along"], across), **rounded)
        assert min(abs(found["slope"]), abs(found["curvature"])) > 1e-3


@pytest.mark.slow
@of([case for case in CASES if case.layer.true_derivative])
def test_derivatives_agree_with_differences(on_platform, case):
    with jax.enable_x64(True):
        run, at, along, _ = differentiated(case)
        program, step = on_platform.quickly.compiled(run, at), 1e-5
        found = program(at)
        above, below = (
            program(jax.tree.map(lambda a, d, h=h: a + h * d, at, along)) for h in (step, -step)
        )
        slopes = jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)
        # Truncation and rounding of differences meet near 1e-5.
        differences = {"rtol": 1e-5, "atol": 1e-5 * largest(found)}
        assert_close(found["slope"], slopes["value"], **differences)
        assert_trees_close(found["along"], slopes["gradient"], **differences)
