"""What is not folded and why, and what is refused."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import normjax as nj
from tests.compare import assert_identical
from tests.deploy.models import Model, linen_model

BN = partial(nj.linen.BatchNorm, use_running_average=True)

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 6, 3)), jnp.float32)


def beside(x):
    y = nn.Dense(3)(x)
    return BN()(y) + y


def returned(x):
    y = nn.Dense(3)(x)
    return BN()(y), y


def shared(x):
    dense, norm = nn.Dense(3), BN()
    return dense(nn.relu(norm(dense(x))))


def tied(x):
    dense = nn.Dense(3, use_bias=False)
    y = BN()(dense(x))
    return y @ dense.variables["params"]["kernel"].T


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(BN()(nn.Dense(3)(x))), None


def scanned(x):
    stack = nn.scan(
        Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
    )
    return stack()(x, None)[0]


KEPT = {
    "beside": (beside, "the output of params/Dense_0/kernel is also used elsewhere"),
    "returned": (returned, "the output of params/Dense_0/kernel is also used elsewhere"),
    "shared": (shared, "params/Dense_0/kernel is used more than once"),
    "tied": (tied, "params/Dense_0/kernel is used more than once"),
    "first": (lambda x: nn.relu(BN()(x)), "it comes first: its input is the model's"),
    "relu": (
        lambda x: BN()(nn.relu(nn.Dense(3)(x))),
        "its input comes from `relu`, not from a linear layer",
    ),
    "sum": (
        lambda x: BN()(x + nn.Dense(3)(x)),
        "its input comes from `add`, not from a linear layer",
    ),
    "attention": (
        lambda x: BN()(x @ nn.Dense(3)(x).mT),
        "its input comes from `dot_general`, not from a linear layer",
    ),
    "other axis": (
        lambda x: BN(axis=1)(nn.Dense(3)(x)),
        "`sub` of batch_stats/BatchNorm_0/mean, not one",
    ),
    "merged": (
        lambda x: BN()(nn.Dense(3)(x).reshape(4, 18)),
        "between params/Dense_0/kernel and it is `sub` of batch_stats/BatchNorm_0/mean, not one",
    ),
    "scan": (scanned, "it is used by `scan`"),
    "weight norm": (
        lambda x: BN()(nj.linen.WeightNorm(nn.Dense(3))(x)),
        "the kernel of the linear layer before it is computed from params/Dense_0/kernel, "
        "params/WeightNorm_0",
    ),
    "constant kernel": (
        lambda x: BN()(x @ jnp.eye(3)),
        "the kernel of the linear layer before it is not a leaf of variables",
    ),
    "mask": (
        lambda x: BN()(nn.Dense(3)(x), mask=jnp.ones((4, 1, 1), bool)),
        "its input comes from `select_n`",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name, x):
    function, reason = KEPT[name]
    model, variables = linen_model(function, x)
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert [found.kernel for found in folded.found] == [None] and reason in folded.found[0].reason
    assert (
        folded.error == 0
        and folded.found[0].reason in str(folded)
        and "0 of 1 folded" in str(folded)
    )
    assert_identical(folded.variables, variables)
    assert_identical(folded.apply(variables, x), jax.jit(model.apply)(variables, x))


@pytest.mark.slow
def test_constants_in_between(x):
    """An embedding of positions varies along another axis; a sorted constant is not followed."""
    variables = {
        "kernel": jnp.ones((3, 4)),
        "table": jnp.ones((6, 4)),
        "norm": {"mean": jnp.ones(4), "var": jnp.ones(4)},
    }

    def network(constant, variables, x):
        y = x @ variables["kernel"] + constant(variables["table"])
        return nj.batch_norm({}, variables["norm"], y, train=False)[0]

    for constant, reason in (
        (lambda table: table, "is `add` of table, not one number for each feature"),
        (lambda table: jnp.sort(table[0]), "is a constant made by sort"),
    ):
        folded = nj.deploy.fold(partial(network, constant), variables, x, show=False)
        assert folded.found[0].kernel is None
        assert (
            folded.found[0].reason.startswith("between kernel and it ")
            and reason in folded.found[0].reason
        )


@pytest.mark.slow
def test_statistics_of_the_batch_are_not_folded(x):
    model, variables = linen_model(lambda x: BN()(nn.Dense(3)(x)), x)
    training = Model(lambda x: BN(use_running_average=False)(nn.Dense(3)(x)))
    folded = nj.deploy.fold(
        partial(training.apply, mutable=["batch_stats"]), variables, x, show=False
    )
    assert folded.found[0].kernel is None and "not from a linear layer" in folded.found[0].reason


@pytest.mark.slow
def test_models_without_batch_norm_stay_as_they_are(x):
    model, variables = linen_model(lambda x: nn.LayerNorm()(nn.Dense(3)(x)), x)
    folded = nj.deploy.fold(model, variables, x, show=False)
    assert folded.found == () and "0 of 0 folded" in str(folded)
    assert_identical(folded.variables, variables)


def refuses(error, *values, function="fold", call):
    with pytest.raises(error) as refused:
        call()
    message = str(refused.value)
    assert re.fullmatch(function + r": .*\. Expected .*; got .*\. .*[.?]", message, re.DOTALL), (
        message
    )
    for value in values:
        assert str(value) in message, f"{value!r} is not in: {message}"


def network(x):
    return BN(name="norm2")(
        nn.Dense(3, name="dense2")(nn.relu(BN(name="norm1")(nn.Dense(5, name="dense1")(x))))
    )


@pytest.fixture
def model(x):
    return linen_model(network, x)


@pytest.mark.slow
def test_pairs_that_are_none(model, x):
    call = partial(nj.deploy.fold, *model, x)
    refuses(
        ValueError,
        "('params/dense2/kernel', 'batch_stats/norm1') is not a kernel and a batch norm",
        ("params/dense1/kernel", "batch_stats/norm1"),
        call=partial(call, pairs=[("params/dense2/kernel", "batch_stats/norm1")]),
    )
    refuses(
        ValueError,
        "used more than once",
        call=partial(
            nj.deploy.fold,
            *linen_model(shared, x),
            x,
            pairs=[("params/Dense_0/kernel", "batch_stats/BatchNorm_0")],
        ),
    )
    refuses(
        ValueError,
        "'params/dense1/kernel' is not a",
        call=partial(call, pairs=["params/dense1/kernel"]),
    )
    both = linen_model(lambda x: BN(name="b")(BN(name="a")(nn.Dense(3)(x))), x)
    refuses(
        ValueError,
        ("params/Dense_0/kernel", "batch_stats/b"),
        call=partial(nj.deploy.fold, *both, x, pairs=[("params/Dense_0/kernel", "batch_stats/a")]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("batch_stats/norm1/mean", jnp.nan),
        ("batch_stats/norm2/var", jnp.inf),
        ("params/norm1/scale", jnp.nan),
        ("params/dense2/kernel", jnp.inf),
        ("batch_stats/norm1/var", -1),
    ],
)
def test_leaves_that_are_unsound(model, x, path, value):
    model, variables = model
    collection, layer, leaf = path.split("/")
    place = variables[collection][layer]
    place[leaf] = place[leaf].at[1].set(value)
    refuses(ValueError, path, value, call=lambda: nj.deploy.fold(model, variables, x))


@pytest.mark.slow
def test_variables_that_are_not_those_of_the_folded_model(model, x):
    model, variables = model
    folded = nj.deploy.fold(model, variables, x, show=False)
    own = folded.variables["params"]
    for bad, *values in (
        (variables, "batch_stats/norm1/mean", "no such leaf", (5,)),
        ({"params": {"dense1": own["dense1"]}}, "params/dense2/", "no such leaf", (3,)),
        (
            {"params": own | {"dense2": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}},
            "params/dense2/kernel",
            (2, 3),
            (5, 3),
        ),
    ):
        refuses(ValueError, *values, function="Folded.apply", call=partial(folded.apply, bad, x))


@pytest.mark.slow
def test_models_that_go_another_way_for_other_inputs(x):
    def layers(x):
        y = nn.Dense(3)(x)
        return BN()(y) if x.shape[0] == 4 else BN()(nn.relu(y))

    folded = nj.deploy.fold(*linen_model(layers, x), x, show=False)
    refuses(
        ValueError,
        "params/Dense_0/kernel",
        function="Folded.apply",
        call=partial(folded.apply, folded.variables, x[:2]),
    )


@pytest.mark.slow
def test_transformations_and_what_is_no_model(model, x):
    model, variables = model
    with pytest.raises(TypeError, match=r"fold: batch_stats/norm1/mean is traced.*float32\[5\]"):
        jax.jit(lambda variables: nj.deploy.fold(model, variables, x).variables)(variables)
    with pytest.raises(TypeError, match=r"fold: an input is traced.*float32\[4,6,3\]"):
        jax.jit(lambda x: nj.deploy.fold(model, variables, x).variables)(x)
    refuses(TypeError, "dict", call=partial(nj.deploy.fold, variables, model, x))
    refuses(
        TypeError,
        "an input is a bool",
        "partial",
        call=partial(nj.deploy.fold, model, variables, x, False),
    )


@pytest.mark.slow
def test_models_that_cannot_be_compared(model, x):
    model, variables = model
    refuses(ValueError, "nan", call=lambda: nj.deploy.fold(model, variables, x * jnp.nan))
    refuses(
        ValueError,
        "no floats",
        call=lambda: nj.deploy.fold(lambda v, x: model.apply(v, x).argmax(-1), variables, x),
    )


def test_models_that_disagree(model, x):
    """A model that is not the same function twice."""
    model, variables = model
    calls = iter(range(10))

    def moving(variables, x):
        count = jax.pure_callback(lambda: np.float32(next(calls)), jnp.float32(0))
        return model.apply(variables, x) + count

    refuses(
        ValueError,
        "does not agree with its source",
        "1e-05",
        call=lambda: nj.deploy.fold(moving, variables, x),
    )
    assert 0.1 < nj.deploy.fold(moving, variables, x, tolerance=10.0, show=False).error < 10
