"""Large groups of devices under check_vma: each device sums a part of what they share."""

import jax
import jax.numpy as jnp
import pytest

import normjax as nj
from normjax.statistics import devices
from tests.compare import assert_trees_close
from tests.distributed.mapped import SPLIT, WHOLE, mesh

GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
HALVES = (slice(16), slice(16, None))


def loss(params, batch_stats, x, **shared):
    # Of an epsilon that no other test has: what was traced with another limit is not taken again.
    y, new = nj.batch_norm(params, batch_stats, x, train=True, epsilon=2e-4, **shared)
    return jnp.sum(jnp.sin(y)), (y, new)


@pytest.mark.parametrize("features", [3, 8])  # with a rest that must be padded, and without
def test_they_get_what_gathering_gives(monkeypatch, rng, features):
    monkeypatch.setattr(devices, "FEW_MEMBERS", 2)  # so that four are many
    x = jnp.asarray(5 + 2 * rng.normal(size=(32, 2, features)), jnp.float32)
    params, batch_stats = nj.batch_norm_init(features)

    def run(params, batch_stats, x):
        shared = {"axis_name": "data", "axis_index_groups": GROUPS}
        dx, (y, new) = jax.grad(loss, 2, has_aux=True)(params, batch_stats, x, **shared)
        return y, dx, jax.tree.map(lambda leaf: leaf[None], new)

    mapped = jax.shard_map(run, mesh=mesh(data=8), in_specs=(WHOLE, WHOLE, SPLIT), out_specs=SPLIT)
    program = jax.jit(mapped).lower(params, batch_stats, x).as_text()
    assert "reduce_scatter" in program and f"tensor<4x{2 * features}xf32>" not in program
    y, dx, new = jax.jit(mapped)(params, batch_stats, x)
    for half, first in zip(HALVES, (0, 4), strict=True):
        grad = jax.grad(loss, 2, has_aux=True)
        alone_dx, (alone_y, alone_new) = grad(params, batch_stats, x[half])
        own = jax.tree.map(lambda leaf, first=first: leaf[first], new)
        assert_trees_close(
            (y[half], dx[half], own), (alone_y, alone_dx, alone_new), rtol=1e-4, atol=2e-5
        )
