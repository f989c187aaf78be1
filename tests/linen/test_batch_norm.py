"""`normjax.linen.BatchNorm` replaces `flax.linen.BatchNorm`: arguments, variables, results."""

import dataclasses
import inspect
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import meta

from normjax.linen import BatchNorm
from tests.compare import (
    assert_close,
    assert_identical,
    assert_same_kind,
    assert_trees_close,
    at_once,
    largest,
)

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
EPS = float(jnp.finfo(jnp.float32).eps)
# Flax's variance is the difference of two sums; near zero mean that costs it some tens of
# roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KEY = jax.random.key(0)
ARGUMENTS = [
    {},
    {"axis": 1},
    {"axis": -2},
    {"axis": (1, 2)},
    {"momentum": 0.5},
    {"epsilon": 0.1},
    {"use_scale": False},
    {"use_bias": False},
    {"use_scale": False, "use_bias": False},
    {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float16},
    {"param_dtype": jnp.bfloat16},
    {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
    {"use_fast_variance": False},
]


def batch(rng, dtype=np.float32):
    return jnp.asarray(rng.normal(0.5, 1, (6, 4, 3)), dtype)


def init(module, x):
    return module.init(KEY, x, use_running_average=False)


@partial(jax.jit, static_argnums=0)
def trained(module, variables, x, **call):
    """y, the updated variables, and the gradients of params and x of one step of training."""

    def loss(params, x):
        given = variables | ({"params": params} if "params" in variables else {})
        y, updates = module.apply(
            given, x, use_running_average=False, mutable=["batch_stats"], **call
        )
        return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y), (y, updates)

    grads, (y, updates) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        variables.get("params", {}), x
    )
    return y, updates, grads


@partial(jax.jit, static_argnums=0)
def evaluated(module, variables, x):
    return module.apply(variables, x, use_running_average=True)


def rounding(*dtypes):
    """Returns what half precision adds to the tolerance: Flax sums the gradient of x in it."""
    return max(
        4 * float(jnp.finfo(dtype).eps) if jnp.dtype(dtype).itemsize == 2 else 0.0
        for dtype in dtypes
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [(arguments, jnp.float32) for arguments in ARGUMENTS]
    + [
        (arguments, jnp.bfloat16)
        for arguments in ARGUMENTS
        if not arguments or "dtype" in " ".join(arguments)
    ],
)
def test_it_is_flaxs_for_every_constructor_argument(rng, arguments, dtype):
    modules = BatchNorm(**arguments), nn.BatchNorm(**arguments)

    def run(x):
        own, variables = (init(module, x) for module in modules)
        results = [trained(module, variables, x) for module in modules]
        updated = variables | results[0][1]
        return own, variables, results, [evaluated(module, updated, x) for module in modules]

    own, variables, results, ys = at_once(run, batch(rng, dtype))
    assert_identical(own, variables)
    half = rounding(dtype, *(arguments.get(name, dtype) for name in ("dtype", "param_dtype")))
    for actual, expected in zip(*results, strict=True):
        assert_same_kind(actual, expected)
    (y, updates, grads), (flax_y, flax_updates, flax_grads) = results
    assert_close(y, flax_y, rtol=1e-5 + half, atol=1e-5 + half)
    assert_trees_close(updates, flax_updates, rtol=1e-5 + half, atol=1e-5 + half)
    assert_trees_close(
        grads, flax_grads, rtol=1e-4 + half, atol=(1e-5 + half) * largest(flax_grads)
    )
    y, flax_y = ys
    assert_close(y, flax_y, rtol=1e-5 + half, atol=1e-5 + half, dtype=flax_y.dtype)


def test_every_field_and_call_argument_of_flax_is_there_with_its_default():
    ours = {field.name: field for field in dataclasses.fields(BatchNorm)}
    for field in dataclasses.fields(nn.BatchNorm):
        assert field.name in ours
        assert ours[field.name].default == field.default, field.name
    positions = [field.name for field in dataclasses.fields(BatchNorm)]
    wanted = [
        field.name
        for field in dataclasses.fields(nn.BatchNorm)
        if field.name not in ("parent", "name")
    ]
    assert [name for name in positions if name in wanted] == wanted
    call, flax_call = (
        inspect.signature(kind.__call__).parameters for kind in (BatchNorm, nn.BatchNorm)
    )
    assert list(call) == list(flax_call)
    assert [p.default for p in call.values()] == [p.default for p in flax_call.values()]
    assert isinstance(BatchNorm(), nn.BatchNorm)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_float32_reductions_the_running_statistics_are_too_coarse_to_train(rng, dtype):
    """Flax trains with them, and they stop moving. At inference both take them."""
    arguments = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}
    modules = [norm(**arguments, use_running_average=True) for norm in (BatchNorm, nn.BatchNorm)]
    x = batch(rng, dtype)
    own, variables = (module.init(KEY, x) for module in modules)
    assert_identical(own, variables)
    y, flax_y = (module.apply(variables, x) for module in modules)
    half = rounding(jnp.bfloat16)
    assert_close(y, flax_y, rtol=half, atol=half, dtype=flax_y.dtype)
    with pytest.raises(TypeError, match="too imprecise to train with.*got dtype bfloat16"):
        BatchNorm(**arguments, use_running_average=False).apply(variables, x, mutable="batch_stats")


