"""`normjax.nnx.BatchNorm` replaces `flax.nnx.BatchNorm`: arguments, variables, results."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from normjax.nnx import BatchNorm
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
normal = nnx.initializers.normal()
ARGUMENTS = [
    {},
    {"axis": 1},
    {"axis": -2},
    {"momentum": 0.5},
    {"epsilon": 0.1},
    {"use_scale": False},
    {"use_bias": False},
    {"use_scale": False, "use_bias": False},
    {"scale_init": normal, "bias_init": normal},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float32},
    {"param_dtype": jnp.bfloat16},
    {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
    {"use_fast_variance": False},
    {"promote_dtype": lambda arrays, dtype: nnx.nn.dtypes.promote_dtype(arrays, dtype=jnp.float32)},
    {"scale_metadata": {"tag": "scale"}, "bias_metadata": {"tag": "bias"}},
]


def pair(**arguments):
    """Ours and Flax's, made alike."""
    return [kind(3, rngs=nnx.Rngs(0), **arguments) for kind in (BatchNorm, nnx.BatchNorm)]


def batch(rng, arguments, dtype=np.float32):
    x = rng.normal(0.5, 1, (6, 4, 3))
    return jnp.asarray(np.moveaxis(x, -1, arguments.get("axis", -1)), dtype)


def states(module):
    return {
        str(kind.__name__): nnx.to_pure_dict(nnx.state(module, kind))
        for kind in (nnx.Param, nnx.BatchStat)
    }


def trained(module, x, **call):
    """y, the state after one step of training, and the gradients of the parameters and x."""

    def loss(module, x):
        y = module(x, **call)
        return jnp.sum(jnp.sin(jnp.arange(y.size)).reshape(y.shape) * y), y

    (grads, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(module, x)
    return y, states(module), (nnx.to_pure_dict(grads), dx)


def rounding(*dtypes):
    """What half precision adds to the tolerance."""
    return max(
        8 * float(jnp.finfo(dtype).eps) if jnp.dtype(dtype).itemsize == 2 else 0.0
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

    def run(x):
        modules = pair(**arguments)
        start = [states(module) for module in modules]
        steps = [trained(module, x) for module in modules]
        return start, steps, [module(x, use_running_average=True) for module in modules]

    start, steps, ys = at_once(run, batch(rng, arguments, dtype))
    assert_identical(*start)
    (y, state, grads), (flax_y, flax_state, flax_grads) = steps
    assert_same_kind((y, state, grads), (flax_y, flax_state, flax_grads))
    # Flax rounds x, the statistics and the parameters to the compute dtype before it uses them;
    # normjax rounds y only.
    half = rounding(dtype, *(arguments.get(name, dtype) for name in ("dtype", "param_dtype")))
    assert_close(y, flax_y, rtol=1e-5 + half, atol=1e-5 + half)
    assert_trees_close(state, flax_state, rtol=1e-5 + half, atol=1e-5 + half)
    assert_trees_close(
        grads, flax_grads, rtol=1e-4 + half, atol=(1e-5 + half) * largest(flax_grads)
    )
    y, flax_y = ys
    assert_close(y, flax_y, rtol=1e-5 + half, atol=1e-5 + half, dtype=flax_y.dtype)


def test_every_argument_of_flax_is_there_with_its_default():
    for method in ("__init__", "__call__"):
        ours, theirs = (
            inspect.signature(getattr(kind, method)).parameters
            for kind in (BatchNorm, nnx.BatchNorm)
        )
        assert [name for name in ours if name in theirs] == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].kind == parameter.kind
            if not callable(parameter.default):
                assert ours[name].default == parameter.default, name
    assert issubclass(BatchNorm, nnx.BatchNorm)


def test_the_metadata_of_the_variables_are_flaxs():
    ours, theirs = pair(scale_metadata={"tag": "scale"}, bias_metadata={"tag": "bias"})
    assert ours.scale.tag == theirs.scale.tag == "scale"
    assert ours.bias.tag == theirs.bias.tag == "bias"


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 4, 1), (1, 4, 3), (6, 4, 3)], ids=str)
def test_masks_are_flaxs(rng, shape):
    x, mask = batch(rng, {}), rng.random(shape) < 0.7
    results = at_once(lambda x, mask: [trained(m, x, mask=mask) for m in pair()], x, mask)
    assert_trees_close(*results, **CLOSE)


