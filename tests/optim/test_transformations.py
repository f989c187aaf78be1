"""Both transformations in chains, wrapped, scheduled, under jit, scan, pmap and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import normjax as nj
from normjax.optim import decay_mask, project_scale_invariant, renormalize
from tests.compare import assert_close, assert_finite, assert_same_kind, assert_trees_close
from tests.optim import networks
from tests.optim.test_project import INVARIANT

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")  # and in optax's transformations


def adamp(mask=None, **settings):
    inner = optax.scale_by_adam()
    return optax.chain(
        project_scale_invariant(mask, inner=inner, weight_decay=0.1, **settings),
        optax.scale_by_learning_rate(0.1),
    )


MAKERS = {
    "by the test": adamp,
    "by a mask": functools.partial(adamp, INVARIANT),
    "renormalize": functools.partial(renormalize, INVARIANT, optax.adamw(0.1)),
    "rotation": functools.partial(renormalize, INVARIANT, optax.adamw(0.1), rotation=0.1),
}


@functools.cache
def made(name):
    """One optimizer of each kind, so that its update is compiled once for all tests."""
    return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def make(request):
    return functools.partial(made, request.param)


def first_updates(optimizer, gradients, params):
    return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@pytest.fixture
def params():
    return single(networks.params())


slope = jax.jit(jax.grad(networks.loss))


def gradients(params, seed=0):
    return slope(params, *single(networks.batch(seed)))


@functools.partial(jax.jit, static_argnames=("optimizer", "seed"))
def step(optimizer, params, state=None, seed=0):
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(gradients(params, seed), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.slow
def test_jit_gives_what_eager_gives_and_compiles_once(make, params):
    optimizer = make()
    state, count = optimizer.init(params), []

    @jax.jit
    def update(gradients, state, params):
        count.append(1)
        return optimizer.update(gradients, state, params)

    own = gradients(params)
    updates, new = update(own, state, params)
    eager, other = optimizer.update(own, state, params)
    assert_trees_close(updates, eager, rtol=1e-4, atol=1e-6)
    assert_same_kind(new, other)
    update(own, new, optax.apply_updates(params, updates))
    assert len(count) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_and_structure_are_kept(make, params, dtype):
    optimizer = make()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    state = optimizer.init(params)
    updates, new = jax.jit(optimizer.update)(params, state, params)
    assert_same_kind(updates, params)
    assert_same_kind(new, state)
    assert_finite(updates)


@pytest.mark.slow
def test_multi_steps(make, params):
    optimizer, every = make(), optax.MultiSteps(make(), 2)
    state = every.init(params)
    kept = params
    for seed in (0, 1):
        kept, state = step(every, kept, state, seed)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(params, 0), gradients(params, 1))
    updates = first_updates(optimizer, mean, params)
    assert_trees_close(kept, optax.apply_updates(params, updates), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_multi_transform_and_masked(make, params):
    """What another optimizer has is not seen, though the mask names it."""
    labels = {"first": "a", "norm": "b", "second": "a", "head": "b"}
    new, _ = step(optax.multi_transform({"a": make(), "b": optax.sgd(0.1)}, labels), params)
    others, _ = step(make(), params)
    assert_trees_close(new["first"], others["first"], rtol=1e-5, atol=1e-6)
    plain = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients(params))
    assert_trees_close(new["head"], plain["head"], rtol=1e-5)
    chosen = optax.masked(make(), {"first": True, "norm": False, "second": True, "head": False})
    masked = first_updates(chosen, gradients(params), params)
    assert_trees_close(masked["head"], gradients(params)["head"], rtol=1e-5)


@pytest.mark.slow
def test_hyperparameters_are_injected(params):
    make = optax.inject_hyperparams(renormalize, static_args=("mask", "inner"))
    optimizer = make(INVARIANT, optax.adamw(0.1), rotation=optax.linear_schedule(0.1, 0.2, 10))
    expected = renormalize(
        INVARIANT, optax.adamw(0.1), rotation=optax.linear_schedule(0.1, 0.2, 10)
    )
    state, other = optimizer.init(params), expected.init(params)
    for seed in range(3):
        (params, state), (others, other) = (
            step(optimizer, params, state, seed),
            step(expected, params, other, seed),
        )
        assert_trees_close(params, others, rtol=1e-5, atol=1e-6)
    make = optax.inject_hyperparams(project_scale_invariant, static_args=("inner",))
    optimizer = make(inner=optax.scale_by_adam(), weight_decay=0.5, delta=0.1, wd_ratio=0.1)
    assert float(optimizer.init(params).hyperparams["weight_decay"]) == 0.5
    kept, _ = step(optimizer, params)
    others, _ = step(project_scale_invariant(inner=optax.scale_by_adam(), weight_decay=0.5), params)
    assert_trees_close(kept, others, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_extra_arguments_reach_the_inner_transformation(params):
    got = []

    def update(updates, state, params=None, **extra):
        got.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.sgd(0.1).init, update)
    for optimizer in (
        project_scale_invariant(INVARIANT, inner=inner),
        renormalize(INVARIANT, inner),
    ):
        optimizer.update(params, optimizer.init(params), params, value=3.0)
    assert got == [{"value": 3.0}] * 2


@pytest.mark.slow
def test_extra_arguments_do_not_trouble_those_that_take_none(make, params):
    optimizer = make()
    optimizer.update(params, optimizer.init(params), params, value=3.0)


@pytest.mark.slow
def test_multi_steps_may_be_the_inner_transformation(params):
    inside = renormalize(INVARIANT, optax.MultiSteps(optax.sgd(0.1), 2))
    outside = optax.MultiSteps(renormalize(INVARIANT, optax.sgd(0.1)), 2)
    state = inside.init(params)
    kept, state = step(inside, params, state, 0)  # on the sphere, and not turned
    for name in ("first", "second"):
        assert_close(
            kept[name]["kernel"] * jnp.linalg.norm(params[name]["kernel"]),
            params[name]["kernel"],
            rtol=1e-5,
        )
    assert_finite(step(inside, kept, state, 1)[0])
    assert_finite(step(outside, params)[0])


@pytest.mark.slow
def test_masks_may_be_functions_and_prefixes(params):
    def mask(tree):
        return decay_mask(tree) | {"head": False}

    prefix = {"first": True, "norm": False, "second": {"kernel": True}, "head": False}
    results = [
        step(renormalize(given, optax.adamw(0.1)), params)[0] for given in (INVARIANT, mask, prefix)
    ]
    for result in results[1:]:
        assert_trees_close(result, results[0])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(5, 7, rngs=rngs), nj.nnx.LayerNorm(7, rngs=rngs)
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.first(x))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["project", "renormalize"])
def test_nnx_optimizer(kind):
    x, labels = single(networks.batch())
    model = Model(nnx.Rngs(0))
    mask = nj.optim.scale_invariant(
        nj_state := nnx.state(model, nnx.Param), functools.partial(outputs, model, x)
    )
    assert not mask["first"]["kernel"], "its bias lets the scale matter"
    mask["first"]["kernel"] = True
    tx = {"project": adamp(mask), "renormalize": renormalize(mask, optax.adamw(0.1))}[kind]
    pure = nnx.as_pure(nj_state)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - labels) ** 2))(model)
        optimizer.update(model, grads)
        return grads

    grads = nnx.as_pure(train(model, optimizer))
    updates = first_updates(tx, grads, pure)
    expected = optax.apply_updates(pure, updates)
    assert_trees_close(nnx.as_pure(nnx.state(model, nnx.Param)), expected, rtol=1e-4, atol=1e-5)
    train(model, optimizer)
    if kind == "renormalize":
        assert_close(jnp.linalg.norm(model.first.kernel[...]), 1.0, rtol=1e-6)


def outputs(model, x, state):
    graphdef, _, others = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, state, others, copy=True)(x)


@pytest.mark.slow
def test_pmap(make, params):
    optimizer = make()
    many = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), (params, optimizer.init(params)))
    data = jax.tree.map(
        lambda *each: jnp.stack(each), *[single(networks.batch(seed)) for seed in range(8)]
    )

    def update(params, state, x, labels):
        own = jax.lax.pmean(jax.grad(networks.loss)(params, x, labels), "data")
        updates, _ = optimizer.update(own, state, params)
        return optax.apply_updates(params, updates)

    each = jax.pmap(update, axis_name="data")(*many, *data)
    mean = jax.tree.map(
        lambda *each: sum(each) / 8, *[gradients(params, seed) for seed in range(8)]
    )
    expected = optax.apply_updates(params, first_updates(optimizer, mean, params))
    assert_trees_close(jax.tree.map(lambda leaf: leaf[5], each), expected, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["by the test", "renormalize", "rotation"])
def test_sharded_reduction_axes(name, axis_type):
    """Kernels sharded along the axis of their norms give equal numbers and keep their sharding."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    rng = np.random.default_rng(0)
    params, own = ({"w": jnp.asarray(rng.standard_normal((64, 6)), jnp.float32)} for _ in range(2))
    own["w"] -= params["w"] * jnp.sum(own["w"] * params["w"], 0) / jnp.sum(params["w"] ** 2, 0)
    mask = None if name == "by the test" else {"w": True}
    optimizer = {
        "by the test": adamp(),
        "renormalize": renormalize(mask, optax.sgd(0.1, momentum=0.9), feature_axes=-1),
        "rotation": renormalize(mask, optax.sgd(0.1, momentum=0.9), feature_axes=-1, rotation=0.1),
    }[name]
    expected, _ = jax.jit(optimizer.update)(own, optimizer.init(params), params)
    cut = jax.NamedSharding(mesh, jax.P("model", None))
    with jax.set_mesh(mesh):
        split, split_own = (jax.device_put(tree, cut) for tree in (params, own))
        state = jax.jit(optimizer.init)(split)
        updates, _ = jax.jit(optimizer.update)(split_own, state, split)
    assert_trees_close(jax.device_get(updates), jax.device_get(expected), rtol=1e-4, atol=1e-6)
    assert updates["w"].sharding.is_equivalent_to(cut, 2)
