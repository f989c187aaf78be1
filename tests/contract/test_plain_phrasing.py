"""Under `plain_phrasing` a layer is elementary operations alone, with the values it always has."""

import contextlib
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental.jet import jet
from jax.extend.core import jaxpr_as_fun

import normjax as nj
from tests.compare import assert_close, assert_trees_close, at_once
from tests.contract.cases import CASES, EPS, REORDERED, every_case, of
from tests.contract.layers import FEATURES, SHAPE

# What readers of jaxprs know; whatever else a layer needs is to be added here by hand.
ELEMENTARY = set(
    """abs add add_any and broadcast_in_dim clamp concatenate convert_element_type copy copy_p
    cumsum div dot_general eq exp expm1 ge gt integer_pow is_finite iota le log log1p lt max min
    mul ne neg not or pad pow real reduce_and reduce_max reduce_or reduce_sum reduce_window_sum
    reshape rsqrt select_n sign slice split sqrt square squeeze stop_gradient sub tanh
    transpose""".split()
)
# Of jnp.clip, jnp.where and so on, which JAX compiles for themselves.
CALLS = {"jit", "pjit"}


def primitives(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name in CALLS:
            found |= primitives(inner.jaxpr)
        else:
            found.add(eqn.primitive.name)
    return found


def in_both_modes(case):
    def run(params, batch_stats, x):
        def loss(params, x):
            y, new = case.apply(True)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y)), (y, new)

        gradients, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, new, case.apply(False)(params, batch_stats, x)[0], gradients

    return run


def usual_and_plain(run, *given):
    """What a function gives as usual, and under `plain_phrasing`: from one program."""

    def both(*given):
        usual = run(*given)
        with nj.plain_phrasing():
            return usual, run(*given)

    return at_once(both, *given)


@every_case
def test_there_are_elementary_operations_alone(case, rng):
    given = case.arguments(rng)
    with nj.plain_phrasing():
        for train in (True, False):
            assert primitives(jax.make_jaxpr(case.apply(train))(*given).jaxpr) <= ELEMENTARY
    usual = primitives(jax.make_jaxpr(case.apply(False))(*given).jaxpr)
    assert "custom_jvp_call" in usual


@pytest.mark.slow
@every_case
def test_values_and_gradients_are_the_same(case, rng):
    """In double precision, since some statistics of few elements magnify the rounding."""
    with jax.enable_x64(True):
        expected, plain = usual_and_plain(in_both_modes(case), *case.arguments(rng, jnp.float64))
        assert_trees_close(plain, expected, rtol=1e-9, atol=1e-9)


@every_case
def test_values_are_the_same_in_narrow_dtypes(case, rng):
    params, batch_stats, x = case.arguments(rng)
    rtols = {"float32": REORDERED["rtol"], "bfloat16": float(jnp.finfo(jnp.bfloat16).eps)}

    def run(x):
        return {dtype: case.apply(True)(params, batch_stats, x.astype(dtype)) for dtype in rtols}

    expected, plain = usual_and_plain(run, x)
    for dtype, rounded in rtols.items():
        assert plain[dtype][0].dtype == dtype
        assert_trees_close(plain[dtype], expected[dtype], rtol=rounded, atol=rounded)


@of([case for case in CASES if case.layer.safe_far_from_zero])
def test_far_from_zero_the_variance_is_right(case, rng):
    params, batch_stats, x = case.arguments(rng)
    (expected, _), (y, _) = usual_and_plain(case.apply(True), params, batch_stats, x + 1e4)
    # The mean is rounded to half a ulp of 1e4, in units of a deviation that may be small.
    assert_close(y, expected, rtol=1e5 * EPS, atol=1e5 * EPS)


@every_case
def test_second_derivatives_are_the_same_in_float32(case, rng):
    """They are derived from the formula, in which powers of the variance must not overflow."""
    params, batch_stats, x = case.arguments(rng)
    direction = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)

    def along(x):
        def loss(x):
            return jnp.sum(jnp.tanh(case.apply(True)(params, batch_stats, x)[0]))

        return jax.jvp(jax.grad(loss), (x,), (direction,))[1]

    expected, found = usual_and_plain(along, x)
    scale = float(np.abs(expected).max())
    assert_close(found, expected, atol=1e-3 * scale)


PHRASINGS = {"as usual": contextlib.nullcontext, "plain": nj.plain_phrasing}


