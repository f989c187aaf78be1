"""Units and the VGG made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.networks import UNITS, vgg

IMAGES = (8, 8, 1)


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Optimizes: else XLA computes what max pooling compares twice, with different roundings.

    No pixel is then equal to the largest, and the derivative of the pooling is 0/0.
    """


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_a_network_of_any_unit_learns_from_every_parameter(name, rng):
    network = vgg(UNITS[name], ((8,), (16,)))

    def loss(params, batch_stats, images):
        logits, new = network.apply(params, batch_stats, images, True)
        return (logits * jnp.arange(10.0)).sum(), new

    images = np.float32(rng.normal(size=(6, *IMAGES)))
    params, batch_stats = network.init(jax.random.key(0), IMAGES, 10)
    gradients, new_stats = jax.jit(jax.grad(loss, has_aux=True))(params, batch_stats, images)
    assert jax.tree.structure(new_stats) == jax.tree.structure(batch_stats)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, path


def test_all_units_start_from_the_same_kernels():
    @jax.jit
    def starts(key):
        return [unit.init(key, (3, 3, 2, 8))[0]["kernel"] for unit in UNITS.values()]

    kernels = jax.device_get(starts(jax.random.key(1)))
    assert all(np.array_equal(kernels[0], kernel) for kernel in kernels)