@pytest.mark.slow
def test_train_and_eval_choose_the_statistics_and_the_call_overrules_them(rng):
    norm, x = pair()[0], batch(rng, {})
    before = states(norm)
    norm.eval()
    evaluated = norm(x)
    assert_identical(states(norm), before)
    norm.train()
    assert_identical(norm(x, use_running_average=True), evaluated)
    assert_identical(states(norm), before)
    trained_y = norm(x)
    assert jnp.abs(trained_y - evaluated).max() > 0.1
    assert (states(norm)["BatchStat"]["mean"] != before["BatchStat"]["mean"]).all()


def test_use_running_average_said_nowhere_is_an_error():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))(jnp.ones((2, 3)))


@pytest.mark.slow
def test_state_moves_both_ways(rng):
    x = batch(rng, {})
    for giver, taker in (pair(), pair()[::-1]):
        nnx.jit(lambda norm, x: norm(x))(giver, x)
        nnx.update(taker, nnx.state(giver))
        _, giver_state = nnx.split(giver)
        graphdef, _ = nnx.split(taker)
        for receiver in (taker, nnx.merge(graphdef, giver_state)):
            expected = giver(x, use_running_average=True)
            assert_close(receiver(x, use_running_average=True), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [jax.vmap, jax.pmap], ids=["vmap", "pmap"])
def test_statistics_are_shared_over_an_axis_as_in_flax(rng, mapped):
    x = jnp.asarray(rng.normal(np.arange(4)[:, None, None] / 4, 1, (4, 6, 3)), jnp.float32)

    def per_device(kind, x):
        norm = kind(3, axis_name="i", rngs=nnx.Rngs(0))
        return norm(x), states(norm)

    both = mapped(lambda x: (per_device(BatchNorm, x), per_device(nnx.BatchNorm, x)), axis_name="i")
    ours, theirs = jax.device_get(jax.jit(both)(x) if mapped is jax.vmap else both(x))
    assert_trees_close(ours, theirs, **CLOSE)
    whole = pair()[0]
    assert_close(ours[0].reshape(24, 3), whole(x.reshape(24, 3)), **CLOSE)


def test_the_axis_is_not_touched_at_evaluation():
    norm = BatchNorm(3, axis_name="devices", use_running_average=True, rngs=nnx.Rngs(0))
    assert norm(jnp.ones((2, 3))).shape == (2, 3)


def test_one_value_per_channel_gives_the_bias():
    norm = BatchNorm(2, bias_init=nnx.initializers.constant(0.25), rngs=nnx.Rngs(0))
    assert_close(norm(jnp.array([[7.0, -3.0]])), np.full((1, 2), 0.25), atol=EPS)
    assert_close(norm.mean[...], np.array([0.07, -0.03]), rtol=16 * EPS)
    assert_close(norm.var[...], np.full(2, 0.99), rtol=8 * EPS)


