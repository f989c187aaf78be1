"""What an init returns shares no array with its arguments, so that both can be donated."""

import jax
import jax.numpy as jnp
import optax
import pytest

import normjax as nj
from tests.contract.layers import LAYERS

KERNEL = jnp.ones((3, 4))
PARAMS = {"kernel": KERNEL}
KEY = jax.random.key(0)
INITS = {
    "dynamic_tanh": (lambda alpha: nj.dynamic_tanh_init(4, alpha=alpha), jnp.float32(0.5)),
    "weight_norm": (nj.weights.weight_norm_init, KERNEL),
    "weight_norm_of_scalars": (
        lambda kernel: nj.weights.weight_norm_init(kernel, feature_axes=(0, 1)),
        KERNEL,
    ),
    "weight_norm_from_data": (
        lambda kernel: nj.weights.weight_norm_init_from_data(lambda v: KERNEL.T @ v, kernel),
        KERNEL,
    ),
    "spectral_norm": (lambda kernel: nj.weights.spectral_norm_init(kernel, key=KEY), KERNEL),
    "renormalize": (nj.optim.renormalize(True, optax.adam(0.1)).init, PARAMS),
    "project": (nj.optim.project_scale_invariant(inner=optax.trace(0.9)).init, PARAMS),
}


@jax.jit
def doubled(tree):
    return jax.tree.map(lambda leaf: leaf * 2, tree)


donated = jax.jit(doubled, donate_argnums=0)


def assert_can_be_donated(*trees):
    """All arrays in one call. It raises where two of them are the same."""
    copies = jax.tree.map(jnp.copy, trees)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, donated(trees), doubled(copies)))


@pytest.mark.slow
@pytest.mark.parametrize("name", INITS)
def test_what_an_init_returns_can_be_donated_with_its_arguments(name):
    init, argument = INITS[name]
    argument = jax.tree.map(jnp.copy, argument)
    assert_can_be_donated(argument, init(argument))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_no_two_leaves_of_a_layer_are_one_array(layer):
    assert_can_be_donated(layer.init(4))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_the_states_of_accumulate_and_of_its_optimizer_can_be_donated_together(compiled):
    params, batch_stats = nj.batch_norm_init(4, count=True)
    optimizer, statistics = optax.MultiSteps(optax.sgd(0.1), 2), nj.optim.accumulate(momentum=None)
    state = optimizer.init(params)
    seen = statistics.init(batch_stats, state)
    _, new = nj.batch_norm(params, batch_stats, KERNEL, train=True, momentum=None)
    with jax.numpy_dtype_promotion("standard"):  # in optax
        _, new_state = optimizer.update(params, state, params)
        update = jax.jit(statistics.update) if compiled else statistics.update
        moved, new_seen = update(new, seen, batch_stats, new_state)
    assert_can_be_donated(batch_stats, state, seen, new, new_state, moved, new_seen)
