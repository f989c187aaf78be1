"""A folded model at other shapes than the sample's: the same numbers as its source, or an error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import widest

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


def norm(stats, y, **options):
    return nj.batch_norm({}, stats, y, False, **options)[0]


@pytest.fixture
def variables(rng):
    def stats():
        mean, var = rng.normal(size=4), rng.uniform(0.5, 2, 4)
        return {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32)}

    def kernel(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "kernel": kernel(3, 4),
        "other": kernel(3, 4),
        "head": kernel(4, 4),
        "table": kernel(32, 4),
        "a": stats(),
        "b": stats(),
    }


def is_small(x):
    return x.shape[1] == 4


SAME = {
    "divided by a size after": lambda v, x: norm(v["a"], x @ v["kernel"]) / x.shape[1],
    "plus a size after": lambda v, x: norm(v["a"], x @ v["kernel"]) + x.shape[1],
    "a mean in between": lambda v, x: norm(v["a"], (x @ v["kernel"]).mean(1)),
    "a mean after": lambda v, x: norm(v["a"], jnp.tanh(x @ v["kernel"])).mean(1) @ v["head"],
    "divided by the root of a size after": lambda v, x: (
        norm(v["a"], x @ v["kernel"]) / x.shape[1] ** 0.5
    ),
    "activations by shape": lambda v, x: (jnp.tanh if is_small(x) else jax.nn.relu)(
        norm(v["a"], x @ v["kernel"])
    ),
    "another head": lambda v, x: (
        norm(v["a"], x @ v["kernel"]) @ (v["head"] if is_small(x) else 2 * v["head"])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_same_numbers(name, variables, rng):
    model = SAME[name]
    sample = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    folded = nj.deploy.fold(model, variables, sample, show=False)
    assert folded.found[0].kernel is not None
    for shape in ((2, 4, 3), (5, 4, 3), (1, 16, 3), (2, 1, 3)):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        actual = widest(folded.apply(folded.variables, x))
        np.testing.assert_allclose(actual, widest(model(variables, x)), rtol=1e-4, atol=1e-5)


ANOTHER = {
    "plus a size before": (
        lambda v, x: norm(v["a"], x @ v["kernel"] + x.shape[1]),
        "`add` of 4",
        "`add` of 16",
    ),
    "epsilon by shape": (
        lambda v, x: norm(v["a"], x @ v["kernel"], epsilon=1e-3 if is_small(x) else 1e-2),
        "0.001",
        "0.01",
    ),
    "a batch norm for each resolution": (
        lambda v, x: norm(v["a"] if is_small(x) else v["b"], x @ v["kernel"]),
        "a beside kernel",
        "none beside kernel",
    ),
    "a kernel for each resolution": (
        lambda v, x: norm(v["a"], x @ v["kernel" if is_small(x) else "other"]),
        "a beside kernel",
        "none beside kernel",
    ),
    "none at other resolutions": (
        lambda v, x: norm(v["a"], x @ v["kernel"]) if is_small(x) else x @ v["kernel"],
        "a beside kernel",
        "none beside kernel",
    ),
    "another order of features": (
        lambda v, x: norm(
            v["a"] if is_small(x) else jax.tree.map(lambda leaf: leaf[::-1], v["a"]),
            x @ v["kernel"],
        ),
        "the scales and shifts of the sample, beside kernel",
        "in another order",
    ),
    "one more step": (
        lambda v, x: norm(v["a"], x @ v["kernel"] * (1 if is_small(x) else v["a"]["mean"])),
        "`sub` of a/mean",
        "`mul` of a/mean",
    ),
    "times a size before": (
        lambda v, x: norm(v["a"], (x @ v["kernel"]) * x.shape[1]),
        "`mul` of 4",
        "`mul` of 16",
    ),
    "divided by the root of a size before": (
        lambda v, x: norm(v["a"], (x @ v["kernel"]) / x.shape[1] ** 0.5),
        "`div` of 2",
        "`div` of 4",
    ),
    "an activation in between": (
        lambda v, x: norm(v["a"], (x @ v["kernel"]) if is_small(x) else jnp.tanh(x @ v["kernel"])),
        "a beside kernel",
        "none beside kernel (its input comes from `tanh`",
    ),
    "a leaf that is read at other resolutions": (
        lambda v, x: (
            jnp.tanh(norm(v["a"], x @ v["kernel"])) * (1 if is_small(x) else v["a"]["mean"])
        ),
        "the same leaves as on the sample",
        "a/mean",
    ),
    "forward, another epsilon": (
        lambda v, x: (
            norm(v["a"], jnp.tanh(x @ v["kernel"]), epsilon=1e-3 if is_small(x) else 1e-2)
            @ v["head"]
        ),
        "0.001",
        "0.01",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANOTHER)
def test_another_model_is_an_error(name, variables, rng):
    """The error names what differs, at which shape, and to fold at that shape."""
    model, *values = ANOTHER[name]
    sample = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    folded = nj.deploy.fold(model, variables, sample, show=False)
    assert folded.found[0].kernel is not None
    folded.apply(folded.variables, sample[:1])
    x = jnp.ones((2, 16, 3))
    with pytest.raises(ValueError, match=r"^Folded\.apply: with inputs of shapes") as refused:
        folded.apply(folded.variables, x)
    message = str(refused.value)
    assert re.fullmatch(r".*\. Expected .*; got .*\. Fold once more .*\.", message)
    for value in (*values, (2, 16, 3), (2, 4, 3)):
        assert str(value) in message, message
    again = nj.deploy.fold(model, variables, x, show=False)
    actual = widest(again.apply(again.variables, x))
    np.testing.assert_allclose(actual, widest(model(variables, x)), rtol=1e-5, atol=1e-5)
