"""The forward Laplacian of every layer by folx, another reader of jaxprs."""

import folx
import jax
import jax.numpy as jnp
import pytest

import normjax as nj
from tests.contract.cases import CASES


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_laplacian_is_the_trace_of_the_hessian(case, rng):
    params, batch_stats, x = case.arguments(rng)

    def energy(x):
        y, _ = case.apply(True)(params, batch_stats, x)
        return jnp.sum(jnp.tanh(y))

    expected = float(jnp.trace(jax.hessian(energy)(x).reshape(x.size, x.size)))
    with nj.plain_phrasing():
        found = folx.forward_laplacian(energy)(x).laplacian
    assert float(found) == pytest.approx(expected, rel=1e-3, abs=1e-3)
