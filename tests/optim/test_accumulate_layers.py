"""`optim.accumulate` by the momentum that each layer tells: no other one can be meant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_same_kind, assert_trees_close

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")  # and in optax's MultiSteps
K = 4
STEPS = [optax.MultiStepsState(jnp.int32(i % K), jnp.int32(i // K), (), ()) for i in range(K + 1)]


def data(steps=1, features=5):
    """Microbatches of 8 examples whose means differ."""
    rng = np.random.default_rng(0)
    shifts = 3 * rng.standard_normal((steps * K, 1, features))
    return jnp.asarray(rng.standard_normal((steps * K, 8, features)) + shifts, jnp.float32)


def accumulated(layer, batch_stats, x, masks=(None,) * K):
    """The statistics after one step of microbatches; they do not move before it."""
    statistics = nj.optim.accumulate()
    seen, after = statistics.init(batch_stats, STEPS[0]), batch_stats
    for microbatch, mask, state in zip(x, masks, STEPS[1:], strict=True):
        assert_identical(after, batch_stats)
        new = layer(statistics.collecting(batch_stats), microbatch, mask)
        after, seen = statistics.update(new, seen, batch_stats, state)
    return after


@pytest.mark.parametrize(
    ("function", "settings"),
    [
        ("batch_norm", {"momentum": 0.9}),
        ("batch_norm", {"momentum": jnp.float32(0.3), "running_var": "unbiased"}),
        ("batch_norm", {"momentum": None, "virtual_batch_size": 4}),
        ("batch_norm", {"momentum": 1.0}),
        ("batch_renorm", {"momentum": 0.5, "running_var": "unbiased"}),
        ("activated_batch_norm", {"momentum": 0.0}),
    ],
)
def test_a_step_is_that_of_the_whole_batch(function, settings):
    layer, init = getattr(nj, function), getattr(nj, f"{function}_init")
    params, batch_stats = init(5) if settings["momentum"] is not None else init(5, count=True)
    x = data()

    def new(batch_stats, x, mask):
        return layer(params, batch_stats, x, train=True, **settings)[1]

    expected = new(batch_stats, x.reshape(-1, 5), None)
    assert_trees_close(accumulated(new, batch_stats, x), expected, rtol=2e-6, atol=1e-6)


def test_masks_by_feature_count_what_they_let_through():
    params, batch_stats = nj.batch_norm_init(5)
    mask = np.random.default_rng(1).random((K, 8, 5)) < 0.5
    mask[1, :, 2] = mask[:, :, 4] = False

    def new(batch_stats, x, mask):
        settings = {"mask": mask, "momentum": 0.7, "running_var": "unbiased"}
        return nj.batch_norm(params, batch_stats, x, train=True, **settings)[1]

    expected = new(batch_stats, data().reshape(-1, 5), mask.reshape(-1, 5))
    assert_trees_close(accumulated(new, batch_stats, data(), mask), expected, rtol=2e-6, atol=1e-6)
    assert_identical(expected["var"][4], batch_stats["var"][4])


def test_the_output_is_that_of_training_and_inference_ignores_the_question():
    params, batch_stats = nj.batch_renorm_init(5)
    batch_stats |= {"mean": jnp.linspace(-1.0, 1.0, 5)}
    asked = nj.optim.accumulate().collecting(batch_stats)
    for train in (True, False):
        given = [nj.batch_renorm(params, s, data()[0], train=train) for s in (batch_stats, asked)]
        assert_identical(given[0][0], given[1][0])
    assert_same_kind(given[1][1], asked)


class Net(nn.Module):
    """Two momenta; `last` is the module that the second norm is made by."""

    last: type = nj.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = nj.linen.BatchNorm(not train, momentum=0.5, name="a")(x)
        x = nj.linen.BatchNorm(not train, momentum=0.5, frozen=True, name="frozen")(x)
        return self.last(not train, momentum=0.9, name="b")(nn.Dense(5, name="dense")(x))


def train_linen(net, optimizer, statistics, variables, x, ask):
    """Under jit and lax.scan; returns the running statistics at the end."""

    def loss(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = net.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean(y**3), new["batch_stats"]

    def step(carry, x):
        params, batch_stats, state, seen = carry
        gradient = jax.value_and_grad(loss, has_aux=True)
        (_, new), gradients = gradient(params, ask(batch_stats), x)
        updates, state = optimizer.update(gradients, state, params)
        batch_stats, seen = statistics.update(new, seen, batch_stats, state)
        return (optax.apply_updates(params, updates), batch_stats, state, seen), None

    params, batch_stats = variables["params"], variables["batch_stats"]
    state = optimizer.init(params)
    carry = params, batch_stats, state, statistics.init(batch_stats, state)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, x)[0][1])(carry)


def test_linen_with_several_momenta_under_jit_and_scan():
    net, x = Net(), data(2)
    variables = net.init(jax.random.key(0), x[0])
    old = variables["batch_stats"]
    statistics, optimizer = nj.optim.accumulate(), optax.MultiSteps(optax.sgd(0.0), K)
    after = train_linen(net, optimizer, statistics, variables, x, statistics.collecting)
    assert_same_kind(after, old)
    assert_identical(after["frozen"], old["frozen"])
    expected = old["a"]
    for batch in x.reshape(2, -1, 5):
        _, expected = nj.batch_norm({}, expected, batch, train=True, momentum=0.5)
    assert_trees_close(after["a"], expected, rtol=2e-6, atol=1e-6)
    # The second norm's input is constant in time, since each microbatch is normalized by itself.
    hidden = [net.apply(variables, m, mutable=["batch_stats"])[1]["batch_stats"]["b"] for m in x]
    own = [(each["mean"] - 0.9 * old["b"]["mean"]) / 0.1 for each in hidden]
    kept = 0.9**2 * old["b"]["mean"]
    mean = kept + 0.1 * (0.9 * np.mean(own[:K], 0) + np.mean(own[K:], 0))
    assert_close(after["b"]["mean"], mean, rtol=1e-5, atol=1e-6)


def test_layers_that_do_not_tell_are_an_error_when_the_program_is_traced():
    x = data()
    statistics, optimizer = nj.optim.accumulate(), optax.MultiSteps(optax.sgd(0.0), K)
    foreign, own = Net(nn.BatchNorm), Net()
    variables = foreign.init(jax.random.key(0), x[0])
    with pytest.raises(
        ValueError, match=r"did not report.*unknown momentum at new\['b'\].*give the"
    ):
        train_linen(foreign, optimizer, statistics, variables, x, statistics.collecting)
    with pytest.raises(ValueError, match=r"did not report.*\['mean', 'var'\].*collecting\(batch_s"):
        train_linen(own, optimizer, statistics, variables, x, lambda batch_stats: batch_stats)
    given = nj.optim.accumulate(momentum=0.9)
    with pytest.raises(ValueError, match=r"layers report their own.*momentum=0.9.*accumulate\(\)"):
        train_linen(own, optimizer, given, variables, x, given.collecting)


def test_a_layer_that_only_a_compiled_program_sees_move_gets_nan():
    _, batch_stats = nj.batch_norm_init(5)
    statistics = nj.optim.accumulate()
    asked = statistics.collecting(batch_stats)
    seen = statistics.init(batch_stats, STEPS[0])
    foreign = asked | {"mean": asked["mean"] + 1}
    after, _ = jax.jit(statistics.update)(foreign, seen, batch_stats, STEPS[K])
    assert jnp.isnan(after["mean"]).all()
    assert jnp.isnan(after["var"]).all()
    frozen, _ = jax.jit(statistics.update)(asked, seen, batch_stats, STEPS[K])
    assert_identical(frozen, batch_stats)


def test_a_given_momentum_that_cannot_be_the_layer_s_gives_nan_when_compiled():
    params, batch_stats = nj.batch_norm_init(5)
    for momentum, wrong in ((0.9, False), (0.99, True)):
        statistics = nj.optim.accumulate(momentum=momentum)
        _, new = nj.batch_norm(params, batch_stats, 0.1 * data()[0], train=True, momentum=0.9)
        seen = statistics.init(batch_stats, STEPS[0])
        after, _ = jax.jit(statistics.update)(new, seen, batch_stats, STEPS[K])
        assert jnp.isnan(after["var"]).all() == wrong


def test_a_layer_that_the_last_microbatch_skips_keeps_what_it_told():
    params, batch_stats = nj.batch_norm_init(5)
    x = data()

    def new(batch_stats, x, mask):
        skipped = mask is not None
        return batch_stats if skipped else nj.batch_norm(params, batch_stats, x, True)[1]

    masks = (None, None, None, True)
    expected = new(batch_stats, x[:3].reshape(-1, 5), None)
    assert_trees_close(accumulated(new, batch_stats, x, masks), expected, rtol=2e-6, atol=1e-6)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nj.nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.second = nj.nnx.BatchNorm(5, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.first(x), self.second(x)


def test_nnx():
    statistics = nj.optim.accumulate()
    model = statistics.collecting(Model(nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.0), K), wrt=nnx.Param)
    seen = statistics.init(nnx.state(model, nnx.BatchStat), optimizer.opt_state)

    @nnx.jit
    def step(model, optimizer, seen, x):
        batch_stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        gradients = nnx.grad(lambda model: jnp.sum(model(x)[0] ** 2))(model)
        optimizer.update(model, gradients)
        new = nnx.state(model, nnx.BatchStat)
        batch_stats, seen = statistics.update(new, seen, batch_stats, optimizer.opt_state)
        nnx.update(model, batch_stats)
        return seen

    x = data(2)
    for microbatch in x:
        seen = step(model, optimizer, seen, microbatch)
    for norm in (model.first, model.second):
        _, expected = nj.batch_norm_init(5)
        for batch in x.reshape(2, -1, 5):
            _, expected = nj.batch_norm({}, expected, batch, train=True, momentum=norm.momentum)
        assert_close(norm.mean[...], expected["mean"], rtol=2e-6, atol=1e-6)
        assert_close(norm.var[...], expected["var"], rtol=2e-6, atol=1e-6)
    with pytest.raises(TypeError, match=r"nnx.State has no layers.*\['first', 'second'\]"):
        statistics.collecting(nnx.state(model, nnx.BatchStat))


def test_under_shard_map_devices_share_what_they_tell():
    mesh = jax.make_mesh((8,), ("data",))
    _, batch_stats = nj.batch_norm_init(5)
    statistics, x = nj.optim.accumulate(), data()
    whole = jax.P()

    @jax.jit
    @jax.shard_map(
        mesh=mesh, in_specs=(whole, whole, whole, jax.P("data")), out_specs=(whole, whole)
    )
    def step(batch_stats, seen, state, x):
        asked = statistics.collecting(batch_stats)
        settings = {"momentum": 0.7, "running_var": "unbiased", "axis_name": "data"}
        _, new = nj.batch_norm({}, asked, x, train=True, **settings)
        return statistics.update(new, seen, batch_stats, state)

    seen, after = statistics.init(batch_stats, STEPS[0]), batch_stats
    for microbatch, state in zip(x, STEPS[1:], strict=True):
        split = jax.device_put(microbatch, jax.NamedSharding(mesh, jax.P("data")))
        after, seen = step(after, seen, state, split)
    settings = {"momentum": 0.7, "running_var": "unbiased"}
    _, expected = nj.batch_norm({}, batch_stats, x.reshape(-1, 5), train=True, **settings)
    assert_trees_close(after, expected, rtol=2e-6, atol=1e-6)


def test_complex_layers_that_are_stacked_in_a_scan():
    _, one = nj.batch_norm_init(5, count=True, param_dtype=jnp.complex64)
    batch_stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), one)
    x = data() + 1j * data()[::-1]

    def new(batch_stats, x, mask):
        def layer(x, batch_stats):
            return x, nj.batch_norm({}, batch_stats, x, train=True, momentum=None)[1]

        return jax.lax.scan(layer, x, batch_stats)[1]

    after = accumulated(new, batch_stats, x)
    assert_same_kind(after, batch_stats)
    expected = new(batch_stats, x.reshape(-1, 5), None)
    assert_trees_close(after, expected, rtol=2e-6, atol=1e-6)
