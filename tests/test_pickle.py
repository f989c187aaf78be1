"""Every Flax module can be pickled, as process pools and checkpoints of whole models do."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.adapters import every_adapter

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


@every_adapter
def test_every_module_can_be_pickled(adapter, rng):
    x = jnp.asarray(rng.normal(size=(6, 3, 4)), jnp.float32)
    module = adapter.make()
    copy = pickle.loads(pickle.dumps(module))
    if adapter.package == "linen":
        assert copy == module
    np.testing.assert_array_equal(adapter.call(copy, x), adapter.call(module, x))
    again = jax.tree.leaves(pickle.loads(pickle.dumps(copy)))
    assert len(again) == len(jax.tree.leaves(copy))
