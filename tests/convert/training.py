"""Ten steps of gradient descent on both sides, on the same data, compared at each."""

import jax
import jax.numpy as jnp
import numpy as np

STEPS, LEARNING_RATE = 10, 0.1
EPS = float(np.finfo(np.float32).eps)
# Each step's own rounding (some tens of roundings of terms up to 10) adds to that of the last.
TOLERANCE = {"rtol": 100 * STEPS * EPS, "atol": 100 * STEPS * EPS}


def batches(seed, shape):
    """Inputs that drift, and the weights of a loss that depends on each output in its own way."""
    rng = np.random.default_rng(seed)
    for step in range(STEPS):
        x = rng.normal(0.3 * step, 1 + 0.2 * step, shape).astype(np.float32)
        yield x, np.sin(step + np.arange(x.size, dtype=np.float32))


def step(apply, params, batch_stats, x, weights):
    """One step of normjax's side; returns the output and the new trees."""

    def loss(params):
        y, new = apply(params, batch_stats, jnp.asarray(x))
        return jnp.mean(jnp.resize(jnp.asarray(weights), y.size) * jnp.tanh(y.ravel())), (y, new)

    gradients, (y, batch_stats) = jax.grad(loss, has_aux=True)(params)
    return y, jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients), batch_stats
