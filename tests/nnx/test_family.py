"""The layers of `normjax.nnx` without batch statistics replace `flax.nnx`'s."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from normjax import linen as nj_linen
from normjax import nnx as nj
from tests.compare import (
    assert_close,
    assert_finite,
    assert_identical,
    assert_same_kind,
    assert_trees_close,
    at_once,
    largest,
    rounding,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
# Flax's variance is the difference of two sums; near zero mean that costs it some tens of
# roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
normal = nnx.initializers.normal()
HALF, BRAIN = jnp.float16, jnp.bfloat16
EVERY = [
    {},
    {"epsilon": 0.1, "scale_init": normal, "use_fast_variance": False},
    {"use_scale": False, "dtype": HALF},
    {"param_dtype": BRAIN},
    {"dtype": BRAIN, "param_dtype": BRAIN},
    {"promote_dtype": lambda arrays, dtype: nnx.nn.dtypes.promote_dtype(arrays, dtype=HALF)},
]
SHIFTED = [{"use_bias": False}, {"use_scale": False, "use_bias": False, "bias_init": normal}]
AXES = [
    {"reduction_axes": (1, 2)},
    {"feature_axes": (1, -1), "num_features": 24},
    {"reduction_axes": (0, -1), "feature_axes": (2, 3), "num_features": 18},
]
OWN = {
    "LayerNorm": [*SHIFTED, *AXES],
    "RMSNorm": AXES,
    "GroupNorm": [*SHIFTED, {"group_size": 3, "num_groups": None}, {"reduction_axes": (1, 2, 3)}],
    "InstanceNorm": [*SHIFTED, {"feature_axes": (1, -1), "num_features": 24}],
}
ALWAYS = {"GroupNorm": {"num_groups": 2}}
CASES = [(name, arguments, jnp.float32) for name in OWN for arguments in [*EVERY, *OWN[name]]]
CASES += [(name, arguments, BRAIN) for name in OWN for arguments in (EVERY[0], EVERY[4])]
GRADIENTS = [("LayerNorm", EVERY[4]), ("InstanceNorm", OWN["InstanceNorm"][-1])]
WRAPPERS = ["WeightNorm", "SpectralNorm"]


def pair(name, **arguments):
    """Ours and Flax's, made alike."""
    arguments = {"num_features": 6} | ALWAYS.get(name, {}) | arguments
    return [getattr(package, name)(**arguments, rngs=nnx.Rngs(0)) for package in (nj, nnx)]


def batch(rng, dtype=np.float32):
    return jnp.asarray(rng.normal(0.5, 1, (2, 4, 3, 6)), dtype)


def parameters(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


@pytest.mark.parametrize(("name", "arguments", "dtype"), CASES)
def test_it_is_flaxs_for_every_constructor_argument(rng, name, arguments, dtype):
    def run(x):
        modules = pair(name, **arguments)
        start = [parameters(module) for module in modules]
        nnx.update(modules[0], jax.tree.map(lambda leaf: leaf + 0.25, nnx.state(modules[0])))
        nnx.update(modules[1], nnx.state(modules[0]))
        return start, [module(x) for module in modules]

    start, (y, flax_y) = at_once(run, batch(rng, dtype))
    assert_identical(*start)
    half = rounding(dtype, *(arguments.get(kind, dtype) for kind in ("dtype", "param_dtype")))
    half = max(half, rounding(HALF) if "promote_dtype" in arguments else 0.0)
    assert_close(y, flax_y, rtol=1e-5 + half, atol=1e-5 + half, dtype=flax_y.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [(name, {}) for name in OWN] + GRADIENTS)
def test_its_gradients_are_flaxs(rng, name, arguments):
    x = batch(rng)

    def run(x):
        loss = lambda module, x: weighted_sum(module(x))  # noqa: E731
        found = [nnx.grad(loss, argnums=(0, 1))(module, x) for module in pair(name, **arguments)]
        return [(nnx.to_pure_dict(grads), dx) for grads, dx in found]

    ours, theirs = at_once(run, x)
    half = rounding(*(arguments.get(kind, x.dtype) for kind in ("dtype", "param_dtype")))
    assert_same_kind(ours, theirs)
    assert_trees_close(ours, theirs, rtol=1e-4 + half, atol=(1e-5 + half) * largest(theirs))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [jnp.float32, BRAIN])
