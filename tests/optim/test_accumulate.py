"""Microbatches under optax.MultiSteps: statistics move once per step, by all their moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.optim import accumulate
from tests.compare import assert_close, assert_identical, assert_same_kind, assert_trees_close

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")  # and in optax's MultiSteps
K, MICROBATCH = 4, 8


def microbatches(steps=1, seed=0, shape=(MICROBATCH, 5)):
    """Of means that differ, so that the variance between them counts."""
    rng = np.random.default_rng(seed)
    shifts = rng.standard_normal((steps * K, *(1,) * (len(shape) - 1), shape[-1]))
    return jnp.asarray(rng.standard_normal((steps * K, *shape)) + 3 * shifts, jnp.float32)


def start():
    return nj.batch_norm_init(5)[0], {
        "mean": jnp.linspace(-1.0, 1.0, 5),
        "var": jnp.linspace(0.5, 2.0, 5),
    }


def loss(params, batch_stats, x, momentum=0.9):
    y, batch_stats = nj.batch_norm(params, batch_stats, x, train=True, momentum=momentum)
    return jnp.mean(y**3), batch_stats


def train(optimizer, statistics, params, batch_stats, data, loss=loss):
    """Under jit and lax.scan, over microbatches; returns the running statistics after each."""

    def step(carry, x):
        params, batch_stats, state, seen = carry
        (_, new), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, x)
        updates, state = optimizer.update(gradients, state, params)
        batch_stats, seen = statistics.update(new, seen, batch_stats, state)
        return (optax.apply_updates(params, updates), batch_stats, state, seen), batch_stats

    state = optimizer.init(params)
    carry = params, batch_stats, state, statistics.init(batch_stats, state)
    return jax.jit(lambda carry, data: jax.lax.scan(step, carry, data))(carry, data)


def merged(data, old, momentum=0.9, running_var="biased", mask=None):
    """What the issue asks for, said with the public functions."""
    masks = [None] * len(data) if mask is None else mask
    seen = [
        nj.moments(x, tuple(range(x.ndim - 1)), mask=m) for x, m in zip(data, masks, strict=True)
    ]
    total = seen[0]
    for moments in seen[1:]:
        total = nj.merge_moments(total, moments)
    return nj.update_batch_stats(old, total, momentum=momentum, running_var=running_var)


@pytest.mark.slow
def test_statistics_move_once_per_step_by_the_merged_moments():
    params, batch_stats = start()
    data = microbatches(2)
    _, after = train(
        optax.MultiSteps(optax.sgd(0.1), K), accumulate(momentum=0.9), params, batch_stats, data
    )
    first = merged(data[:K], batch_stats)
    second = merged(data[K:], first)
    for i, expected in enumerate([batch_stats] * (K - 1) + [first] * K + [second]):
        assert_trees_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], after), expected, rtol=2e-6, atol=1e-6
        )
    _, whole = loss(params, batch_stats, data[:K].reshape(-1, 5))
    assert_trees_close(first, whole, rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_without_it_statistics_are_others():
    """The tests above can fail: updates for each microbatch lose the variance between them."""
    params, batch_stats = start()
    data = microbatches()
    each = batch_stats
    for x in data:
        _, each = loss(params, each, x)
    assert abs(each["var"] / merged(data, batch_stats)["var"] - 1).max() > 0.05


@pytest.mark.slow
def test_to_float64_rounding():
    with jax.enable_x64(True):
        params, batch_stats = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), start())
        data = 100 + microbatches().astype(jnp.float64)
        (_, after, *_), _ = train(
            optax.MultiSteps(optax.sgd(0.1), K), accumulate(momentum=0.9), params, batch_stats, data
        )
        assert_trees_close(after, merged(data, batch_stats), rtol=1e-13)


@pytest.mark.slow
def test_moments_themselves_are_merged_bit_for_bit():
    params, batch_stats = start()
    data = microbatches()
    optimizer, statistics = optax.MultiSteps(optax.sgd(0.1), K), accumulate(momentum=0.9)
    state = optimizer.init(params)
    seen, after = statistics.init(batch_stats, state), batch_stats
    for x in data:
        _, state = optimizer.update(params, state, params)
        after, seen = statistics.update(nj.moments(x, 0), seen, after, state)
    assert_identical(after, merged(data, batch_stats))


@pytest.mark.slow
@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
def test_masks_that_differ_by_feature(running_var):
    params, batch_stats = start()
    data = microbatches()
    mask = np.random.default_rng(1).random((K, MICROBATCH, 5)) < 0.5
    mask[1, :, 2] = mask[:, :, 4] = False

    def moments(params, batch_stats, x):
        x, mask = x
        return jnp.sum(params["scale"] * x[0]), nj.moments(x, 0, mask=mask)

    statistics = accumulate(momentum=0.9, running_var=running_var)
    optimizer = optax.MultiSteps(optax.sgd(0.1), K)
    (_, after, *_), _ = train(optimizer, statistics, params, batch_stats, (data, mask), moments)
    assert_trees_close(
        after, merged(data, batch_stats, running_var=running_var, mask=mask), rtol=1e-6, atol=1e-6
    )
    assert after["mean"][4] == batch_stats["mean"][4]


@pytest.mark.slow
def test_microbatches_of_unequal_sizes_and_empty_ones():
    params, batch_stats = start()
    data = microbatches()
    sizes = [8, 3, 5, 0]
    optimizer, statistics = optax.MultiSteps(optax.sgd(0.1), K), accumulate(momentum=0.9)
    state = optimizer.init(params)
    seen, after = statistics.init(batch_stats, state), batch_stats
    for x, size in zip(data, sizes, strict=True):
        mask = jnp.arange(MICROBATCH)[:, None] < size
        _, new = nj.batch_norm(params, after, x, train=True, momentum=0.9, mask=mask)
        _, state = optimizer.update(params, state, params)
        after, seen = jax.jit(statistics.update)(new, seen, after, state, count=jnp.sum(mask))
    masks = [
        jnp.broadcast_to(jnp.arange(MICROBATCH)[:, None] < size, data[0].shape) for size in sizes
    ]
    assert_trees_close(after, merged(data, batch_stats, mask=masks), rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_a_cumulative_mean_counts_each_step_once():
    params, batch_stats = nj.batch_norm_init(5, count=True)
    data = microbatches(3)

    def cumulative(params, batch_stats, x):
        return loss(params, batch_stats, x, momentum=None)

    (_, after, *_), _ = train(
        optax.MultiSteps(optax.sgd(0.1), K),
        accumulate(momentum=None),
        params,
        batch_stats,
        data,
        cumulative,
    )
    expected = batch_stats
    for step in range(3):
        expected = merged(data[step * K : (step + 1) * K], expected, momentum=None)
    assert after["count"] == 3
    assert_trees_close(after, expected, rtol=5e-6, atol=5e-6)


@pytest.mark.slow
def test_skipped_microbatches_do_not_count():
    params, batch_stats = start()
    data = microbatches()
    poisoned = jnp.concatenate([data[:2], data[:1] * jnp.nan, data[2:]])
    optimizer = optax.MultiSteps(optax.sgd(0.1), K, should_skip_update_fn=optax.skip_not_finite)
    (_, after, *_), path = train(optimizer, accumulate(momentum=0.9), params, batch_stats, poisoned)
    assert_trees_close(after, merged(data, batch_stats), rtol=2e-6, atol=1e-6)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[-2], path), batch_stats)


@pytest.mark.slow
def test_a_microbatch_that_is_skipped_right_after_a_step_does_not_step_again():
    params, batch_stats = start()
    data = microbatches()
    optimizer = optax.MultiSteps(optax.sgd(0.1), K, should_skip_update_fn=optax.skip_not_finite)
    poisoned = jnp.concatenate([data, data[:1] * jnp.nan])
    (_, after, *_), _ = train(optimizer, accumulate(momentum=0.9), params, batch_stats, poisoned)
    assert_trees_close(after, merged(data, batch_stats), rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_schedules_of_the_number_of_microbatches():
    params, batch_stats = start()
    data = microbatches()  # a step of one, then one of three
    optimizer = optax.MultiSteps(optax.sgd(0.1), lambda step: jnp.where(step == 0, 1, 3))
    (_, after, *_), _ = train(optimizer, accumulate(momentum=0.9), params, batch_stats, data)
    expected = merged(data[1:], merged(data[:1], batch_stats))
    assert_trees_close(after, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_the_state_of_multi_steps_is_found_inside_others():
    params, batch_stats = start()
    data = microbatches()
    inside = optax.chain(
        optax.clip(1.0), optax.MultiSteps(optax.adam(0.1), K).gradient_transformation()
    )
    (_, after, *_), _ = train(inside, accumulate(momentum=0.9), params, batch_stats, data)
    assert_trees_close(after, merged(data, batch_stats), rtol=2e-6, atol=1e-6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nj.linen.BatchNorm(use_running_average=False, momentum=0.9, name="outer")(x)
        x = nj.linen.SpectralNorm(nn.Conv(4, (3, 3)), error_on_non_matrix=False, name="sn")(
            x, update_stats=True
        )
        return nj.linen.BatchNorm(use_running_average=False, momentum=0.9, name="inner")(x)


@pytest.mark.slow
def test_linen():
    """The layer that sees the data has the statistics of the whole batch; all keep their kind."""
    data = microbatches(shape=(MICROBATCH, 4, 4, 5))
    variables = Net().init(jax.random.key(0), data[0])

    def apply(params, batch_stats, x):
        y, updates = Net().apply(
            {"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(y**3), updates["batch_stats"]

    old = variables["batch_stats"]
    optimizer = optax.MultiSteps(optax.sgd(0.0), K)
    (_, after, *_), path = train(
        optimizer, accumulate(momentum=0.9), variables["params"], old, data, apply
    )
    assert_same_kind(after, old)
    assert_trees_close(after["outer"], merged(data, old["outer"]), rtol=2e-6, atol=1e-6)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[-2], path), old)
    *_, last = (apply(variables["params"], old, x)[1] for x in data)
    assert_trees_close(after["sn"], last["sn"], rtol=1e-6, atol=1e-6)
    inner = [apply(variables["params"], old, x)[1]["inner"]["mean"] for x in data]
    assert_close(after["inner"]["mean"], np.mean(inner, 0), rtol=1e-5, atol=1e-6)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.norm = nj.nnx.BatchNorm(5, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.norm(x))


@pytest.mark.slow
def test_nnx():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.adam(0.1), K), wrt=nnx.Param)
    statistics = accumulate(momentum=0.9)
    old = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    seen = statistics.init(old, optimizer.opt_state)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), seen)

    @nnx.jit
    def step(model, optimizer, seen, x):
        batch_stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        gradients = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, gradients)
        new = nnx.state(model, nnx.BatchStat)
        batch_stats, seen = statistics.update(new, seen, batch_stats, optimizer.opt_state)
        nnx.update(model, batch_stats)
        return seen

    data = microbatches(2)
    for i, x in enumerate(data):
        seen = step(model, optimizer, seen, x)
        if i < K - 1:
            assert_trees_close(nnx.as_pure(nnx.state(model, nnx.BatchStat)), old)
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), seen) == kinds
    expected = merged(data[K:], merged(data[:K], dict(old["norm"])))
    assert_close(model.norm.mean[...], expected["mean"], rtol=2e-6, atol=1e-6)
    assert_close(model.norm.var[...], expected["var"], rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_complex_statistics():
    params, batch_stats = nj.batch_norm_init(5, param_dtype=jnp.complex64)
    data = microbatches() + 1j * microbatches(seed=1)
    optimizer, statistics = optax.MultiSteps(optax.sgd(0.1), K), accumulate(momentum=0.9)
    state = optimizer.init(start()[0])
    seen, after = statistics.init(batch_stats, state), batch_stats
    for x in data:
        _, new = nj.batch_norm(params, batch_stats, x, train=True, momentum=0.9)
        _, state = optimizer.update(start()[0], state)
        after, seen = statistics.update(new, seen, after, state)
    assert_same_kind(after, batch_stats)
    assert_trees_close(after, merged(data, batch_stats), rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_under_shard_map_statistics_stay_replicated():
    mesh = jax.make_mesh((8,), ("data",))
    params, batch_stats = start()
    data = microbatches()
    optimizer, statistics = optax.MultiSteps(optax.sgd(0.1), K), accumulate(momentum=0.9)
    state = optimizer.init(params)
    whole = jax.P()

    @jax.jit
    @jax.shard_map(
        mesh=mesh, in_specs=(whole, whole, whole, jax.P("data")), out_specs=(whole, whole, whole)
    )
    def step(batch_stats, state, seen, x):
        _, new = nj.batch_norm(params, batch_stats, x, train=True, momentum=0.9, axis_name="data")
        _, state = optimizer.update(params, state, params)
        return *statistics.update(new, seen, batch_stats, state), state

    seen, after = statistics.init(batch_stats, state), batch_stats
    for x in data:
        after, seen, state = step(
            after, state, seen, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        )
    assert_trees_close(after, merged(data, batch_stats), rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_it_promotes_no_dtype_by_itself():
    _, batch_stats = nj.batch_norm_init(5, param_dtype=jnp.complex64, count=True)
    states = [optax.MultiStepsState(jnp.int32(i % 2), jnp.int32(i // 2), (), ()) for i in range(3)]
    with jax.numpy_dtype_promotion("strict"):
        for momentum in (0.9, None):
            statistics = accumulate(momentum=momentum)
            seen, after = statistics.init(batch_stats, states[0]), batch_stats
            for x, state in zip(microbatches()[:2].astype(jnp.complex64), states[1:], strict=True):
                _, new = nj.batch_norm({}, batch_stats, x, train=True, momentum=momentum)
                after, seen = statistics.update(new, seen, after, state)
            assert_same_kind(after, batch_stats)
            assert after["count"] == 1


def setting():
    params, batch_stats = start()
    state = optax.MultiSteps(optax.sgd(0.1), K).init(params)
    return {"norm": batch_stats}, state


NAN = {"norm": start()[1] | {"var": jnp.full(5, jnp.nan)}}


@pytest.mark.parametrize(
    ("settings", "new", "message"),
    [
        ({}, {}, r"new lacks statistics that batch_stats has.*nothing at new\['norm'\]"),
        (
            {},
            {"norm": start()[1], "more": start()[1]},
            r"batch_stats lacks.*nothing at batch_stats\['more'\]",
        ),
        ({}, {"norm": nj.batch_norm_init(4)[1]}, r"new\['norm'\] does not fit.*\(4,\).*\(5,\)"),
        (
            {},
            {"norm": nj.Moments(1, jnp.ones(4), jnp.ones(4))},
            r"new\['norm'\] does not fit.*\(4,\).*\(5,\)",
        ),
        (
            {},
            {"norm": {"mean": jnp.ones(5)}},
            r"statistics are incomplete.*new\['norm'\]\['mean'\]",
        ),
        (
            {},
            {"norm": start()[1] | {"median": jnp.ones(5)}},
            r"new\['norm'\] with \['mean', 'median', 'var'\]",
        ),
        (
            {"running_var": "unbiased"},
            {"norm": start()[1]},
            r"does not determine the number of values.*new\['norm'\].*Moments",
        ),
        ({"momentum": None}, {"norm": start()[1]}, r"count of batches is missing.*new\['norm'\]"),
    ],
)
def test_trees_that_do_not_fit_are_refused_by_their_path(settings, new, message):
    batch_stats, state = setting()
    statistics = accumulate(**settings)
    with pytest.raises(ValueError, match=f"accumulate: .*{message}"):
        statistics.update(new, statistics.init(batch_stats, state), batch_stats, state)


@pytest.mark.slow
def test_statistics_that_are_not_finite_are_refused_by_their_path():
    batch_stats, state = setting()
    statistics = accumulate()
    with pytest.raises(
        ValueError,
        match=r"batch_stats is not finite.*5 NaN.*of 5 in batch_stats\['norm'\]\['var'\]",
    ):
        statistics.init(NAN, state)
    seen = statistics.init(batch_stats, state)
    with pytest.raises(
        ValueError, match=r"new is not finite.*5 NaN.*of 5 in new\['norm'\]\['var'\]"
    ):
        statistics.update(NAN, seen, batch_stats, state._replace(mini_step=state.mini_step + 1))


@pytest.mark.slow
def test_another_momentum_than_the_models_is_noticed():
    batch_stats, state = setting()
    statistics = accumulate(momentum=0.99)
    _, new = loss(start()[0], batch_stats["norm"], 0.1 * microbatches()[0], momentum=0.5)
    seen, state = statistics.init(batch_stats, state), state._replace(mini_step=state.mini_step + 1)
    with pytest.raises(
        ValueError,
        match=r"negative variance.*at new\['norm'\], if momentum=0.99.*of the model's layers",
    ):
        statistics.update({"norm": new}, seen, batch_stats, state)


def test_coarse_statistics_are_refused():
    batch_stats, state = setting()
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), batch_stats)
    statistics = accumulate()
    with pytest.raises(ValueError, match=r"too imprecise.*bfloat16 at new\['norm'\].*Moments"):
        statistics.update(coarse, statistics.init(coarse, state), coarse, state)


def test_other_optimizers_and_settings_are_refused():
    batch_stats, state = setting()
    with pytest.raises(
        ValueError, match="the state has no MultiSteps.*0 MultiStepsState.*optax.MultiSteps"
    ):
        accumulate().init(batch_stats, optax.sgd(0.1).init(batch_stats))
    with pytest.raises(ValueError, match="the state has several MultiSteps.*2 MultiStepsState"):
        accumulate().init(batch_stats, (state, state))
    with pytest.raises(ValueError, match="accumulate: momentum is out of range.*momentum=1.0"):
        accumulate(momentum=1.0)
    with pytest.raises(ValueError, match="accumulate: running_var is unknown"):
        accumulate(running_var="exact")
