"""Paths and arrays of variables, whatever holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze

from normjax._trees import by_path, check_finite, collections, flatten, nest, path_names, plain

ONE = jnp.ones(())


def names(tree):
    return [path_names(path) for path, _ in jax.tree.leaves_with_path(tree)]


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": {"b": ONE}}, ("a", "b")),
        ({"a": [ONE]}, ("a", "0")),
        ({"Dense_0/kernel/scale": ONE}, ("Dense_0", "kernel", "scale")),
        ({"scales": {("kernel", "u"): ONE}}, ("scales", "kernel", "u")),
        (freeze({"a": {"b": ONE}}), ("a", "b")),
        ({"a": nn.Partitioned(ONE, names=())}, ("a",)),
        (nnx.State({"a": {"b": nnx.Param(ONE)}}), ("a", "b")),
        ({"value": ONE}, ("value",)),
        (ONE, ()),
    ],
)
def test_names_are_those_that_people_gave(tree, path):
    assert names(tree) == [path]


def test_paths_as_keys_nest_back():
    tree = {"b": {"kernel/u": 1, "scale": 2}, "a": 3}
    assert nest(by_path(tree)) == nest(flatten(tree)) == tree
    assert list(flatten(tree)) == [("b", "kernel/u"), ("b", "scale"), ("a",)]


def test_an_nnx_module_gives_the_arrays_of_its_parameters():
    layer = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    arrays = by_path(plain(layer))
    assert sorted(arrays) == [("bias",), ("scale",)]
    assert all(isinstance(leaf, jax.Array) for leaf in arrays.values())


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"params": 1, "cache": 2}, {"params": 1, "cache": 2}),
        (freeze({"batch_stats": 1}), {"batch_stats": 1}),
        ((1, 2), {"params": 1, "batch_stats": 2}),
        ({"dense": 1}, {"params": {"dense": 1}}),
    ],
)
def test_collections_and_back(variables, found):
    known, pack = collections(variables, known=("params", "batch_stats"), alone="params")
    assert known == found
    assert pack(known) == variables and type(pack(known)) is type(variables)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.array([1.0, np.inf]), jnp.array([1.0, jnp.inf])])
def test_what_is_not_finite_is_named_with_its_place(bad):
    with pytest.raises(ValueError, match=r"1 NaN or infinite of 2 in x\['a'\].*at \(1,\): inf"):
        check_finite("function", "x", {"a": bad})


@pytest.mark.slow
def test_numbers_beyond_float32_are_finite():
    check_finite("function", "x", np.array([1e300]))
    with pytest.raises(ValueError, match=r"not finite.*at \(\): nan"):
        check_finite("function", "x", float("nan"))