def test_both_adapters_are_bit_for_bit_the_same(rng, name, dtype):
    x, module = batch(rng, dtype), pair(name)[0]
    other = getattr(nj_linen, name)(**ALWAYS.get(name, {}))
    assert_identical(module(x), other.apply({"params": parameters(module)}, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_masks_are_flaxs_and_may_hide_nan(rng, name):
    x = np.asarray(batch(rng))
    mask = rng.random(x.shape) < 0.7
    mask[:, 0] = True
    if name in ("LayerNorm", "RMSNorm"):
        mask[..., 0] = True
    y, flax_y = at_once(lambda x, mask: [m(x, mask=mask) for m in pair(name)], x, mask)
    assert_close(y, flax_y, rtol=1e-4, atol=1e-4)
    ours = pair(name)[0]
    hidden = np.asarray(ours(np.where(mask, x, np.float32(np.nan)), mask=np.float32(mask)))
    assert_close(np.where(mask, hidden, 0), np.where(mask, y, 0), rtol=1e-6, atol=1e-6)
    assert_finite((hidden, ours(x, mask=np.zeros(x.shape, np.float32))))


@pytest.mark.parametrize("name", [*OWN, *WRAPPERS])
def test_every_argument_of_flax_is_there_with_its_default(name):
    ours, theirs = getattr(nj, name), getattr(nnx, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "__call__"):
        mine, flaxs = (
            inspect.signature(getattr(kind, method)).parameters for kind in (ours, theirs)
        )
        assert [argument for argument in mine if argument in flaxs] == list(flaxs)
        for argument, parameter in flaxs.items():
            assert mine[argument].kind == parameter.kind
            if not callable(parameter.default):
                assert mine[argument].default == parameter.default, argument


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_state_moves_both_ways(rng, name):
    x = batch(rng)
    for giver, taker in (pair(name), pair(name)[::-1]):
        nnx.update(giver, jax.tree.map(lambda leaf: leaf + 0.25, nnx.state(giver)))
        nnx.update(taker, nnx.state(giver))
        graphdef, _ = nnx.split(taker)
        call = nnx.jit(lambda norm, x: norm(x))
        for receiver in (taker, nnx.merge(graphdef, nnx.state(giver))):
            assert_close(call(receiver, x), call(giver, x), **CLOSE)


@pytest.mark.parametrize(
    ("name", "axis"), [("LayerNorm", -1), ("RMSNorm", -1), ("GroupNorm", 1), ("InstanceNorm", 2)]
)
def test_statistics_are_shared_over_an_axis_as_in_flax(rng, name, axis):
    x = np.float32(rng.normal(0.5, 1, (2, 4, 4, 8)))
    parts = np.stack(np.split(x, 4, axis))

    def run(x, parts):
        norms = pair(name, axis_name="i", num_features=parts.shape[-1])
        ys = [jax.vmap(norm, axis_name="i")(parts) for norm in norms]
        return ys, pair(name, num_features=8)[0](x)

    ys, y = at_once(run, x, parts)
    assert_close(*ys, **CLOSE)
    assert_close(np.concatenate(ys[0], axis), y, **CLOSE)


@pytest.mark.parametrize("axes", [(1, -1), (2, 3)], ids=str)
def test_groups_get_their_own_statistics_whatever_is_reduced(rng, axes):
    other = linen.GroupNorm(num_groups=2, reduction_axes=axes, use_fast_variance=False)

    def run(x):
        norm, flaxs = pair("GroupNorm", reduction_axes=axes)
        return norm(x), flaxs(x), other.apply({"params": parameters(norm)}, x)

    y, flax_y, expected = at_once(run, batch(rng))
    assert_close(y, expected, **CLOSE)
    assert np.abs(flax_y - expected).max() > 0.1


def test_the_variance_is_safe_where_flaxs_is_not(rng):
    x = jnp.asarray(rng.normal(1e4, 1, (2, 4096)), jnp.float32)
    ys = at_once(lambda x: [norm(x) for norm in pair("LayerNorm", num_features=4096)], x)
    stds = [np.float64(y).std(-1) for y in ys]
    assert_close(stds[0], np.ones(2), atol=1e-3)
    assert (np.abs(stds[1] - 1) > 0.1).any()


def test_bfloat16_keeps_the_digits_of_the_input():
    # 1001 and 1003 are no bfloat16: rounding x first gives 1000 and 1004.
    x = jnp.array([[1000.0, 1001.0, 1002.0, 1003.0]])
    expected = (np.arange(4) - 1.5) / np.sqrt(1.25)
    for given in (x, x.astype(jnp.int32)):
        y = nj.LayerNorm(4, dtype=BRAIN, rngs=nnx.Rngs(0))(given)
        assert_close(y, expected[None], rtol=2**-8, atol=2**-8, dtype=BRAIN)


@pytest.mark.parametrize("name", OWN)
def test_integers_are_accepted_as_in_flax(rng, name):
    x = jnp.asarray(rng.integers(-5, 5, (2, 4, 3, 6)))
    y, flax_y = at_once(lambda x: [norm(x) for norm in pair(name)], x)
    assert_close(y, flax_y, **CLOSE, dtype=flax_y.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_the_offset_of_the_scale_is_that_of_the_function(rng, name):
    x, zeros = batch(rng), nnx.initializers.zeros
    shifted = getattr(nj, name)(6, scale_offset=1.0, scale_init=zeros, rngs=nnx.Rngs(0))
    assert_close(shifted(x), getattr(nnx, name)(6, rngs=nnx.Rngs(0))(x), **CLOSE)


REFUSED = [
    ("LayerNorm", {"reduction_axes": 4}, "reduction_axes"),
    ("LayerNorm", {"num_features": 5}, "params"),
    ("RMSNorm", {"feature_axes": (3, -1)}, "feature_axes"),
    ("GroupNorm", {"num_groups": None}, "group_size"),
    ("GroupNorm", {"num_groups": 4}, "divide"),
    ("GroupNorm", {"reduction_axes": (1, 2)}, "reduction_axes"),
    ("InstanceNorm", {"feature_axes": 0, "num_features": 2}, "leading dimension"),
]


@pytest.mark.parametrize(("name", "arguments", "match"), REFUSED)
def test_what_does_not_fit_is_refused(rng, name, arguments, match):
    with pytest.raises(ValueError, match=match):
        getattr(nj, name)(
            **{"num_features": 6} | ALWAYS.get(name, {}) | arguments, rngs=nnx.Rngs(0)
        )(batch(rng))


def test_the_metadata_of_the_variables_are_flaxs():
    for name in ("LayerNorm", "GroupNorm", "InstanceNorm"):
        for norm in pair(name, scale_metadata={"tag": "scale"}, bias_metadata={"tag": "bias"}):
            assert (norm.scale.tag, norm.bias.tag) == ("scale", "bias")
    assert pair("RMSNorm", scale_metadata={"tag": "scale"})[0].scale.tag == "scale"


def test_running_statistics_do_not_promote_y(rng):
    x = batch(rng, HALF)
    as_they_are = {"promote_dtype": lambda arrays, dtype: arrays, "param_dtype": HALF}
    y, flax_y = at_once(lambda x: [norm(x) for norm in pair("BatchNorm", **as_they_are)], x)
    assert_close(y, flax_y, rtol=rounding(HALF), atol=rounding(HALF), dtype=HALF)
