"""Modules of Flax and training states are taken as they are, by `lint` and by `deploy.fold`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import normjax as nj
from normjax.diagnostics import lint
from tests.compare import assert_close

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
X = jax.random.normal(jax.random.key(0), (32, 5))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class State(train_state.TrainState):
    batch_stats: Any


class Module(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(5, 4, rngs=rngs), nj.nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


def linen():
    variables = Net().init(jax.random.key(0), X, train=False)
    variables["batch_stats"]["norm"] |= {"mean": jnp.ones(4), "var": jnp.full(4, 4.0)}
    tx = optax.adamw(1e-3, mask=nj.optim.decay_mask)
    state = State.create(apply_fn=Net().apply, tx=tx, **variables)
    expected = Net().apply(variables, X, train=False)
    return variables, state, expected


def of_variables(variables, x):
    keys = {"dropout": jax.random.key(1)}
    return Net().apply(variables, x, train=True, mutable=["batch_stats"], rngs=keys)


def of_state(state, x):
    return of_variables({"params": state.params, "batch_stats": state.batch_stats}, x)


LINEN = {
    "module": lambda variables, state: (Net(), variables),
    "bound apply": lambda variables, state: (Net().apply, variables),
    "module and state": lambda variables, state: (Net(), state),
    "state": lambda variables, state: (state,),
    "state twice": lambda variables, state: (state, state),
    "state and variables": lambda variables, state: (state, variables),
}


@pytest.mark.parametrize("given", LINEN)
def test_linen(given):
    variables, state, expected = linen()
    args = LINEN[given](variables, state)
    assert [(each.rule, each.path) for each in lint(*args, X)] == [("cancelled-bias", "dense")]
    folded = nj.deploy.fold(*args, X, show=False)
    assert [each.kernel for each in folded.found] == ["params/dense/kernel"]
    assert_close(folded.apply(folded.variables, X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [of_variables, of_state])
def test_functions_of_a_state_and_of_its_variables(function):
    _, state, _ = linen()
    found = lint(function, state, X)
    assert [each.rule for each in found] == ["cancelled-bias"]
    assert found[0].path.endswith("dense")


def test_the_optimizer_of_a_state_is_examined_too():
    _, state, _ = linen()
    decaying = optax.adamw(1e-3)
    state = state.replace(tx=decaying, opt_state=decaying.init(state.params))
    assert ("decayed-scale", "norm") in [(each.rule, each.path) for each in lint(state, X)]
    found = lint(state, X, optimizer=optax.adam(1e-3))
    assert [each.rule for each in found] == ["cancelled-bias"]


@pytest.mark.parametrize("given", ["module", "twice", "state"])
def test_nnx_in_either_mode_and_unchanged(given):
    model = Module(nnx.Rngs(0))
    model.eval()
    expected, before = model(X), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    model.train()
    args = {"module": (model,), "twice": (model, model), "state": (model, nnx.state(model))}[given]
    assert [(each.rule, each.path) for each in lint(*args, X)] == [("cancelled-bias", "dense")]
    folded = nj.deploy.fold(*args, X, show=False)
    assert_close(folded.apply(folded.variables, X), expected, rtol=1e-5, atol=1e-6)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, after))
    assert model.norm.use_running_average is False


def test_what_is_missing_is_said():
    variables, state, _ = linen()
    with pytest.raises(
        TypeError, match=r"lint: the variables or the inputs.*Net and 1 more.*'dict"
    ):
        lint(Net(), variables)
    with pytest.raises(TypeError, match=r"lint: .*Module and 1 more: \['Module'\].*lint\(state, x"):
        lint(Module(nnx.Rngs(0)), Module(nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"fold: .*Net and 1 more.*fold\(model, variables, x\)"):
        nj.deploy.fold(Net(), state)
