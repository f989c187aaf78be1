"""The wrappers of `normjax.nnx` compute what Flax's do, without changing the wrapped layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import normjax
from normjax import nnx as nj
from tests.compare import (
    assert_close,
    assert_identical,
    assert_same_kind,
    assert_trees_close,
    rounding,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
normal = nnx.initializers.normal()
HALF = jnp.float16
WRAPPERS = ["WeightNorm", "SpectralNorm", "WeightStandardization"]


def dense(rngs):
    return nnx.Linear(4, 5, bias_init=normal, rngs=rngs)


def conv(rngs):
    return nnx.Conv(4, 5, (2,), bias_init=normal, rngs=rngs)


WEIGHT = [
    (dense, {}),
    (dense, {"feature_axes": 0, "epsilon": 0.1, "scale_init": nnx.initializers.constant(2.0)}),
    (dense, {"feature_axes": None}),
    (dense, {"feature_axes": (0, 1), "use_scale": False}),
    (dense, {"variable_filter": nnx.Param}),
    (conv, {"feature_axes": (0, -1), "dtype": HALF}),
]
SPECTRAL = [
    (dense, {}),
    (dense, {"n_steps": 3, "epsilon": 1e-7}),
    (dense, {"n_steps": 0}),
    (conv, {"dtype": HALF}),
]
CASES = [("WeightNorm", *case) for case in WEIGHT]
CASES += [
    ("SpectralNorm", layer, options | {"update_stats": u})
    for layer, options in SPECTRAL
    for u in (True, False)
]


def wrap(package, name, layer=dense, **options):
    return getattr(package, name)(layer(nnx.Rngs(0)), **options, rngs=nnx.Rngs(1))


def values(module):
    return nnx.to_pure_dict(nnx.state(module))


def batch(rng):
    return jnp.asarray(rng.normal(0.5, 1, (2, 3, 4)), jnp.float32)


@pytest.mark.parametrize(("name", "layer", "options"), CASES)
def test_it_is_flaxs_for_every_constructor_argument(rng, name, layer, options):
    ours, theirs = (wrap(package, name, layer, **options) for package in (nj, nnx))
    assert_identical(values(ours), values(theirs))
    x, before = batch(rng), values(ours)["layer_instance"]
    half = rounding(HALF) if "dtype" in options else 0.0
    flax_y = theirs(x)
    assert_close(ours(x), flax_y, rtol=1e-5 + half, atol=1e-5 + half, dtype=flax_y.dtype)
    assert_identical(values(ours)["layer_instance"], before)
    if name == "SpectralNorm":
        assert_trees_close(
            values(ours).get("batch_stats"), values(theirs).get("batch_stats"), **CLOSE
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer", "options"), [CASES[0], CASES[5], CASES[6]])
def test_its_gradients_are_flaxs(rng, name, layer, options):
    x, half = batch(rng), rounding(HALF) if "dtype" in options else 0.0
    modules = [wrap(package, name, layer, **options) for package in (nj, nnx)]

    @nnx.jit
    def gradients(modules):
        loss = lambda module: weighted_sum(module(x))  # noqa: E731
        return [nnx.to_pure_dict(nnx.grad(loss)(module))["layer_instance"] for module in modules]

    grads, flax_grads = gradients(modules)
    assert_same_kind(grads, flax_grads)
    assert_trees_close(grads, flax_grads, rtol=1e-4 + half, atol=1e-4 + 4 * half)


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_state_moves_both_ways(rng, name):
    x = batch(rng)
    for give, take in ((nj, nnx), (nnx, nj)):
        giver, taker = wrap(give, name), wrap(take, name)
        nnx.update(taker, jax.tree.map(lambda leaf: leaf + 1, nnx.state(taker)))
        nnx.update(taker, nnx.state(giver))
        assert_close(taker(x), giver(x), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "call"), [("WeightNorm", {}), ("SpectralNorm", {"update_stats": True})]
)
def test_training_is_that_of_linen(rng, name, call):
    x, target = batch(rng), jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32)
    module = getattr(linen, name)(linen.Dense(5))
    variables = module.init(jax.random.key(0), x, **call)
    norm = wrap(nj, name)
    own = variables["params"]["layer_instance"]
    norm.layer_instance.kernel[...], norm.layer_instance.bias[...] = own["kernel"], own["bias"]
    if name == "SpectralNorm":
        norm.batch_stats["kernel", "u"][...] = variables["batch_stats"]["layer_instance/kernel/u"]
    optimizer = nnx.Optimizer(norm, optax.sgd(0.1), wrt=nnx.Param)
    for _ in range(3):
        grads = nnx.grad(lambda norm: jnp.mean((norm(x) - target) ** 2))(norm)
        optimizer.update(norm, grads)

        def loss(params, rest=variables):
            y, updates = module.apply(rest | {"params": params}, x, mutable=["batch_stats"], **call)
            return jnp.mean((y - target) ** 2), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        variables = (
            variables
            | updates
            | {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)}
        )
    assert_trees_close(
        values(norm)["layer_instance"], variables["params"]["layer_instance"], **CLOSE
    )
    if name == "WeightNorm":
        scale = norm.scales["kernel",]
        assert isinstance(scale, nnx.Param)
        assert_close(scale[...], variables["params"]["layer_instance/kernel/scale"], **CLOSE)
        assert jnp.abs(scale[...] - 1).min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_layer_stays_as_it_is_under_transformations(rng, name):
    x, norm = batch(rng), wrap(nj, name)
    before = values(norm)["layer_instance"]
    loss = lambda norm, x: weighted_sum(norm(x))  # noqa: E731
    y = norm(x, update_stats=False) if name == "SpectralNorm" else norm(x)
    nnx.jit(lambda norm, x: norm(x))(norm, x)
    nnx.jit(nnx.grad(loss))(norm, x)
    nnx.remat(lambda norm, x: norm(x))(norm, x)
    assert nnx.eval_shape(lambda norm: norm(x), norm).shape == y.shape
    assert_identical(values(norm)["layer_instance"], before)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_layer_stays_as_it_is_when_the_call_fails(name):
    norm = wrap(nj, name)
    before = values(norm)["layer_instance"]
    with pytest.raises(TypeError):
        norm(jnp.ones((2, 3)))
    assert_identical(values(norm)["layer_instance"], before)


@pytest.mark.parametrize("name", WRAPPERS)
def test_transformations_of_jax_may_close_over_it(rng, name):
    x, norm = batch(rng), wrap(nj, name)
    norm.eval()
    y = norm(x)
    for call in (jax.jit(norm), jax.vmap(norm)):
        assert_close(call(x), y, **CLOSE)
    (dx,) = jax.vjp(norm, x)[1](jnp.ones_like(y))
    (expected,) = jax.vjp(lambda x: nnx.merge(*nnx.split(norm))(x), x)[1](jnp.ones_like(y))
    assert_close(dx, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_it_works_under_vmap_and_scan_of_nnx(rng, name):
    x = batch(rng)
    make = lambda rngs: getattr(nj, name)(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)  # noqa: E731
    norms = nnx.vmap(make)(nnx.Rngs(0).split(3))
    before = values(norms)["layer_instance"]
    y = nnx.scan(lambda x, norm: norm(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, norms)
    assert_identical(values(norms)["layer_instance"], before)
    norms, expected = nnx.vmap(make)(nnx.Rngs(0).split(3)), x
    for index in range(3):
        graphdef, state = nnx.split(norms)
        expected = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], state))(expected)
    assert_close(y, expected, rtol=1e-4, atol=1e-4)


class Stateful(nnx.Module):
    """A layer that updates its own running statistics, counter of keys, and records."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x)
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "jit"), [("WeightNorm", True), *((name, False) for name in WRAPPERS)]
)
def test_what_the_layer_updates_is_updated(rng, name, jit):
    x, norm = batch(rng), wrap(nj, name, Stateful)
    kernel = norm.layer_instance.linear.kernel[...]
    call = nnx.capture(lambda norm, x: norm(x), nnx.Intermediate)
    first, sown = (nnx.jit(call) if jit else call)(norm, x)
    second, _ = call(norm, x)
    assert ((first == 0) != (second == 0)).any()  # the dropout has moved on
    assert (norm.layer_instance.norm.mean[...] != 0).all()
    assert_identical(norm.layer_instance.linear.kernel[...], kernel)
    assert any((leaf.shape == x.shape) and (leaf == x).all() for leaf in jax.tree.leaves(sown))


