"""What holds for every layer: its values, dtypes and masks, and what it leaves alone.

Tests that take `on_platform` hold for each platform's program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import (
    assert_close,
    assert_finite,
    assert_identical,
    assert_same_kind,
    assert_trees_close,
)
from tests.contract.cases import CASES, REORDERED, every_case, of, program
from tests.contract.layers import FEATURES, SHAPE


@functools.cache
def eager(case):
    """y and the new statistics in training, and y at inference, without jit."""
    given = case.arguments(np.random.default_rng(0))
    return *case.apply(True)(*given), case.apply(False)(*given)[0]


@every_case
def test_jit_is_eager(on_platform, case, rng):
    outcome = program(on_platform, case)(*case.arguments(rng), case.mask())
    assert_trees_close(outcome[:3], eager(case), **REORDERED)


@every_case
def test_shapes_dtypes_and_structure_are_kept_and_known_without_computing(case, rng):
    params, batch_stats, x = case.arguments(rng)
    for train in (True, False):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            given = params, batch_stats, x.astype(dtype)
            assert_same_kind(jax.eval_shape(case.apply(train), *given), (given[2], batch_stats))
        y, new = case.apply(train)(*given)
        assert_same_kind((y, new), (given[2], batch_stats))
    assert_identical(new, batch_stats)


@of([case for case in CASES if case.layer.has_statistics])
def test_training_moves_the_statistics(case, rng):
    params, batch_stats, x = case.arguments(rng)
    _, new = case.apply(True)(params, batch_stats, x)
    assert all((new[leaf] != batch_stats[leaf]).all() for leaf in batch_stats)


@every_case
def test_the_second_call_neither_compiles_nor_transfers(case, rng):
    params, batch_stats, x = jax.device_put(case.arguments(rng), jax.devices()[0])
    traces = []

    @jax.jit
    def step(params, batch_stats, x):
        traces.append(None)
        _, batch_stats = case.apply(True)(params, batch_stats, x)
        return case.apply(False)(params, batch_stats, x)

    batches = [x + shift for shift in range(3)]
    for i, x in enumerate(batches):
        with jax.transfer_guard("allow" if i == 0 else "disallow"):
            _, batch_stats = step(params, batch_stats, x)
    assert len(traces) == step._cache_size() == 1


@every_case
def test_the_arguments_are_left_as_they_were(case, rng):
    given = case.arguments(rng)
    copies = jax.tree.map(jnp.copy, given)
    case.apply(True)(*given)
    assert_identical(given, copies)
    assert all(
        leaf.shape in ((FEATURES,), (1, FEATURES), ()) for leaf in jax.tree.leaves(given[:2])
    )


MASKED = [case for case in CASES if case.masked]
SAFE = [case for case in CASES if case.layer.safe_far_from_zero]


@of(MASKED)
def test_an_empty_mask_of_nans_changes_nothing_and_stays_finite(on_platform, case, rng):
    params, batch_stats, x = case.arguments(rng)
    nothing = np.zeros(SHAPE, bool)
    outcome = program(on_platform, case)(params, batch_stats, jnp.full_like(x, jnp.nan), nothing)
    assert_finite(outcome)
    assert_identical(outcome.new, batch_stats)


@of(MASKED)
def test_a_masked_nan_leaves_no_trace(on_platform, case, rng):
    params, batch_stats, x = case.arguments(rng)
    mask = case.mask() & (np.arange(72).reshape(SHAPE) % 7 > 0)
    outcomes = []
    for hidden in (0.0, jnp.nan, jnp.inf):
        filled = jnp.where(mask, x, hidden)
        outcome = program(on_platform, case)(params, batch_stats, filled, mask)
        assert_finite(outcome)
        y, inferred = (jnp.where(mask, part, 0) for part in (outcome.y, outcome.inferred))
        outcomes.append(outcome._replace(y=y, inferred=inferred))
    for other in outcomes[1:]:
        assert_trees_close(other, outcomes[0], **REORDERED)


@of(SAFE)
def test_a_huge_offset_costs_no_precision(on_platform, case, rng):
    params, batch_stats, _ = case.arguments(rng)
    params = {leaf: jnp.full_like(value, leaf == "scale") for leaf, value in params.items()}
    mask = np.ones(SHAPE, bool) if case.masked else None
    # From -2 to 2, spread out along every axis, so that every statistic has a deviation near 1.
    steps = np.tensordot([29, 37, 17], np.indices(SHAPE), 1) % 72
    x = jnp.asarray(1e4 + np.linspace(-2, 2, 72)[steps], jnp.float32)
    run = program(on_platform, case)
    y, near = (run(params, batch_stats, data, mask).y for data in (x, x - 1e4))
    # The rounding of x itself is the same for both. The mean is rounded to half a ulp of 1e4; a
    # plain mean that is right to 1/512 of a deviation stands.
    assert_close(y, near, atol=2.5 * np.spacing(np.float32(1e4)))


@of(SAFE)
def test_a_constant_input_gives_the_bias(on_platform, case, rng):
    params, batch_stats, x = case.arguments(rng)
    constant = jnp.full_like(x, 777.0)
    outcome = program(on_platform, case)(params, batch_stats, constant, case.mask())
    bias = case.layer.activation(params.get("bias", jnp.zeros(FEATURES)))
    assert_close(outcome.y, jnp.broadcast_to(bias, SHAPE), atol=1e-6)


@every_case
def test_a_constant_input_has_finite_gradients(on_platform, case, rng):
    params, batch_stats, x = case.arguments(rng)
    for value in (0.0, 3.0):
        constant = jnp.full_like(x, value)
        outcome = program(on_platform, case)(params, batch_stats, constant, case.mask())
        assert_finite(outcome.gradients)


@of([case for case in CASES if case.variant == "plain"])
def test_float16_near_its_largest_number(on_platform, case, rng):
    """60,000 squared is far beyond float16: statistics are those of the same numbers in float32."""
    params, batch_stats, _ = case.arguments(rng)
    x = jnp.asarray(rng.choice([-60_000.0, 60_000.0, 30_000.0], SHAPE), jnp.float16)

    def in_both_modes(x):  # y need not fit float16 at inference
        layers = [case.apply(train, dtype=jnp.float32) for train in (True, False)]
        return [layer(params, batch_stats, x) for layer in layers]

    def narrow_and_wide(x):
        return in_both_modes(x), in_both_modes(x.astype(jnp.float32))

    narrow, wide = on_platform(narrow_and_wide, x)
    assert_same_kind(narrow, wide)
    assert_trees_close(narrow, wide, **REORDERED)


@every_case
@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_axes_may_be_named_in_any_order_and_from_either_end(case, sign, rng):
    """With the features in the middle of x instead of at its end."""
    params, batch_stats, x = case.arguments(rng)
    named = {"feature_axes": (-1,)} | case.layer.axes | case.settings
    for name in ("feature_axes", "reduction_axes", "cumulative_axis"):
        if name in named:
            moved = [(0, 2, 1)[axis] for axis in np.atleast_1d(named[name])]
            axes = tuple(axis if sign > 0 else axis - 3 for axis in reversed(moved))
            named[name] = axes[0] if name == "cumulative_axis" else axes
    if "mask" in named:
        named["mask"] = np.moveaxis(named["mask"], -1, 1)
    y, new = case.layer.apply(params, batch_stats, jnp.moveaxis(x, -1, 1), True, **named)
    expected, expected_new, _ = eager(case)
    assert_close(jnp.moveaxis(y, 1, -1), expected, **REORDERED)
    assert_trees_close(new, expected_new, **REORDERED)


@every_case
def test_dtype_is_that_of_y(case, rng):
    params, batch_stats, x = case.arguments(rng)
    trained, _, inferred = eager(case)
    for train, expected in ((True, trained), (False, inferred)):
        y, new = case.apply(train, dtype=jnp.bfloat16)(params, batch_stats, x)
        assert_close(
            y,
            expected.astype(jnp.bfloat16),
            dtype=jnp.bfloat16,
            rtol=float(jnp.finfo(jnp.bfloat16).eps),
        )
        assert_same_kind(new, batch_stats)
