"""`WeightNorm` and `SpectralNorm` of `normjax.linen` take the place of those of `flax.linen`."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from normjax import linen as nj
from tests.compare import (
    assert_close,
    assert_identical,
    assert_same_kind,
    assert_trees_close,
    at_once,
    rounding,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
KEY = jax.random.key(0)
normal = nn.initializers.normal()
BRAIN = jnp.bfloat16


def dense():
    return nn.Dense(5, bias_init=normal)


def conv():
    return nn.Conv(5, (2,), bias_init=normal)


WEIGHT = [
    (dense, {}),
    (dense, {"feature_axes": 0, "scale_init": normal, "epsilon": 0.1}),
    (dense, {"feature_axes": None}),
    (dense, {"feature_axes": (0, 1), "use_scale": False}),
    (dense, {"feature_axes": 0, "variable_filter": {"bias"}}),
    (dense, {"variable_filter": None}),
    (conv, {"feature_axes": (0, -1), "param_dtype": BRAIN}),
    (conv, {"dtype": BRAIN}),
]
SPECTRAL = [
    (dense, {}),
    (dense, {"n_steps": 3, "epsilon": 1e-7, "collection_name": "spectral"}),
    (dense, {"n_steps": 0}),
    (conv, {"dtype": BRAIN}),
    (conv, {"param_dtype": BRAIN}),
]
CASES = [("WeightNorm", *case, {}) for case in WEIGHT]
CASES += [
    ("SpectralNorm", *case, {"update_stats": update})
    for case in SPECTRAL
    for update in (True, False)
]
# Flax's state drifts to float32; see below
CASES.remove(("SpectralNorm", *SPECTRAL[-1], {"update_stats": True}))


class Model(nn.Module):
    """A wrapped layer within a model, where it has a name."""

    package: object
    norm: str
    layer: object
    options: object

    @nn.compact
    def __call__(self, x, **call):
        return getattr(self.package, self.norm)(self.layer(), **self.options)(
            nn.Dense(4)(x), **call
        )


def pair(norm, layer, options):
    return [Model(package, norm, layer, flax.core.freeze(options)) for package in (nj, nn)]


def batch(rng):
    return jnp.asarray(rng.normal(0.5, 1, (2, 3, 4)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "layer", "options", "call"), CASES)
def test_it_is_flaxs_for_every_constructor_argument(rng, norm, layer, options, call):
    modules, x = pair(norm, layer, options), batch(rng)
    # One by one: drawing kernels is what takes long to compile, and is compiled once for all tests.
    mine, variables = jax.device_get([module.init(KEY, x, **call) for module in modules])
    half = rounding(BRAIN) if BRAIN in options.values() else 0.0
    assert_same_kind(mine, variables)
    assert_trees_close(mine, variables, rtol=1e-5 + half, atol=1e-6 + half)
    variables = jax.tree.map(
        lambda leaf: leaf + rng.uniform(0.2, 0.4, leaf.shape).astype(leaf.dtype), variables
    )
    state = [name for name in variables if name != "params"]
    results = at_once(
        lambda v, x: [module.apply(v, x, mutable=state, **call) for module in modules], variables, x
    )
    assert_same_kind(*results)
    assert_trees_close(*results, rtol=1e-4 + half, atol=1e-5 + half)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "layer", "options", "call"), [CASES[1], CASES[7], CASES[8]])
def test_its_gradients_are_flaxs(rng, norm, layer, options, call):
    modules, x = pair(norm, layer, options), batch(rng)
    half = rounding(BRAIN) if BRAIN in options.values() else 0.0
    variables = modules[1].init(KEY, x, **call)

    def loss(params, x, module):
        given = variables | {"params": params}
        return weighted_sum(module.apply(given, x, mutable=["batch_stats"], **call)[0])

    def run(params, x):
        return [jax.grad(loss, argnums=(0, 1))(params, x, module) for module in modules]

    grads = at_once(run, variables["params"], x)
    assert_same_kind(*grads)
    assert_trees_close(*grads, rtol=1e-4 + 4 * half, atol=1e-4 + 4 * half)


@pytest.mark.parametrize(
    ("norm", "call"), [("WeightNorm", {}), ("SpectralNorm", {"update_stats": True})]
)
def test_checkpoints_load_both_ways(rng, norm, call):
    x = batch(rng)
    for save, load in (pair(norm, conv, {}), pair(norm, conv, {})[::-1]):
        variables = save.init(KEY, x, **call)
        other = load.init(jax.random.key(1), x, **call)
        restored = flax.serialization.from_bytes(other, flax.serialization.to_bytes(variables))

        def run(variables, restored, x, save=save, load=load):
            pairs = (load, restored), (save, variables)
            return [m.apply(v, x, mutable=["batch_stats"], **call)[0] for m, v in pairs]

        assert_close(*at_once(run, variables, restored, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "call"), [("WeightNorm", {}), ("SpectralNorm", {"update_stats": True})]
)
def test_weights_are_never_overwritten(rng, norm, call):
    x, (ours, theirs) = batch(rng), pair(norm, dense, {})
    variables = jax.device_get(ours.init(KEY, x, **call))
    variables = jax.tree.map(lambda leaf: np.asarray(2 * leaf + 0.1, leaf.dtype), variables)

    def update(variables, x):
        return [module.apply(variables, x, mutable=True, **call)[1] for module in (ours, theirs)]

    mine, updates = at_once(update, variables, x)
    assert_identical(mine["params"], variables["params"])
    if norm == "SpectralNorm":
        assert (
            np.abs(
                updates["params"]["Dense_0"]["kernel"] - variables["params"]["Dense_0"]["kernel"]
            ).max()
            > 0.1
        )


class Stateful(nn.Module):
    """A layer with running statistics of one axis and of two."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(5)(x))
        return nn.BatchNorm(use_running_average=False, momentum=0.5, axis=(1, 2))(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "options", "call"),
    [("WeightNorm", {"variable_filter": None}, {}), ("SpectralNorm", {}, {"update_stats": True})],
)
def test_running_statistics_of_the_layer_are_its_own(rng, norm, options, call):
    x = batch(rng)
    module = getattr(nj, norm)(Stateful(), **options)

    variables = module.init(KEY, x, **call)
    update = partial(module.apply, mutable=["batch_stats"], **call)
    variables, updates = jax.device_get((variables, at_once(update, variables, x)[1]))
    before, after = (tree["batch_stats"]["layer_instance"] for tree in (variables, updates))
    start = {"mean": np.zeros((3, 5), np.float32), "var": np.ones((3, 5), np.float32)}
    assert_identical(before["BatchNorm_1"], start)
    assert all(
        (a != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    )
    names = {*variables["params"], *variables["batch_stats"]} - {"layer_instance"}
    assert not [name for name in names if "mean" in name or "var" in name]


@pytest.mark.slow
def test_the_state_of_power_iteration_keeps_its_dtype(rng):
    x = batch(rng)
    module = nj.SpectralNorm(dense(), param_dtype=BRAIN)
    variables = module.init(KEY, x, update_stats=True)
    for _ in range(2):
        _, updates = module.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        assert_same_kind(updates["batch_stats"], variables["batch_stats"])
        variables |= updates


@pytest.mark.slow
def test_power_iteration_finds_the_largest_singular_value(rng):
    x, module = batch(rng), nj.SpectralNorm(nn.Dense(5, use_bias=False), n_steps=4)
    variables = jax.device_get(module.init(KEY, x, update_stats=False))
    kernel = 5 * variables["params"]["layer_instance"]["kernel"]
    variables = {
        "params": {"layer_instance": {"kernel": kernel}},
        "batch_stats": variables["batch_stats"],
    }
    one = np.eye(4, dtype=np.float32)
    step = jax.jit(lambda v: module.apply(v, one, update_stats=True, mutable=["batch_stats"]))
    for _ in range(20):
        w, updates = step(variables)
        variables |= updates
    sigma = np.linalg.norm(np.float64(kernel), 2)
    assert_close(variables["batch_stats"]["layer_instance/kernel/sigma"], sigma, rtol=1e-5)
    assert_close(w, np.float64(kernel) / sigma, rtol=1e-5, atol=1e-6)
    assert_close(module.apply(variables, one, update_stats=False), w, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_weights_that_start_at_zero_are_left_alone_as_in_flax(rng):
    x = batch(rng)
    for package in (nj, nn):
        layer = nn.Dense(5, kernel_init=nn.initializers.zeros)
        module = package.SpectralNorm(layer)
        step = {"update_stats": True, "mutable": ["batch_stats"]}

        def run(x, module=module, layer=layer, step=step):
            variables = module.init(KEY, x, update_stats=False)
            _, updates = module.apply(variables, x, **step)
            params = jax.tree.map(lambda leaf: leaf + 7, variables["params"])
            y, _ = module.apply(updates | {"params": params}, x, **step)
            return updates, y, layer.apply({"params": params["layer_instance"]}, x)

        updates, y, expected = at_once(run, x)
        u = updates["batch_stats"]["layer_instance/kernel/u"]
        assert_identical(u, np.zeros((1, 5), np.float32))
        assert_identical(y, expected)


@pytest.mark.slow
def test_weights_far_from_zero_in_half_precision_have_the_norm_they_should():
    # the sum of squares, 36864, is near the largest float16
    kernel = jnp.full((4096, 1), 3.0, jnp.float16)
    layer = nn.Dense(1, use_bias=False, param_dtype=jnp.float16)
    variables = {
        "params": {
            "layer_instance": {"kernel": 2 * kernel},
            "layer_instance/kernel/scale": jnp.ones(1),
        }
    }
    w = nj.WeightNorm(layer, dtype=jnp.float32).apply(
        variables, jnp.eye(4096, dtype=jnp.float32)[:8]
    )
    assert_close(w, np.full((8, 1), 1 / 64), rtol=1e-3)


def test_what_does_not_fit_is_refused_as_in_flax(rng):
    x = batch(rng)
    for package in (nj, nn):
        with pytest.raises(ValueError, match="Input is 3D but error_on_non_matrix is True"):
            package.SpectralNorm(conv(), error_on_non_matrix=True).init(KEY, x, update_stats=True)
    with pytest.raises(ValueError, match="feature_axes"):
        nj.WeightNorm(dense(), feature_axes=2).init(KEY, x)
