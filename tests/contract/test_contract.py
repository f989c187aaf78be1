"""What holds for every layer: transformations of JAX change nothing, and the carry keeps its kind."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.compare import (
    assert_close,
    assert_finite,
    assert_identical,
    assert_same_kind,
    assert_trees_close,
)
from tests.contract.layers import FEATURES, LAYERS, SHAPE, arguments

EPS = float(jnp.finfo(jnp.float32).eps)
# Programs compiled differently may add in another order: tens of roundings of terms of order 10.
REORDERED = {"rtol": 100 * EPS, "atol": 100 * EPS}

pytestmark = [
    pytest.mark.parametrize(
        ("layer", "settings"),
        [
            pytest.param(
                layer,
                s,
                id=f"{layer.name}-{name}",
                marks=() if name == "plain" else pytest.mark.slow,
            )
            for layer in LAYERS
            for name, s in layer.settings.items()
        ],
    )
]
both_modes = pytest.mark.parametrize(
    "train", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"]
)


def bind(layer, settings, train):
    return functools.partial(layer.apply, train=train, **settings)


@both_modes
def test_jit_is_eager(layer, settings, train, rng):
    given, function = arguments(layer, settings, rng), bind(layer, settings, train)
    assert_trees_close(
        jax.jit(lambda *given: function(*given))(*given), function(*given), **REORDERED
    )


@both_modes
def test_shapes_dtypes_and_structure_are_kept_and_known_without_computing(
    layer, settings, train, rng
):
    params, batch_stats, x = arguments(layer, settings, rng)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        given = params, batch_stats, x.astype(dtype)
        y, new = bind(layer, settings, train)(*given)
        assert_same_kind((y, new), (given[2], batch_stats))
        assert_same_kind(jax.eval_shape(bind(layer, settings, train), *given), (y, new))
        if not train:
            assert_identical(new, batch_stats)


def test_training_moves_the_statistics(layer, settings, rng):
    if layer.has_statistics:
        params, batch_stats, x = arguments(layer, settings, rng)
        _, new = bind(layer, settings, True)(params, batch_stats, x)
        assert all((new[leaf] != batch_stats[leaf]).all() for leaf in batch_stats)


@both_modes
def test_vmap_over_x_is_a_loop(layer, settings, train, rng):
    params, batch_stats, x = arguments(layer, settings, rng)
    xs = jnp.stack([x, 3 * x - 100, x[::-1] + 1e3])
    function = functools.partial(bind(layer, settings, train), params, batch_stats)
    # At 1e3 the mean is rounded to 1e3 EPS, in units of a deviation near 1.
    assert_trees_close(
        jax.vmap(function)(xs), stacked([function(x) for x in xs]), rtol=100 * EPS, atol=1e5 * EPS
    )


@pytest.mark.slow
def test_vmap_over_parameters_and_statistics_is_a_loop(layer, settings, rng):
    given = [arguments(layer, settings, rng) for _ in range(3)]
    function = bind(layer, settings, True)
    assert_trees_close(
        jax.vmap(function)(*stacked(given)),
        stacked([function(*each) for each in given]),
        **REORDERED,
    )
    x = given[0][2]
    expected = stacked([function(params, batch_stats, x) for params, batch_stats, _ in given])
    assert_trees_close(
        jax.vmap(function, (0, 0, None))(*stacked(given)[:2], x), expected, **REORDERED
    )


@both_modes
def test_scan_carries_the_statistics(layer, settings, train, rng):
    params, batch_stats, x = arguments(layer, settings, rng)
    xs = jnp.stack([x, x + 1, 2 * x])
    function = functools.partial(bind(layer, settings, train), params)
    final, ys = jax.lax.scan(lambda carry, x: function(carry, x)[::-1], batch_stats, xs)
    assert_same_kind(final, batch_stats)
    for x, y in zip(xs, ys, strict=True):
        expected, batch_stats = function(batch_stats, x)
        assert_close(y, expected, **REORDERED)
    assert_trees_close(final, batch_stats, **REORDERED)


@both_modes
def test_the_second_call_neither_compiles_nor_transfers(layer, settings, train, rng):
    params, batch_stats, x = jax.device_put(arguments(layer, settings, rng), jax.devices()[0])
    traces = []

    @jax.jit
    def step(params, batch_stats, x):
        traces.append(None)
        return bind(layer, settings, train)(params, batch_stats, x)

    batches = [x + shift for shift in range(3)]
    for i, x in enumerate(batches):
        with jax.transfer_guard("allow" if i == 0 else "disallow"):
            _, batch_stats = step(params, batch_stats, x)
    assert len(traces) == step._cache_size() == 1


@pytest.mark.slow
@both_modes
def test_remat_changes_neither_values_nor_gradients(layer, settings, train, rng):
    given = arguments(layer, settings, rng)

    def value_and_grad(wrap):
        function = wrap(bind(layer, settings, train))

        def loss(params, batch_stats, x):
            y, new = function(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y)), new

        return jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)(*given)

    assert_trees_close(
        value_and_grad(jax.checkpoint), value_and_grad(lambda function: function), **REORDERED
    )


@pytest.mark.slow
def test_derivatives_agree_with_differences_to_second_order_in_both_modes(layer, settings, rng):
    with jax.enable_x64(True):
        params, batch_stats, x = arguments(layer, settings, rng, jnp.float64)

        def function(params, x):
            y, new = bind(layer, settings, True)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y) ** 2), [new[leaf] for leaf in ("mean", "var") if leaf in new]

        if layer.true_derivative:
            # Differences of step 1e-5 in float64: truncation and rounding meet near 1e-5.
            check_grads(
                jax.jit(function), (params, x), order=2, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4
            )
        else:
            loss = lambda x: function(params, x)[0]  # noqa: E731
            forward, reverse = jax.jit(jax.jacfwd(loss))(x), jax.jit(jax.jacrev(loss))(x)
            assert_close(forward, reverse, rtol=1e-10, atol=1e-10)
            second = [jax.jit(outer(jax.jacrev(loss)))(x) for outer in (jax.jacfwd, jax.jacrev)]
            assert_close(*second, rtol=1e-10, atol=1e-10)
            assert min(np.abs(forward).max(), np.abs(second[0]).max()) > 1e-3


def test_an_empty_mask_changes_nothing_and_stays_finite(layer, settings, rng):
    if layer.takes_mask and "virtual_batch_size" not in settings:
        params, batch_stats, x = arguments(layer, settings, rng)
        empty = bind(layer, settings | {"mask": jnp.zeros((1, 1, 1), bool)}, True)
        y, new = empty(params, batch_stats, jnp.full_like(x, jnp.nan))
        assert_finite(y)
        assert_identical(new, batch_stats)
        loss = lambda params, x: jnp.sum(empty(params, batch_stats, x)[0])  # noqa: E731
        assert_finite(jax.grad(loss, argnums=(0, 1))(params, jnp.full_like(x, jnp.nan)))


def test_a_huge_offset_costs_no_precision(layer, settings, rng):
    if layer.safe_far_from_zero:
        _, batch_stats, _ = arguments(layer, settings, rng)
        settings = settings | (
            {"mask": np.ones_like(settings["mask"])} if "mask" in settings else {}
        )
        # From -2 to 2, spread out along every axis, so that every statistic has a deviation near 1.
        steps = np.tensordot([29, 37, 17], np.indices(SHAPE), 1) % 72
        x = jnp.asarray(1e4 + np.linspace(-2, 2, 72)[steps], jnp.float32)
        y, _ = jax.jit(bind(layer, settings, True))({}, batch_stats, x)
        near, _ = jax.jit(bind(layer, settings, True))({}, batch_stats, x - 1e4)
        # The rounding of x itself is the same for both. The mean is rounded to half a ulp of 1e4; a
        # plain mean that is right to 1/512 of a deviation stands.
        assert_close(y, near, atol=2.5 * np.spacing(np.float32(1e4)))


def test_the_arguments_are_left_as_they_were(layer, settings, rng):
    given = arguments(layer, settings, rng)
    copies = jax.tree.map(jnp.copy, given)
    bind(layer, settings, True)(*given)
    assert_identical(given, copies)
    assert all(
        leaf.shape in ((FEATURES,), (1, FEATURES), ()) for leaf in jax.tree.leaves(given[:2])
    )


@pytest.mark.slow
@both_modes
def test_a_masked_nan_leaves_no_trace(layer, settings, train, rng):
    if layer.takes_mask:
        params, batch_stats, x = arguments(layer, settings, rng)
        mask = np.broadcast_to(settings.get("mask", True), SHAPE) & (
            np.arange(72).reshape(SHAPE) % 7 > 0
        )

        def loss(params, x):
            y, new = bind(layer, settings | {"mask": mask}, train)(params, batch_stats, x)
            return jnp.sum(jnp.where(mask, jnp.tanh(y), 0)), (y, new)

        results = []
        for hidden in (0.0, jnp.nan, jnp.inf):
            (_, (y, new)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                params, jnp.where(mask, x, hidden)
            )
            assert_finite(y)
            results.append((jnp.where(mask, y, 0), new, gradients))
        for other in results[1:]:
            assert_trees_close(other, results[0], **REORDERED)


@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_axes_may_be_named_in_any_order_and_from_either_end(layer, settings, sign, rng):
    """With the features in the middle of x instead of at its end."""
    params, batch_stats, x = arguments(layer, settings, rng)
    expected, expected_new = bind(layer, settings, True)(params, batch_stats, x)
    named = {"feature_axes": (-1,)} | layer.axes | settings
    for name in ("feature_axes", "reduction_axes"):
        if name in named:
            moved = [(0, 2, 1)[axis] for axis in np.atleast_1d(named[name])]
            named[name] = tuple(axis if sign > 0 else axis - 3 for axis in reversed(moved))
    if "mask" in named:
        named["mask"] = np.moveaxis(named["mask"], -1, 1)
    y, new = bind(layer, named, True)(params, batch_stats, jnp.moveaxis(x, -1, 1))
    assert_close(jnp.moveaxis(y, 1, -1), expected, **REORDERED)
    assert_trees_close(new, expected_new, **REORDERED)


@both_modes
def test_a_constant_input_gives_the_bias(layer, settings, train, rng):
    if layer.safe_far_from_zero and train:
        params, batch_stats, x = arguments(layer, settings, rng)
        y, _ = bind(layer, settings, train)(params, batch_stats, jnp.full_like(x, 777.0))
        bias = layer.activation(params.get("bias", jnp.zeros(FEATURES)))
        assert_close(y, jnp.broadcast_to(bias, SHAPE), atol=1e-6)


@pytest.mark.slow
def test_a_constant_input_has_finite_derivatives(layer, settings, rng):
    params, batch_stats, x = arguments(layer, settings, rng)

    def loss(params, x):
        return jnp.sum(jnp.tanh(bind(layer, settings, True)(params, batch_stats, x)[0]))

    for value in (0.0, 3.0):
        gradients = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.full_like(x, value))
        assert_finite(gradients)
        assert_finite(
            jax.jit(jax.jvp, static_argnums=0)(partial(loss, params), (x,), (jnp.ones_like(x),))
        )


@both_modes
def test_float16_near_its_largest_number(layer, settings, train, rng):
    """60,000 squared is far beyond float16: statistics are those of the same numbers in float32."""
    params, batch_stats, _ = arguments(layer, settings, rng)
    x = jnp.asarray(rng.choice([-60_000.0, 60_000.0, 30_000.0], SHAPE), jnp.float16)
    dtype = jnp.float32  # of y, which need not fit float16 at inference
    y, new = bind(layer, settings | {"dtype": dtype}, train)(params, batch_stats, x)
    expected, expected_new = bind(layer, settings, train)(
        params, batch_stats, x.astype(jnp.float32)
    )
    assert_close(y, expected, **REORDERED, dtype=dtype)
    assert_trees_close(new, expected_new, **REORDERED)


@both_modes
def test_dtype_is_that_of_y(layer, settings, train, rng):
    params, batch_stats, x = arguments(layer, settings, rng)
    expected, _ = bind(layer, settings, train)(params, batch_stats, x)
    y, new = bind(layer, settings | {"dtype": jnp.bfloat16}, train)(params, batch_stats, x)
    assert_close(
        y,
        expected.astype(jnp.bfloat16),
        dtype=jnp.bfloat16,
        rtol=float(jnp.finfo(jnp.bfloat16).eps),
    )
    assert_same_kind(new, batch_stats)


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
