"""Networks whose invariance is known, and the paths that optimizers take through them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import normjax as nj


def batch(seed=0, examples=16, features=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((examples, features)), rng.standard_normal((examples, 3))


def params(seed=1):
    """Two kernels before a normalization, with its scale and bias, and a kernel before none."""
    rng = np.random.default_rng(seed)
    return {
        "first": {"kernel": rng.standard_normal((5, 7))},
        "norm": {"scale": 1 + 0.1 * rng.standard_normal(7), "bias": 0.1 * rng.standard_normal(7)},
        "second": {"kernel": rng.standard_normal((7, 6))},
        "head": {"kernel": rng.standard_normal((6, 3)), "bias": np.zeros(3)},
    }


def outputs(params, x, *, epsilon=0.0):
    """Batch norm (channels are invariant), layer norm (the whole kernel is), a linear layer."""
    x = x @ params["first"]["kernel"]
    x, _ = nj.batch_norm(params["norm"], nj.batch_norm_init(7)[1], x, train=True, epsilon=epsilon)
    x = jax.nn.gelu(x) @ params["second"]["kernel"]
    x, _ = nj.layer_norm({}, {}, x, train=True, epsilon=epsilon)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss(params, x, labels, *, epsilon=0.0):
    return jnp.mean((outputs(params, x, epsilon=epsilon) - labels) ** 2)


def wide(tree):
    """The tree in float64; under jax.enable_x64."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def path(optimizer, params, steps, *, state=None, loss=loss):
    """Losses at each of `steps` steps, each on other data, and the last parameters and state."""
    state = optimizer.init(params) if state is None else state

    @jax.jit
    def step(carry, data):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, *data)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    data = jax.tree.map(lambda *each: jnp.stack(each), *[batch(seed) for seed in range(steps)])
    dtype = jax.tree.leaves(params)[0].dtype
    (params, state), losses = jax.lax.scan(
        step, (params, state), jax.tree.map(lambda d: d.astype(dtype), data)
    )
    return losses, params, state
