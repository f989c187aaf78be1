"""Every layer and every adapter names the argument that does not fit, in its own words."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.adapters import ADAPTERS, WRAPPERS
from tests.contract.cases import CASES, of

PLAIN = of([case for case in CASES if case.variant == "plain"])
FORM = r"\w+: .*\. Expected .*; got .*\. .*\."


def refuses(error, call, *values):
    """Asserts that a call raises one of normjax's errors, with all of `values` in it."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert re.fullmatch(FORM, message, re.DOTALL), message
    for value in values:
        assert str(value) in message, f"{value!r} is not in: {message}"


def lists(leaf):
    return np.asarray(leaf).tolist()


@PLAIN
@pytest.mark.parametrize("train", [True, False])
def test_a_leaf_that_is_a_list_is_named(case, train, rng):
    params, batch_stats, x = case.arguments(rng)
    for name, tree in (("params", params), ("batch_stats", batch_stats)):
        for leaf in tree:
            if tree[leaf].ndim == 0:
                continue
            given = {"params": params, "batch_stats": batch_stats}
            given[name] = tree | {leaf: lists(tree[leaf])}
            refuses(
                TypeError,
                lambda given=given: case.apply(train)(*given.values(), x),
                f"{name}[{leaf!r}]",
                "list",
                case.layer.name,
            )


@PLAIN
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("given", [None, "x", {"x": 1.0}], ids=repr)
def test_x_that_is_no_array_is_named(case, train, given, rng):
    params, batch_stats, _ = case.arguments(rng)
    refuses(
        TypeError,
        lambda: case.apply(train)(params, batch_stats, given),
        case.layer.name,
        "is not an array",
        type(given).__name__,
    )


@pytest.mark.parametrize(
    "adapter", [each for each in ADAPTERS if each.name not in WRAPPERS], ids=repr
)
def test_x_that_is_no_array_is_named_by_the_adapters(adapter):
    refuses(
        TypeError, lambda: adapter.call(adapter.make(), None), adapter.name, "x of type NoneType"
    )


def test_moments_that_do_not_fit_each_other():
    a, b = nj.moments(jnp.ones((4, 3)), 0), nj.moments(jnp.ones((4, 2)), 0)
    refuses(ValueError, lambda: nj.merge_moments(a, b), "a.mean.shape=(3,)", "b.mean.shape=(2,)")
    refuses(TypeError, lambda: nj.merge_moments(a, None), "b of type NoneType")
    refuses(
        TypeError, lambda: nj.merge_moments(a, nj.Moments(4, [0.0] * 3, a.var)), "b.mean", "list"
    )
    _, batch_stats = nj.batch_norm_init(3)
    mixed = a._replace(var=b.var)
    refuses(
        ValueError,
        lambda: nj.update_batch_stats(batch_stats, mixed),
        "moments.mean.shape=(3,)",
        "moments.var.shape=(2,)",
    )
    refuses(TypeError, lambda: nj.update_batch_stats(batch_stats, None), "moments of type NoneType")


@pytest.mark.parametrize("name", ["instance_norm", "filter_response_norm"])
@pytest.mark.parametrize("axes", [{"feature_axes": 0}, {"reduction_axes": (0, 1)}], ids=str)
def test_the_axis_of_the_examples_is_named_before_leaves_that_do_not_fit_either(name, axes):
    params, batch_stats = getattr(nj, f"{name}_init")(7)
    refuses(
        ValueError,
        lambda: getattr(nj, name)(params, batch_stats, jnp.ones((6, 3, 4)), True, **axes),
        "axis 0 holds the examples",
        "x.shape=(6, 3, 4)",
    )


@pytest.mark.parametrize("name", ["group_norm", "local_response_norm"])
def test_several_feature_axes_are_named_before_leaves_that_do_not_fit_either(name):
    params, batch_stats = getattr(nj, f"{name}_init")(7, use_scale=True)
    refuses(
        ValueError,
        lambda: getattr(nj, name)(
            params, batch_stats, jnp.ones((6, 3, 4)), True, feature_axes=(1, 2)
        ),
        "there must be one feature axis",
        "feature_axes=(1, 2)",
    )
