"""The layers of `normjax.linen` without batch statistics replace `flax.linen`'s."""

import dataclasses
import inspect

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from normjax import linen as nj
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
KEY = jax.random.key(0)
normal = nn.initializers.normal()
HALF, BRAIN = jnp.float16, jnp.bfloat16
EVERY = [
    {},
    {"epsilon": 0.1, "scale_init": normal, "use_fast_variance": False},
    {"use_scale": False, "dtype": HALF},
    {"param_dtype": BRAIN},
    {"dtype": BRAIN, "param_dtype": BRAIN},
    {"param_dtype": BRAIN, "force_float32_reductions": False},
]
SHIFTED = [{"use_bias": False}, {"use_scale": False, "use_bias": False, "bias_init": normal}]
# a fast variance of three values is not one
SMALL = {"reduction_axes": -1, "use_fast_variance": False}
AXES = [
    {"reduction_axes": (1, 2)},
    {"feature_axes": (1, -1)},
    {"reduction_axes": (0, -1), "feature_axes": (2, 3)},
]
OWN = {
    "LayerNorm": [*SHIFTED, *AXES],
    "RMSNorm": AXES,
    "GroupNorm": [
        *SHIFTED,
        {"group_size": 3, "num_groups": None},
        SMALL,
        {"reduction_axes": (1, -1)},
    ],
    "InstanceNorm": [*SHIFTED, {"feature_axes": (1, -1)}, {"feature_axes": (1, 2, 3)}],
}
GRADIENTS = [
    ("LayerNorm", EVERY[4]),
    ("GroupNorm", {"reduction_axes": (1, -1), "use_scale": False}),
]
ALWAYS = {"GroupNorm": {"num_groups": 2}}
CASES = [(name, arguments, jnp.float32) for name in OWN for arguments in [*EVERY, *OWN[name]]]
CASES += [(name, arguments, BRAIN) for name in OWN for arguments in (EVERY[0], EVERY[4])]
WRAPPERS = ["WeightNorm", "SpectralNorm"]


def pair(name, **arguments):
    """Ours and Flax's, made alike."""
    return [getattr(package, name)(**ALWAYS.get(name, {}) | arguments) for package in (nj, nn)]


def batch(rng, dtype=np.float32):
    return jnp.asarray(rng.normal(0.5, 1, (2, 4, 3, 6)), dtype)


def moved(rng, variables):
    """The variables with other values, so that none is 0 or 1."""
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.uniform(0.2, 0.4, leaf.shape), leaf.dtype), variables
    )


def results(module, variables, x, **call):
    """y, and the gradients of params and x."""

    def loss(params, x):
        y = module.apply({"params": params} if params else {}, x, **call)
        return weighted_sum(y), y

    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables.get("params", {}), x)
    return y, grads


@pytest.mark.parametrize(("name", "arguments", "dtype"), CASES)
def test_it_is_flaxs_for_every_constructor_argument(rng, name, arguments, dtype):
    modules = pair(name, **arguments)

    def run(x):
        own, variables = (module.init(KEY, x) for module in modules)
        changed = moved(rng, variables)
        return own, variables, [module.apply(changed, x) for module in modules]

    own, variables, (y, flax_y) = at_once(run, batch(rng, dtype))
    assert_identical(own, variables)
    half = rounding(dtype, *(arguments.get(kind, dtype) for kind in ("dtype", "param_dtype")))
    assert_close(y, flax_y, rtol=1e-5 + half, atol=1e-5 + half, dtype=flax_y.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [(name, {}) for name in OWN] + GRADIENTS)
