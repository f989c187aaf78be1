"""Under shard_map with its defaults each operand of a layer may vary over devices, or not vary.

Gathered arrays vary, and so do statistics that each device keeps for itself.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from tests.compare import assert_close, assert_finite, assert_trees_close
from tests.contract.cases import CASES, REORDERED
from tests.distributed.mapped import mesh

DEVICES = 2
OPERANDS = ("params", "batch_stats", "x", "mask")
WITHOUT_AXIS_NAME = (
    "local_response_norm",
    "dynamic_tanh",
    "weight_norm",
    "weight_standardization",
    "spectral_norm",
)
# Devices that share count the examples of each, here the same ones twice, and y changes with it.
COUNTS_ALL = ("running_norm",)


def there(case):
    """The operands that a layer has."""
    absent = [] if case.masked else ["mask"]
    if not case.layer.has_statistics:
        absent.append("batch_stats")
    if case.layer.name in ("spectral_norm", "weight_standardization"):
        absent.append("params")
    return [name for name in OPERANDS if name not in absent]


def chosen_sets(names):
    """Each operand alone, and all but each: of any two operands both, either and neither vary.

    Of two operands or one these are not all sets; then they are none, all, and each alone.
    """
    if len(names) < 3:
        return dict.fromkeys(((), *((name,) for name in names), tuple(names)))
    alone = [(name,) for name in names]
    others = [tuple(other for other in names if other != name) for name in names]
    return [each for pair in zip(alone, others, strict=True) for each in pair]


def combinations():
    """Sets of varying operands of every layer, by turns with the axis named, where that can be."""
    for place, case in enumerate(CASES):
        for turn, varying in enumerate(chosen_sets(there(case))):
            plain = case.variant == "plain" and varying == ("x",)
            axes = (None, "data") if plain else [(None, "data")[(place + turn // 2 + turn) % 2]]
            if case.layer.name in WITHOUT_AXIS_NAME + COUNTS_ALL:
                axes = [None]
            for axis in axes:
                name = f"{case!r}-{'+'.join(varying) or 'nothing'}-{axis}"
                marks = () if plain else pytest.mark.slow
                yield pytest.param(case, varying, axis, id=name, marks=marks)


def vary(tree):
    return jax.tree.map(lambda leaf: lax.pcast(leaf, "data", to="varying"), tree)


def of_each_device(leaf):
    """Adds an axis of devices, also to what does not vary."""
    return leaf[None] + 0 * lax.axis_index("data").astype(leaf.dtype)


@cache
def step(case, axis):
    """y, new statistics and y at inference; gradients of parameters, statistics and x."""

    def run(params, batch_stats, x, mask):
        settings = {} if axis is None else {"axis_name": axis}
        if mask is not None:
            settings["mask"] = mask
        real = {leaf: old for leaf, old in batch_stats.items() if leaf != "count"}

        def loss(params, real, x):
            y, new = case.apply(True, **settings)(params, batch_stats | real, x)
            return jnp.sum(jnp.tanh(y if mask is None else jnp.where(mask, y, 0))), (y, new)

        gradients, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(params, real, x)
        inferred, _ = case.apply(False, **settings)(params, batch_stats, x)
        return (y, new, inferred), gradients

    return run


@cache
def operands(case):
    mask = jnp.asarray(case.mask()) if case.masked else None
    return *case.arguments(np.random.default_rng(0)), mask


@cache
def on_one_device(case):
    return jax.jit(step(case, None))(*operands(case))


@pytest.mark.parametrize(("case", "varying", "axis"), [*combinations()])
def test_each_operand_may_vary(case, varying, axis):
    """All devices are given the same, so whether they share has no effect on y."""

    def local(*whole_operands):
        given = [
            vary(operand) if name in varying else operand
            for name, operand in zip(OPERANDS, whole_operands, strict=True)
        ]
        return jax.tree.map(of_each_device, step(case, axis)(*given))

    whole, split = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        local, mesh=mesh_of_two(), in_specs=(whole,) * len(OPERANDS), out_specs=split
    )
    found, gradients = jax.jit(mapped)(*operands(case))
    alone, alone_gradients = on_one_device(case)
    assert_finite(gradients)
    shared_and_unbiased = axis is not None and case.settings.get("running_var") == "unbiased"
    for device in range(DEVICES):
        (y, new, inferred), (_, _, dx) = jax.tree.map(
            lambda leaf, device=device: leaf[device], (found, gradients)
        )
        assert_trees_close((y, inferred), (alone[0], alone[2]), **REORDERED)
        if not shared_and_unbiased:  # n / (n - 1) of another n
            assert_trees_close(new, alone[1], **REORDERED)
        if axis is None and "x" in varying:
            assert_close(dx, alone_gradients[2], **REORDERED)


def mesh_of_two():
    return jax.sharding.Mesh(mesh(data=8).devices[:DEVICES], ("data",))
