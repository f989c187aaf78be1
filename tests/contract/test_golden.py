"""Every layer gives what it gave."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.contract.golden import FILE, values
from tests.contract.layers import LAYERS

GOLDEN = json.loads(FILE.read_text())
CASES = {
    f"{layer.name}-{variant}": (layer, s)
    for layer in LAYERS
    for variant, s in layer.settings.items()
}
EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_file(case):
    actual = values(*CASES[case])
    assert set(actual) == set(GOLDEN[case])
    for name, value in actual.items():
        # Other machines and versions of XLA may add in another order.
        assert_close(np.ravel(value), GOLDEN[case][name], rtol=100 * EPS, atol=100 * EPS)


def test_the_file_has_no_other_cases():
    assert set(GOLDEN) == set(CASES)
