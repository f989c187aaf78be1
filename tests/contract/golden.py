"""Values that every layer gave once, so that a later version cannot give others unnoticed.

    python -m tests.contract.golden

writes golden.json anew: for when values are meant to change, and the changelog says so.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.contract.layers import LAYERS, arguments

FILE = pathlib.Path(__file__).with_name("golden.json")
DIGITS = 7


def values(layer, settings):
    """y in training and inference, new statistics, and the gradients of sum(tanh(y)), by name."""
    apply = functools.partial(layer.apply, **settings)

    def loss(params, batch_stats, x):
        y, new = apply(params, batch_stats, x, True)
        return jnp.sum(jnp.tanh(y)), (y, new)

    @jax.jit
    def step(*given):
        return apply(*given, False)[0], jax.grad(loss, (0, 2), has_aux=True)(*given)

    inferred, ((params_dot, x_dot), (y, new)) = step(
        *arguments(layer, settings, np.random.default_rng(2015))
    )
    named = {"y": y, "y_inference": inferred, "gradient_x": x_dot}
    named |= {f"gradient_{leaf}": value for leaf, value in params_dot.items()}
    return named | {f"new_{leaf}": value for leaf, value in new.items()}


def _main():
    golden = {
        f"{layer.name}-{variant}": {
            name: [float(f"{number:.{DIGITS}g}") for number in np.ravel(value)]
            for name, value in values(layer, settings).items()
        }
        for layer in LAYERS
        for variant, settings in layer.settings.items()
    }
    lines = [f"{json.dumps(case)}: {json.dumps(arrays)}" for case, arrays in golden.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _main()
