"""Every layer and every adapter names the argument that does not fit, in the library's own words."""

import re

import numpy as np
import pytest

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
