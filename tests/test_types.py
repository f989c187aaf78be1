"""The annotations of public functions are true: checked at run time, over typical calls."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from beartype import beartype
from jaxtyping import jaxtyped

import normjax as nj
from tests.contract.layers import LAYERS, arguments


def typed(function):
    return jaxtyped(function, typechecker=beartype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_batch_norm(dtype):
    param_dtype = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    params, batch_stats = typed(nj.batch_norm_init)((3, 2), param_dtype=param_dtype, count=True)
    x = jnp.ones((4, 3, 2), dtype)
    for train in (True, False):
        typed(nj.batch_norm)(
            params, batch_stats, x, train, feature_axes=(1, 2), mask=x[..., :1].real > 0
        )
    typed(nj.batch_norm)(
        params, batch_stats, x, True, feature_axes=(1, 2), momentum=None, virtual_batch_size=2
    )


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)])
def test_initializers_and_keys(key):
    typed(nj.batch_norm_init)(
        3, key=key, scale_init=jax.nn.initializers.normal(), bias_init=jax.nn.initializers.zeros
    )


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_every_layer(layer, rng):
    """Traced: the types of arrays are those of their tracers, and nothing is compiled."""
    for settings in layer.settings.values():
        params, batch_stats, x = arguments(layer, settings, rng)
        run = partial(typed(layer.apply), train=True, **settings)
        for dtype in (jnp.float32, jnp.bfloat16):
            jax.eval_shape(run, params, batch_stats, x.astype(dtype))


@pytest.mark.parametrize("name", [name for name in nj.__all__ if name.endswith("_norm_init")])
def test_every_init(name):
    typed(getattr(nj, name))((3, 2), param_dtype=jnp.bfloat16, key=jax.random.key(0))


@pytest.mark.slow
def test_kernels():
    kernel = jnp.ones((3, 3, 4, 5), jnp.bfloat16)
    typed(nj.weights.weight_norm_init)(kernel, feature_axes=(-1, 0))
    typed(nj.weights.weight_norm_init_from_data)(lambda kernel: kernel.reshape(-1, 5), kernel)
    typed(nj.weights.weight_standardization_init)(5)
    typed(nj.weights.spectral_norm_init)(kernel, key=jax.random.key(0))


@pytest.mark.slow
def test_statistics():
    x = jnp.ones((4, 3))
    moments = typed(nj.moments)(x, 0, mask=x > 0)
    merged = typed(nj.merge_moments)(moments, nj.Moments(4, moments.mean, moments.var))
    typed(nj.update_batch_stats)(
        {"mean": jnp.zeros(3), "var": jnp.ones(3)}, merged, momentum=jnp.float32(0.9)
    )
    states = [{"norm": nj.batch_norm_init(3, count=True)[1]}] * 2
    typed(nj.average_batch_stats)(states)
    typed(nj.average_batch_stats)(tuple(states), weights=[1, jnp.float32(0.5)])
    typed(nj.average_batch_stats)(states, jnp.ones(2))


@pytest.mark.slow
def test_optimizers():
    params = {"dense": {"kernel": jnp.ones((4, 3))}, "norm": nj.layer_norm_init(3)[0]}
    mask = typed(nj.optim.decay_mask)(params, names={"kernel": "embedding"})
    typed(nj.optim.kind_of)(params)
    typed(nj.optim.effective_learning_rate)(params, jnp.float32(0.1), optimizer="adam")
    typed(nj.optim.rotational_equilibrium)(0.1, jnp.float32(0.1))
    typed(nj.optim.project_scale_invariant)(
        mask, inner=optax.trace(0.9), feature_axes=-1, weight_decay=0.1
    )
    optimizer = typed(nj.optim.renormalize)(
        nj.optim.decay_mask, optax.sgd(0.1), rotation=optax.constant_schedule(0.1)
    )
    state = typed(optimizer.init)(params)
    typed(optimizer.update)(params, state, params)
    typed(nj.optim.scale_invariant)(params, lambda params: params["dense"], feature_axes=-1)
    statistics = typed(nj.optim.accumulate)(momentum=None)
    _, batch_stats = nj.batch_norm_init(3, count=True)
    state = optax.MultiSteps(optimizer, 2).init(params)
    seen = typed(statistics.init)(batch_stats, state)
    typed(statistics.update)(batch_stats, seen, batch_stats, state, count=jnp.int32(3))


@pytest.mark.slow
def test_a_wrong_type_is_noticed():
    with pytest.raises(Exception, match="mask"):
        typed(nj.moments)(jnp.ones((4, 3)), 0, mask=jnp.ones((4, 3), jnp.int32))