def test_its_gradients_are_flaxs(rng, name, arguments):
    modules, x = pair(name, **arguments), batch(rng)

    def run(x):
        variables = moved(rng, modules[1].init(KEY, x))
        return [results(module, variables, x) for module in modules]

    (y, grads), (flax_y, flax_grads) = at_once(run, x)
    half = rounding(*(arguments.get(kind, x.dtype) for kind in ("dtype", "param_dtype")))
    assert_same_kind((y, grads), (flax_y, flax_grads))
    assert_trees_close(
        grads, flax_grads, rtol=1e-4 + half, atol=(1e-5 + half) * largest(flax_grads)
    )


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("shape", [(2, 4, 1, 6), (1, 4, 3, 6)], ids=str)
def test_masks_are_flaxs_and_need_not_be_boolean(rng, name, shape):
    x, modules = (
        batch(rng),
        pair(name, **({"reduction_axes": (1, 2, 3)} if name.startswith(("L", "R")) else {})),
    )
    mask = rng.random(shape) < 0.7
    mask[:, 0] = True  # each channel has something that counts

    def run(x, mask):
        variables = moved(rng, modules[1].init(KEY, x))
        return [module.apply(variables, x, mask=mask) for module in modules]

    assert_close(*at_once(run, x, np.float32(mask)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_what_a_mask_hides_may_be_nan_and_all_may_be_hidden(rng, name):
    x, (ours, _) = np.asarray(batch(rng)), pair(name)
    mask = np.ones((*x.shape[:-1], 1), bool)
    mask[0, 0, 0] = False

    @jax.jit
    def run(x, mask):
        return results(ours, moved(np.random.default_rng(0), ours.init(KEY, x)), x, mask=mask)

    y, grads = run(np.where(mask, x, np.float32(np.nan)), mask)
    assert_finite((y, grads))
    expected, _ = run(np.where(mask, x, np.float32(7)), mask)
    assert_close(np.where(mask, y, 0), np.where(mask, expected, 0))
    assert_finite(run(x, np.zeros_like(mask)))


@pytest.mark.parametrize("name", [*OWN, *WRAPPERS])
def test_every_field_and_call_argument_of_flax_is_there_with_its_default(name):
    ours, theirs = getattr(nj, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    fields = {field.name: field for field in dataclasses.fields(ours)}
    wanted = [field for field in dataclasses.fields(theirs) if field.name not in ("parent", "name")]
    assert [field for field in fields if field in {field.name for field in wanted}] == [
        field.name for field in wanted
    ]
    assert all(fields[field.name].default == field.default for field in wanted)
    call, flax_call = (inspect.signature(kind.__call__).parameters for kind in (ours, theirs))
    assert list(call) == list(flax_call)
    assert [p.default for p in call.values()] == [p.default for p in flax_call.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_checkpoints_load_both_ways(rng, name):
    x, modules = batch(rng), pair(name)
    for save, load in (modules, modules[::-1]):
        variables = moved(rng, save.init(KEY, x))
        restored = flax.serialization.from_bytes(
            load.init(KEY, x), flax.serialization.to_bytes(variables)
        )
        loaded, saved = at_once(load.apply, restored, x), at_once(save.apply, variables, x)
        assert_close(loaded, saved, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis"), [("LayerNorm", -1), ("RMSNorm", -1), ("GroupNorm", 1), ("InstanceNorm", 2)]
)
def test_statistics_are_shared_over_an_axis_as_in_flax(rng, name, axis):
    x = np.float32(rng.normal(0.5, 1, (2, 4, 4, 8)))
    modules, (whole, flaxs) = pair(name, axis_name="i"), pair(name)

    def run(x, parts):
        variables = flaxs.init(KEY, parts[0])
        ys = [
            jax.vmap(lambda x, m=module: m.apply(variables, x), axis_name="i")(parts)
            for module in modules
        ]
        return variables, modules[0].init(KEY, parts[0]), ys, whole.init_with_output(KEY, x)[0]

    variables, own, ys, y = at_once(run, x, np.stack(np.split(x, 4, axis)))
    assert_identical(own, variables)  # no axis is touched at initialization
    assert_close(*ys, **CLOSE)
    assert_close(np.concatenate(ys[0], axis), y, **CLOSE)


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "InstanceNorm"])
def test_the_variance_is_safe_where_flaxs_is_not(rng, name):
    x = jnp.asarray(rng.normal(1e4, 1, (2, 512, 4)), jnp.float32)
    modules = pair(
        name, **{"LayerNorm": {"reduction_axes": 1}, "GroupNorm": {"num_groups": 4}}.get(name, {})
    )
    ys = at_once(lambda x: [module.init_with_output(KEY, x)[0] for module in modules], x)
    stds = [np.float64(y).std(1) for y in ys]
    assert_close(stds[0], np.ones((2, 4)), atol=1e-3)
    assert (np.abs(stds[1] - 1) > 0.1).any()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_are_accepted_as_in_flax(rng, name, dtype):
    x = jnp.asarray(rng.integers(0, 2, (2, 4, 3, 6)), dtype)
    modules = pair(name)
    ours, theirs = at_once(lambda x: [module.init_with_output(KEY, x)[0] for module in modules], x)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4, dtype=theirs.dtype)


def test_large_integers_are_not_rounded_to_the_dtype_of_y():
    x = jnp.array([[1000, 1001, 1002, 1003]])
    expected = (np.arange(4) - 1.5) / np.sqrt(1.25)
    y, _ = nj.LayerNorm(dtype=BRAIN).init_with_output(KEY, x)
    assert_close(y, expected[None], rtol=2**-8, atol=2**-8, dtype=BRAIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LayerNorm", "InstanceNorm"])
def test_one_value_for_a_statistic_gives_the_bias_as_in_flax(name):
    x = jnp.array([[7.0], [-3.0]])
    for module in pair(name, bias_init=nn.initializers.constant(0.25)):
        assert_close(module.init_with_output(KEY, x)[0], np.full((2, 1), 0.25), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_complex_numbers_are_flaxs(rng, name):
    x = jnp.asarray(rng.normal(size=(4, 6)) + 1j * rng.normal(size=(4, 6)), jnp.complex64)
    for arguments, given in (
        ({}, x),
        ({"param_dtype": jnp.complex64}, x),
        ({"param_dtype": jnp.complex64}, np.real(x)),
    ):
        modules = pair(name, **arguments)
        ours, theirs = at_once(
            lambda x, modules=modules: [module.init_with_output(KEY, x)[0] for module in modules],
            given,
        )
        assert_close(ours, theirs, **CLOSE, dtype=theirs.dtype)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_the_offset_of_the_scale_is_that_of_the_function(rng, name):
    shifted = getattr(nj, name)(scale_offset=1.0, scale_init=nn.initializers.zeros)
    modules = shifted, getattr(nn, name)()
    y, flax_y = at_once(lambda x: [m.init_with_output(KEY, x)[0] for m in modules], batch(rng))
    assert_close(y, flax_y, **CLOSE)


REFUSED = [
    ("LayerNorm", {"reduction_axes": 4}, "reduction_axes"),
    ("LayerNorm", {"feature_axes": (1, 1)}, "feature_axes"),
    ("RMSNorm", {"feature_axes": -5}, "feature_axes"),
    ("GroupNorm", {"num_groups": None}, "group_size"),
    ("GroupNorm", {"group_size": 2}, "num_groups=None"),
    ("GroupNorm", {"num_groups": 4}, "divide"),
    ("GroupNorm", {"num_groups": None, "group_size": 4}, "divide"),
    ("GroupNorm", {"reduction_axes": (1, 2)}, "reduction_axes"),
    ("InstanceNorm", {"feature_axes": (0, 3)}, "leading dimension"),
]


@pytest.mark.parametrize(("name", "arguments", "match"), REFUSED)
def test_what_does_not_fit_is_refused(rng, name, arguments, match):
    with pytest.raises(ValueError, match=match):
        pair(name, **arguments)[0].init(KEY, batch(rng))


class Model(nn.Module):
    """Every layer, one after the other."""

    package: object

    @nn.compact
    def __call__(self, x):
        x = self.package.LayerNorm()(nn.Dense(6)(x))
        x = self.package.RMSNorm()(x)
        x = self.package.GroupNorm(num_groups=2)(x)
        x = self.package.WeightNorm(nn.Dense(6))(self.package.InstanceNorm()(x))
        return self.package.SpectralNorm(nn.Dense(6))(x, update_stats=True)


@pytest.mark.slow
def test_a_model_of_all_has_flaxs_variables_and_summary(rng):
    x = batch(rng)
    ours, theirs = (Model(package) for package in (nj, nn))
    assert_same_kind(*(jax.eval_shape(module.init, KEY, x) for module in (ours, theirs)))
    wide = {"console_kwargs": {"width": 240}, "depth": 1}
    summary = nn.tabulate(ours, KEY, **wide)(x)
    assert summary == nn.tabulate(theirs, KEY, **wide)(x)
    assert all(name in summary for name in [*OWN, *WRAPPERS])


class Block(nn.Module):
    package: object

    @nn.compact
    def __call__(self, x, _=None):
        return self.package.GroupNorm(num_groups=2)(self.package.LayerNorm()(nn.Dense(6)(x))), None


@pytest.mark.slow
@pytest.mark.parametrize("lift", ["scan", "remat", "vmap", "jit"])
def test_they_are_flaxs_under_flaxs_transformations(rng, lift):
    x, found = batch(rng), []
    options = {
        "scan": {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3},
        "vmap": {"variable_axes": {"params": 0}, "split_rngs": {"params": True}},
    }
    for package in (nj, nn):
        module = getattr(nn, lift)(Block, **options.get(lift, {}))(package)
        loss = lambda v, module=module: weighted_sum(module.apply(v, x)[0])  # noqa: E731
        found.append(at_once(jax.value_and_grad(loss), at_once(module.init, KEY, x)))
    assert_trees_close(*found, rtol=1e-4, atol=1e-4 * largest(found[1]))


@pytest.mark.parametrize("name", OWN)
def test_without_float32_reductions_y_has_the_dtype_of_parameters_whatever_is_loaded(rng, name):
    x, modules = batch(rng, BRAIN), pair(name, param_dtype=BRAIN, force_float32_reductions=False)

    def run(x):
        variables = pair(name)[1].init(KEY, x)
        return [module.apply(variables, x) for module in modules]

    y, flax_y = at_once(run, x)
    assert_close(y, flax_y, rtol=rounding(BRAIN), atol=rounding(BRAIN), dtype=BRAIN)