def test_use_running_average_is_said_once():
    x = jnp.ones((2, 3))
    variables = BatchNorm(use_running_average=True).init(KEY, x)
    for module, call in (
        (BatchNorm(), {}),
        (BatchNorm(use_running_average=True), {"use_running_average": True}),
    ):
        with pytest.raises(ValueError, match="use_running_average"):
            module.apply(variables, x, **call)
    assert_identical(
        BatchNorm(use_running_average=True).apply(variables, x),
        BatchNorm().apply(variables, x, use_running_average=True),
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 4, 1), (1, 4, 3), (6, 4, 3)], ids=str)
def test_masks_are_flaxs_and_need_not_be_boolean(rng, shape):
    x = batch(rng)
    modules = BatchNorm(), nn.BatchNorm()

    def run(x, mask):
        variables = init(modules[1], x)
        return [trained(module, variables, x, mask=mask) for module in modules]

    assert_trees_close(*at_once(run, x, np.float32(rng.random(shape) < 0.7)), **CLOSE)


@pytest.mark.slow
def test_checkpoints_load_both_ways(rng):
    x = batch(rng)
    for save, load in ((nn.BatchNorm(), BatchNorm()), (BatchNorm(), nn.BatchNorm())):
        variables = init(save, x)
        _, updates, _ = trained(save, variables, x)
        saved = flax.serialization.to_bytes(variables | updates)
        restored = flax.serialization.from_bytes(load.init(KEY, x, use_running_average=True), saved)
        assert_close(evaluated(load, restored, x), evaluated(save, variables | updates, x), **CLOSE)


def test_init_leaves_the_statistics_at_their_start_and_touches_no_axis(rng):
    module = BatchNorm(use_running_average=False, axis_name="devices", axis_index_groups=[[0], [1]])
    variables = module.init(KEY, 5 + batch(rng))
    assert_identical(variables["batch_stats"], {"mean": jnp.zeros(3), "var": jnp.ones(3)})
    y = module.clone(use_running_average=None).apply(
        variables, batch(rng), use_running_average=True
    )
    assert y.shape == (6, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_statistics_are_shared_over_an_axis_as_in_flax(rng, mapped):
    x = jnp.asarray(rng.normal(np.arange(4)[:, None, None] / 4, 1, (4, 6, 3)), jnp.float32)
    variables = init(nn.BatchNorm(), x[0])

    def step(kind, x):
        module = kind(use_running_average=False, axis_name="i")
        return module.apply(variables, x, mutable=["batch_stats"])

    both = mapped(lambda x: (step(BatchNorm, x), step(nn.BatchNorm, x)), axis_name="i")
    ours, theirs = jax.device_get(jax.jit(both)(x) if mapped is jax.vmap else both(x))
    assert_trees_close(ours, theirs, **CLOSE)
    whole, updates, _ = trained(BatchNorm(), variables, x.reshape(24, 3))
    assert_close(ours[0].reshape(24, 3), whole, **CLOSE)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[0], ours[1]), updates, **CLOSE)


@pytest.mark.slow
def test_one_value_per_channel_gives_the_bias():
    module = BatchNorm(use_running_average=False, bias_init=nn.initializers.constant(0.25))
    x = jnp.array([[7.0, -3.0]])
    variables = module.init(KEY, x)
    y, updates = module.apply(variables, x, mutable=["batch_stats"])
    assert_close(y, np.full((1, 2), 0.25), atol=EPS)
    assert_close(updates["batch_stats"]["mean"], 0.01 * x[0], rtol=8 * EPS)
    assert_close(updates["batch_stats"]["var"], np.full(2, 0.99), rtol=8 * EPS)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_are_accepted_as_in_flax(rng, dtype):
    x = jnp.asarray(rng.integers(0, 2, (8, 3)), dtype)
    modules = BatchNorm(), nn.BatchNorm()

    def run(x):
        variables = init(modules[1], x)
        train = {"use_running_average": False, "mutable": ["batch_stats"]}
        return (
            [evaluated(module, variables, x) for module in modules],
            [module.apply(variables, x, **train) for module in modules],
            [trained(module, variables, x.astype(jnp.float32))[:2] for module in modules],
        )

    (ours, theirs), results, expected = at_once(run, x)
    assert_close(ours, theirs, **CLOSE, dtype=theirs.dtype)
    assert_trees_close(results, expected, **CLOSE)


