"""Networks with and without the mistakes that `lint` looks for."""

from typing import Any

import jax
import jax.numpy as jnp

import normjax as nj

FEATURES = 6
X = jax.random.normal(jax.random.key(0), (32, 8, 8, 3))
ROWS = jax.random.normal(jax.random.key(1), (32, 5))


def dense(key: int, inputs: int, outputs: int, bias: bool = True) -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(key), (inputs, outputs)) / inputs**0.5
    return {"kernel": kernel} | ({"bias": jnp.full(outputs, 0.1)} if bias else {})


def linear(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params.get("bias", 0.0)


def rules(found: Any) -> list[tuple[str, str]]:
    return [(finding.rule, finding.path) for finding in found]


class Dense:
    """Dense layers with batch norms, `hidden` of them: (variables, x) -> (y, batch_stats)."""

    def __init__(self, *, bias: bool = False, hidden: int = 2, inputs: int = 5, **settings: Any):
        self.hidden, self.settings = hidden, settings
        sizes = (inputs, *(FEATURES,) * hidden)
        params, batch_stats = {"head": dense(9, FEATURES, 2)}, {}
        for i in range(hidden):
            params[f"dense_{i}"] = dense(i, sizes[i], sizes[i + 1], bias)
            params[f"norm_{i}"], batch_stats[f"norm_{i}"] = nj.batch_norm_init(FEATURES)
        self.variables = params, batch_stats

    def __call__(self, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        params, batch_stats = variables
        new = {}
        for i in range(self.hidden):
            x = self.before(linear(params[f"dense_{i}"], x), i)
            x, new[f"norm_{i}"] = nj.batch_norm(
                params[f"norm_{i}"], batch_stats[f"norm_{i}"], x, train=True, **self.settings
            )
            x = self.behind(jax.nn.relu(x), i)
        return linear(params["head"], x), new

    def before(self, x: jax.Array, i: int) -> jax.Array:
        return x

    def behind(self, x: jax.Array, i: int) -> jax.Array:
        return x