@pytest.mark.slow
def test_bfloat16_keeps_its_digits_at_evaluation():
    # 1003 is no bfloat16 (1004 is): rounding x first gives 4.
    for x, dtype in ((jnp.float32(1003), jnp.bfloat16), (jnp.bfloat16(1004), None)):
        norm = BatchNorm(
            1,
            use_running_average=True,
            epsilon=0.0,
            dtype=dtype,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
        norm.mean[...] = jnp.full(1, 1000.0 if dtype else 1001.0)
        assert_close(norm(jnp.full((1, 1), x)).astype(jnp.float32), np.full((1, 1), 3.0))


def test_integers_are_accepted_as_in_flax(rng):
    x = jnp.asarray(rng.integers(-5, 5, (8, 3)))
    y, flax_y = at_once(lambda x: [norm(x) for norm in pair()], x)
    assert_close(y, flax_y, **CLOSE, dtype=flax_y.dtype)


def test_the_variance_is_safe_where_flaxs_is_not(rng):
    x = jnp.asarray(rng.normal(1e4, 1, (4096, 3)), jnp.float32)
    stds = [np.float64(y).std(0) for y in at_once(lambda x: [norm(x) for norm in pair()], x)]
    assert_close(stds[0], np.ones(3), atol=1e-3)
    assert (np.abs(stds[1] - 1) > 0.1).all()


@pytest.mark.slow
def test_frozen_layers_keep_their_statistics_and_train_scale_and_bias(rng):
    norm, x = BatchNorm(3, frozen=True, rngs=nnx.Rngs(0)), batch(rng, {})
    norm.train()
    before = states(norm)["BatchStat"]
    y, state, (grads, _) = trained(norm, x)
    assert_identical(state["BatchStat"], before)
    assert_identical(y, norm(x, use_running_average=True))
    assert all((jnp.abs(grads[leaf]) > 0).all() for leaf in ("scale", "bias"))


@pytest.mark.slow
def test_what_it_has_beyond_flax_is_that_of_the_function(rng):
    x = batch(rng, {})
    norm = BatchNorm(
        3, momentum=None, running_var="unbiased", virtual_batch_size=3, rngs=nnx.Rngs(0)
    )
    y = norm(x)
    assert isinstance(norm.count, nnx.BatchStat)
    assert_identical(norm.count[...], jnp.int32(1))
    assert_close(norm.var[...], np.float64(x).reshape(24, 3).var(0, ddof=1), rtol=1e-5)
    for half in (slice(3), slice(3, 6)):
        assert_close(np.float64(y[half]).mean((0, 1)), np.zeros(3), atol=1e-6)


@pytest.mark.parametrize("axis", [3, -4, -5], ids=str)
def test_axes_out_of_range_are_refused(axis):
    with pytest.raises(ValueError, match=f"={axis}"):
        BatchNorm(4, axis=axis, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4)))


class Model(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = norm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.mark.slow
def test_training_steps_under_nnx_jit_follow_flax(rng):
    x, target = batch(rng, {}), jnp.asarray(rng.normal(size=(6, 4, 3)), jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - target) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses, models = [], [Model(norm, nnx.Rngs(0)) for norm in (BatchNorm, nnx.BatchNorm)]
    for model in models:
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        losses.append([float(step(model, optimizer)) for _ in range(10)])
    assert losses[0][-1] < losses[0][0]
    # Ten steps of SGD at rate 0.1 carry the rounding of each on; they do not magnify it.
    assert_close(losses[0], losses[1], rtol=1e-4)
    assert_trees_close(states(models[0]), states(models[1]), rtol=1e-4, atol=1e-4)
    for model in models:
        model.eval()
    assert_close(models[0](x), models[1](x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_it_works_under_vmap_scan_and_remat_of_nnx(rng):
    x = batch(rng, {})
    make = nnx.vmap(lambda rngs: BatchNorm(3, momentum=0.5, rngs=rngs), in_axes=0, out_axes=0)
    norms = make(nnx.Rngs(0).split(2))
    ys = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(norms, x)
    single = BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    assert_close(ys, jnp.stack([single(x)] * 2), **CLOSE)
    assert_close(norms.mean[...], jnp.stack([single.mean[...]] * 2), **CLOSE)

    norms = make(nnx.Rngs(0).split(2))
    scanned = nnx.scan(lambda x, norm: norm(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, norms
    )
    assert_close(scanned, ys[0], atol=1e-4)  # y has mean 0 and variance 1 already

    rematted = BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    assert_close(nnx.remat(lambda norm, x: norm(x))(rematted, x), ys[0], **CLOSE)
    assert_trees_close(states(rematted), states(single), **CLOSE)
