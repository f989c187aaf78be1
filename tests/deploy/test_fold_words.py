"""What cannot be folded, in words that say what to do, and what other libraries call statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import normjax as nj
from tests.deploy.models import drawn

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        norm = nj.linen.BatchNorm(use_running_average=not train)
        return nn.relu(norm(nn.Dense(4)(x)))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)


@pytest.fixture
def variables(x):
    return drawn(Net().init(jax.random.key(0), x, train=False))


@pytest.mark.parametrize("make", [lambda model: model, lambda model: model.apply])
def test_a_module_is_taken_at_inference(make, variables, x):
    folded = nj.deploy.fold(make(Net()), variables, x, show=False)
    assert folded.found[0].kernel == "params/Dense_0/kernel"


def test_functions_that_train(variables, x):
    training = partial(Net().apply, train=True)
    with pytest.raises(ValueError, match=r"^fold: .*as in training.*train=False.*\.$"):
        nj.deploy.fold(training, variables, x)
    folded = nj.deploy.fold(partial(training, mutable=["batch_stats"]), variables, x, show=False)
    assert folded.found[0].kernel is None
    assert "functools.partial(model.apply, train=False)" in folded.found[0].reason


NAMES = [("moving_mean", "moving_variance"), ("moving_mean", "moving_var")]
NAMES += [("running_mean", "running_var")]


def by_hand(names, variables, x):
    mean, var = (variables["norm"][name] for name in names)
    return jax.nn.relu((x @ variables["kernel"] - mean) / jnp.sqrt(var + 1e-3))


@pytest.mark.parametrize("names", [*NAMES, ("center", "spread")], ids="-".join)
def test_other_names(names, rng, x, capsys):
    mean, var = rng.normal(size=4), rng.uniform(0.5, 2, 4)
    norm = dict(zip(names, map(jnp.float32, (mean, var)), strict=True))
    variables = {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "norm": norm}
    model = partial(by_hand, names)
    folded = nj.deploy.fold(model, variables, x)
    said = capsys.readouterr().out
    if names in NAMES:
        assert folded.found == (nj.deploy.Found("norm", "kernel"),)
        assert set(folded.variables) == {"kernel", "bias"}
        assert f"{names[0]} and {names[1]}" in said
    else:
        assert folded.found == () and "0 of 0 folded" in said
        assert "norm/spread" in said and "`mean` and `var`" in said and "rename" in said
    actual = folded.apply(folded.variables, x)
    np.testing.assert_allclose(actual, model(variables, x), rtol=1e-5, atol=1e-5)
