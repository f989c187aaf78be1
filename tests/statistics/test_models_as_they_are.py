"""Linen modules as they are, bound or without variables; errors about missing collections."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import normjax as nj
from tests.compare import assert_close

X = jnp.arange(48.0).reshape(16, 3) % 7


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nj.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.relu(x))


@pytest.fixture
def variables(promotion_as_in_flax):
    return Net().init(jax.random.key(0), X, train=False)


def test_a_bound_module_has_its_variables(variables):
    bound = Net().bind(variables)
    folded = nj.deploy.fold(bound, X, show=False)
    assert_close(folded.apply(folded.variables, X), bound(X, train=False), atol=1e-6)
    assert nj.diagnostics.lint(bound, X) == nj.diagnostics.lint(Net(), variables, X)


def test_lint_initializes_a_module_without_variables(variables):
    (found,) = nj.diagnostics.lint(Net(), X)
    assert (found.rule, found.path) == ("cancelled-bias", "Dense_0")


def test_fold_needs_variables(variables):
    with pytest.raises(TypeError, match=r"variables or the inputs are missing.*fold\(model, var"):
        nj.deploy.fold(Net(), X)


@pytest.mark.parametrize("model", [Net(), Net().apply], ids=["module", "apply"])
def test_recalibrate_and_report_take_modules(variables, model):
    def train(variables, x):
        return Net().apply(variables, x, train=True, mutable=["batch_stats"])

    new = nj.recalibrate(model, variables, [X[:8], X[8:]])
    expected = nj.recalibrate(train, variables, [X[:8], X[8:]])
    jax.tree.map(assert_close, new["batch_stats"], expected["batch_stats"])
    (layer,) = nj.diagnostics.report(variables, apply_fn=model, batch=X).layers
    (same,) = nj.diagnostics.report(variables, apply_fn=train, batch=X).layers
    assert layer.gap and layer.gap == same.gap


def test_a_state_without_batch_stats(variables):
    state = TrainState.create(apply_fn=Net().apply, params=variables["params"], tx=optax.sgd(0.1))
    for function in (partial(nj.deploy.fold, show=False), nj.diagnostics.lint):
        with pytest.raises(ValueError, match="collection of the model is missing.* a field batch_"):
            function(state, X)


def test_statistics_that_may_not_change(variables):
    train = partial(Net().apply, train=True)
    calls = {
        "lint": lambda: nj.diagnostics.lint(train, variables, X),
        "recalibrate": lambda: nj.recalibrate(train, variables, [X]),
        "report": lambda: nj.diagnostics.report(variables, apply_fn=train, batch=X),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}: the model updates .* that is not mutable"):
            call()


def test_report_names_the_part_of_a_batch_that_fits(variables):
    with pytest.raises(TypeError, match=r"report: .*but its part batch\['image'\]"):
        nj.diagnostics.report(variables, apply_fn=Net(), batch={"image": X, "label": X[:, 0]})