def test_weights_that_are_shared_are_normalized_once(rng):
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first = self.second = nnx.Linear(4, 4, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    norm = wrap(nj, "WeightNorm", Twice)
    kernel = norm.layer_instance.first.kernel[...]
    w = kernel / jnp.linalg.norm(kernel, axis=0)
    assert_close(norm(batch(rng)), batch(np.random.default_rng(0)) @ w @ w, rtol=1e-5, atol=1e-5)


def test_train_and_eval_choose_and_the_call_overrules_them(rng):
    x, norm = batch(rng), wrap(nj, "SpectralNorm")
    before = values(norm)
    norm.eval()
    norm(x)
    norm.train()
    norm(x, update_stats=False)
    assert_identical(values(norm), before)
    norm(x)
    norm.eval()
    after = values(norm)
    assert (
        jnp.abs(after["batch_stats"]["kernel", "u"] - before["batch_stats"]["kernel", "u"]).max()
        > 0.01
    )
    norm(x, True)
    assert (
        jnp.abs(
            values(norm)["batch_stats"]["kernel", "u"] - after["batch_stats"]["kernel", "u"]
        ).max()
        > 0
    )


@pytest.mark.slow
def test_what_does_not_fit_is_refused_as_in_flax(rng):
    for package in (nj, nnx):
        with pytest.raises(ValueError, match="3D but error_on_non_matrix is True"):
            wrap(package, "SpectralNorm", conv, error_on_non_matrix=True)
        for name in ("WeightNorm", "SpectralNorm"):
            norm = wrap(package, name)
            norm.layer_instance.other_kernel = nnx.Param(jnp.ones((2, 2)))
            norm.variable_filter = lambda path, _: "kernel" in path[-1]
            with pytest.raises(RuntimeError, match="other_kernel"):
                norm(batch(rng))
    with pytest.raises(ValueError, match="feature_axes"):
        wrap(nj, "WeightNorm", feature_axes=2, use_scale=False)(batch(rng))


@pytest.mark.parametrize(
    "options", [{}, {"scaled": True, "epsilon": 0.1}, {"feature_axes": None}], ids=str
)
def test_weight_standardization_is_the_function_of_its_variables(rng, options):
    x, norm = (
        batch(rng),
        wrap(nj, "WeightStandardization", conv, use_scale=True, scale_init=normal, **options),
    )
    scale, layer = norm.scales["kernel",], norm.layer_instance
    arguments = options | {"feature_axes": () if "feature_axes" in options else -1}
    w, _ = normjax.weights.weight_standardization(
        {"scale": scale[...]}, {}, layer.kernel[...], True, **arguments
    )
    plain = conv(nnx.Rngs(0))
    plain.kernel[...] = w
    assert isinstance(scale, nnx.Param)
    assert_close(norm(x), plain(x), **CLOSE)
    other = wrap(nj, "WeightStandardization", conv, variable_filter=nnx.PathContains("bias"))
    assert_identical(other(x), conv(nnx.Rngs(0))(x))


@pytest.mark.slow
def test_weights_that_start_at_zero_are_left_alone_as_in_flax(rng):
    x = batch(rng)
    for package in (nj, nnx):
        norm = wrap(package, "SpectralNorm")
        norm.layer_instance.kernel[...] = jnp.zeros((4, 5))
        norm(x)
        assert_identical(norm.batch_stats["kernel", "u"][...], jnp.zeros((1, 5)))
        norm.layer_instance.kernel[...] = jnp.full((4, 5), 7.0)
        assert_identical(norm(x), norm.layer_instance(x))
        assert_identical(norm.layer_instance.kernel[...], jnp.full((4, 5), 7.0))
