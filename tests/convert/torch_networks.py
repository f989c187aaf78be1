"""What the tests of whole networks from PyTorch share."""

import jax
import jax.numpy as jnp
import torch

import normjax as nj
from tests.compare import assert_trees_close

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def like_of(model, *inputs):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))
    return variables["params"], variables.get("batch_stats", {})


def random_(module):
    """The module with other biases and statistics than those that it starts with."""
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.uniform_(0.1, 0.9)
    return module.eval()


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def check_there_and_back(module, like, **settings):
    """The state_dict that comes back makes PyTorch's outputs, and the same leaves again."""
    trees = nj.convert.from_torch(module, like=like, **settings)
    state = nj.convert.to_torch(*trees, like=module, **settings)
    module.load_state_dict(state)
    assert_trees_close(nj.convert.from_torch(module, like=like, **settings), trees, **TOLERANCE)
    return trees