@pytest.mark.slow
def test_the_variance_is_safe_where_flaxs_is_not(rng):
    x = jnp.asarray(rng.normal(1e4, 1, (4096, 3)), jnp.float32)
    variables = BatchNorm().init(KEY, x, use_running_average=True)
    stds = [
        np.float64(trained(module, variables, x)[0]).std(0)
        for module in (BatchNorm(), nn.BatchNorm())
    ]
    assert_close(stds[0], np.ones(3), atol=1e-3)
    assert (np.abs(stds[1] - 1) > 0.1).all()


def test_frozen_layers_keep_their_statistics_and_train_scale_and_bias(rng):
    x = batch(rng)
    variables = BatchNorm().init(KEY, x, use_running_average=False)
    y, updates, (grads, _) = trained(BatchNorm(frozen=True), variables, x)
    assert_identical(updates["batch_stats"], variables["batch_stats"])
    assert_identical(y, evaluated(BatchNorm(), variables, x))
    assert all((jnp.abs(grad) > 0).all() for grad in grads.values())


@pytest.mark.slow
def test_what_it_has_beyond_flax_is_that_of_the_function(rng):
    x = batch(rng)
    module = BatchNorm(momentum=None, running_var="unbiased", virtual_batch_size=3)
    variables = module.init(KEY, x, use_running_average=False)
    assert_identical(variables["batch_stats"]["count"], jnp.int32(0))
    y, updates, _ = trained(module, variables, x)
    assert_identical(updates["batch_stats"]["count"], jnp.int32(1))
    assert_close(
        updates["batch_stats"]["var"], np.float64(x).reshape(24, 3).var(0, ddof=1), rtol=1e-5
    )
    for half in (slice(3), slice(3, 6)):
        assert_close(np.float64(y[half]).mean((0, 1)), np.zeros(3), atol=1e-6)


@pytest.mark.parametrize("axis", [3, -4, (0, 0), (2, -1)], ids=str)
def test_axes_out_of_range_or_repeated_are_refused(axis):
    with pytest.raises(ValueError, match="axis"):
        BatchNorm(axis=axis, use_running_average=True).init(KEY, jnp.ones((2, 3, 4)))


class Block(nn.Module):
    """A layer and its normalization, as the body of a lifted transformation."""

    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, _=None):
        return self.norm(use_running_average=False, momentum=0.5)(nn.Dense(3)(x)), None


def lifted(name, norm):
    axes = {"params": 0, "batch_stats": 0}
    return {
        "scan": lambda: nn.scan(Block, axes, split_rngs={"params": True}, length=3)(norm),
        "remat": lambda: nn.remat(Block)(norm),
        "vmap": lambda: nn.vmap(Block, variable_axes=axes, split_rngs={"params": True})(norm),
        "jit": lambda: nn.jit(Block)(norm),
    }[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan", "remat", "vmap", "jit"])
def test_it_is_flaxs_under_flaxs_transformations(rng, name):
    x, results = batch(rng), []
    for norm in (BatchNorm, nn.BatchNorm):
        module = lifted(name, norm)
        variables = at_once(module.init, KEY, x)

        def loss(params, module=module, variables=variables):
            (y, _), updates = module.apply(
                variables | {"params": params}, x, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(x) * y), (y, updates)

        results.append(at_once(jax.grad(loss, has_aux=True), variables["params"]))
    assert_trees_close(*results, rtol=1e-4, atol=1e-4)


def test_partitioning_metadata_of_the_initializers_is_kept(rng):
    module = BatchNorm(
        use_running_average=True,
        scale_init=nn.with_partitioning(nn.initializers.ones, ("features",)),
    )
    variables = module.init(KEY, batch(rng))
    assert isinstance(variables["params"]["scale"], meta.Partitioned)
    assert module.apply(variables, batch(rng)).shape == (6, 4, 3)


@pytest.mark.slow
def test_it_trains_in_a_model_with_an_optimizer(rng):
    x, target = batch(rng), jnp.asarray(rng.normal(size=(6, 4, 3)), jnp.float32)
    model, optimizer = Block(), optax.sgd(0.1)
    variables = jax.jit(model.init)(KEY, x)
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state):
        def loss(params):
            (y, _), updates = model.apply(
                variables | {"params": params}, x, mutable=["batch_stats"]
            )
            return jnp.mean((y - target) ** 2), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(grads, state)
        return value, {"params": optax.apply_updates(variables["params"], change), **updates}, state

    losses = []
    for _ in range(20):
        value, variables, state = step(variables, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