@pytest.mark.parametrize("train", [True, False])
@every_case
def test_jet_gives_derivatives_of_higher_order(case, train, rng):
    """JAX's jet cannot read rules of derivatives. A layer that it calls itself needs no context."""
    params, batch_stats, x = case.arguments(rng)
    direction = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)

    def layer(x):
        return case.apply(train)(params, batch_stats, x)[0]

    def slope(x):
        return jax.jvp(layer, (x,), (direction,))[1]

    def series(x):
        found = {}
        for name, phrasing in PHRASINGS.items():
            with phrasing():
                y, terms = jet(layer, (x,), ([direction, jnp.zeros_like(x)],))
            found[name] = y, *terms
        return found, (layer(x), slope(x), jax.jvp(slope, (x,), (direction,))[1])

    found, expected = at_once(series, x)
    for name in PHRASINGS:
        for order, (term, wanted) in enumerate(zip(found[name], expected, strict=True)):
            atol = 1e-3 * max(1, float(np.abs(wanted).max()))
            assert_close(term, wanted, rtol=1e-3, atol=atol, case=f"{name}, order {order}")


def is_plain(function, *given):
    return "custom_jvp_call" not in str(jax.make_jaxpr(function)(*given))


def test_it_acts_where_a_function_is_traced_in_this_thread_alone(rng):
    layer = jax.jit(partial(nj.layer_norm, {}, {}, train=True))
    x = jnp.ones((2, 3))
    assert not is_plain(lambda x: layer(x=x), x)
    seen = {}
    with nj.plain_phrasing():
        assert is_plain(lambda x: layer(x=x), x)
        other = threading.Thread(
            target=lambda: seen.update(plain=is_plain(lambda x: layer(x=x), x))
        )
        other.start()
        other.join()
        with nj.plain_phrasing():
            assert is_plain(lambda x: layer(x=x), x)
        assert is_plain(lambda x: layer(x=x), x)
    assert seen == {"plain": False}
    assert not is_plain(lambda x: layer(x=x), x)


def test_an_error_ends_it():
    with pytest.raises(KeyError), nj.plain_phrasing():
        raise KeyError
    assert not is_plain(lambda x: nj.layer_norm({}, {}, x, True), jnp.ones((2, 3)))


SETTINGS = {
    "BatchNorm": {"use_running_average": True},
    "BatchRenorm": {"use_running_average": True},
    "GroupNorm": {"num_groups": 2},
}
WRAPPERS = ("SpectralNorm", "WeightNorm", "WeightStandardization")


@pytest.mark.usefixtures("promotion_as_in_flax")
@pytest.mark.parametrize("name", [name for name in nj.linen.__all__ if name not in WRAPPERS])
def test_flax_modules(name):
    layer = getattr(nj.linen, name)(**SETTINGS.get(name, {}))
    variables = layer.init(jax.random.key(0), jnp.ones(SHAPE))
    module = getattr(nj.nnx, name)(FEATURES, **SETTINGS.get(name, {}), rngs=nnx.Rngs(0))
    with nj.plain_phrasing():
        for run in (partial(layer.apply, variables), module):
            assert primitives(jax.make_jaxpr(run)(jnp.ones(SHAPE)).jaxpr) <= ELEMENTARY


@pytest.mark.usefixtures("promotion_as_in_flax")
@pytest.mark.parametrize("name", WRAPPERS)
def test_flax_wrappers(name):
    given = {"update_stats": False} if name == "SpectralNorm" else {}
    layer = getattr(nj.linen, name)(nn.Dense(FEATURES))
    x = jnp.ones((2, 3))
    variables = layer.init(jax.random.key(0), x, **given)
    module = getattr(nj.nnx, name)(nnx.Linear(3, FEATURES, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with nj.plain_phrasing():
        for run in (partial(layer.apply, variables, **given), partial(module, **given)):
            assert primitives(jax.make_jaxpr(run)(x).jaxpr) <= ELEMENTARY


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_as_in_flax")
def test_a_folded_network(rng):
    """Its program is traced before an exporter sees it, which may replace Flax's layers."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = jnp.maximum(nj.linen.BatchNorm(use_running_average=True)(x), 0)
            return nn.Dense(3)(nj.linen.LayerNorm()(x).mean((1, 2)))

    x = jnp.asarray(rng.normal(size=(2, 5, 5, 3)), jnp.float32)
    variables = Network().init(jax.random.key(0), x)
    folded = nj.deploy.fold(Network().apply, variables, x, show=False)
    with nj.plain_phrasing():
        program = jax.make_jaxpr(partial(folded.apply, folded.variables))(x)
    assert primitives(program.jaxpr) <= ELEMENTARY | {"conv_general_dilated"}
    (y,) = jaxpr_as_fun(program)(x)
    assert_close(y, Network().apply(variables, x), rtol=1e-5, atol=1e-5)
