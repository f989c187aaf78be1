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
    params, batch_stats, x = arguments(layer, settings, np.random.default_rng(2015))
    apply = functools.partial(layer.apply, **settings)

    def loss(params, x):
        y, new = apply(params, batch_stats, x, True)
        return jnp.sum(jnp.tanh(y)), (y, new)

    (_, (y, new)), (params_dot, x_dot) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    named = {"y": y, "y_inference": apply(params, batch_stats, x, False)[0], "gradient_x": x_dot}
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
