"""Synced batch norm compiles to a collective forward and one backward, of O(features) elements."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from benchmarks import hlo
from tests.compare import assert_close
from tests.distributed.mapped import DEVICES, SPLIT, WHOLE, collectives, mesh, stacked
from tests.marks import slow_after
from tests.xla import AS_FOR_USERS

FEATURES = 128
REDUCE = "all-reduce"


def forward(params, batch_stats, x, mask, **axis):
    return nj.batch_norm(params, batch_stats, x, True, mask=mask, **axis)


def backward(params, batch_stats, x, mask, **axis):
    def loss(params, x):
        y, _ = forward(params, batch_stats, x, mask, **axis)
        return jnp.sum(y**2)

    return jax.grad(loss, argnums=(0, 1))(params, x)


def compiled(program, way, masked):
    params, batch_stats = nj.batch_norm_init(FEATURES)
    x = jnp.ones((4 * DEVICES, 3, FEATURES))
    operands = (params, batch_stats, x, jnp.ones((4 * DEVICES, 3, 1), bool) if masked else None)
    run = partial(program, axis_name="data")
    if way == "pmap":
        mapped = jax.pmap(run, axis_name="data", in_axes=(None, None, 0, 0))
        return mapped.lower(params, batch_stats, *stacked(operands[2:])).compile(AS_FOR_USERS)
    check_vma = way == "shard_map"
    outputs = (SPLIT, WHOLE) if program is forward else (WHOLE if check_vma else SPLIT, SPLIT)
    mapped = jax.shard_map(
        run,
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT),
        out_specs=outputs,
        check_vma=check_vma,
    )
    return jax.jit(mapped).lower(*operands).compile(AS_FOR_USERS)


@pytest.mark.parametrize("way", slow_after(1, ["shard_map", "shard_map unchecked", "pmap"]))
@pytest.mark.parametrize("masked", [False, True])
def test_one_all_reduce_forward(way, masked):
    ((kind, size),) = collectives(compiled(forward, way, masked))
    assert kind == REDUCE
    assert size <= 3 * FEATURES


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pmap", "shard_map", "shard_map unchecked"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_all_reduce_backward(way, masked):
    both = collectives(compiled(backward, way, masked))
    assert [kind for kind, _ in both] == [REDUCE, REDUCE], "one forward, one backward"
    assert all(size <= 3 * FEATURES for _, size in both)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_jit_with_a_sharded_batch_sends_no_more(kind, masked):
    """Without an axis name, XLA's partitioner finds and packs the sums and the mask's count."""
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    whole, split = NamedSharding(devices, WHOLE), NamedSharding(devices, SPLIT)
    params, batch_stats = jax.device_put(nj.batch_norm_init(FEATURES), whole)
    mask = jnp.ones((4 * DEVICES, 3, 1), bool) if masked else None
    x, mask = jax.device_put((jnp.ones((4 * DEVICES, 3, FEATURES)), mask), split)
    there = (REDUCE, 2 * FEATURES + masked)
    with jax.set_mesh(devices):
        for program, expected in ((forward, [there]), (backward, [there, (REDUCE, 2 * FEATURES)])):
            found = collectives(
                jax.jit(program).lower(params, batch_stats, x, mask).compile(AS_FOR_USERS)
            )
            assert sorted(found) == sorted(expected)


MODEL, SPACE = (None, None, "model"), (None, "data", None)
BATCH_AND_MODEL, BATCH_AND_SPACE = ("data", None, "model"), ("data", "model", None)
QUESTION = 1  # whether a second pass is due, asked of all features at once
# How x is sharded over 4 x 2 devices; what is sent forward, without and with a mask; and backward.
PLAIN_JIT = {
    "features": (MODEL, [QUESTION], [QUESTION], []),
    "positions": (SPACE, [2 * FEATURES], [2 * FEATURES + 1], [2 * FEATURES]),
    "examples and features": (
        BATCH_AND_MODEL,
        [FEATURES, QUESTION],  # half of them on each device
        [FEATURES + 1, QUESTION],
        [FEATURES],
    ),
    "examples and positions": (
        BATCH_AND_SPACE,
        [2 * FEATURES] * 2,  # over one axis of the mesh after the other, as in Flax
        [2 * FEATURES + 1] * 2,
        [2 * FEATURES] * 2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sharded", PLAIN_JIT)
def test_plain_jit_sends_what_the_guide_says(sharded, masked, kind):
    spec, unmasked_there, masked_there, back = PLAIN_JIT[sharded]
    there = masked_there if masked else unmasked_there
    devices = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def placed(tree, *spec):
        return jax.device_put(tree, NamedSharding(devices, PartitionSpec(*spec)))

    with jax.set_mesh(devices):
        params, batch_stats = placed(nj.batch_norm_init(FEATURES), spec[2])
        x = placed(jnp.ones((8, 4, FEATURES)), *spec)
        mask = placed(jnp.ones((8, 4, 1), bool), *spec[:2]) if masked else None
        for program, expected in ((forward, there), (backward, there + back)):
            found = collectives(jax.jit(program).lower(params, batch_stats, x, mask).compile())
            assert sorted(found) == sorted((REDUCE, size) for size in expected)


@pytest.mark.slow
def test_checked_shard_map_sends_two_numbers_a_feature():
    """With check_vma, scale and bias get their gradients from the same sum."""
    assert collectives(compiled(forward, "shard_map", False)) == [(REDUCE, 2 * FEATURES)]
    assert (
        sorted(collectives(compiled(backward, "shard_map", False))) == [(REDUCE, 2 * FEATURES)] * 2
    )
    assert collectives(compiled(forward, "shard_map", True)) == [(REDUCE, 2 * FEATURES + 1)]


def test_the_second_pass_is_in_a_branch_with_a_collective_of_its_own():
    found = hlo.collectives(compiled(forward, "shard_map", False))
    assert sorted(one.in_branch for one in found) == [False, True]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("far", [DEVICES, 1], ids=["all devices", "one device"])
def test_the_second_pass_is_taken_on_all_devices_at_once(offset, far):
    """The data of one device suffice to call for it, and its collective finds all partners.

    At an offset of 1e4 one pass leaves no digit of a variance of 1.
    """
    params, batch_stats = nj.batch_norm_init(2)
    x = np.random.default_rng(0).normal(size=(4 * DEVICES, 3, 2)).astype(np.float32)
    x[: 4 * far, :, 1] += np.float32(offset)
    run = partial(forward, params, batch_stats, mask=None, axis_name="data", momentum=0.0)
    _, new = jax.pmap(run, axis_name="data")(*stacked((x,)))
    expected = np.float64(x).var((0, 1))
    for own in np.asarray(new["var"]):
        assert_close(own, expected, rtol=2e-5)


@pytest.mark.slow
def test_the_program_of_a_device_does_not_grow_with_their_number():
    """Lowered for an abstract mesh, 4,096 devices run the program of 8, with other numbers."""
    texts = {}
    for devices in (8, 4096):
        abstract = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
        params, batch_stats = jax.eval_shape(partial(nj.batch_norm_init, FEATURES))
        mapped = jax.shard_map(
            partial(backward, axis_name="data", mask=None),
            mesh=abstract,
            in_specs=(WHOLE, WHOLE, SPLIT),
            out_specs=(WHOLE, SPLIT),
        )
        x = jax.ShapeDtypeStruct((4 * devices, 3, FEATURES), jnp.float32)
        texts[devices] = (
            jax.jit(mapped)
            .trace(params, batch_stats, x)
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )
    # What differs is the global shapes, and the list of who takes part in a sum.
    numbers = r'dense<(?:\[\[[\d, ]*\]\]|"0x[0-9A-F]*")>|\d+'
    per_device = {devices: re.sub(numbers, "N", text) for devices, text in texts.items()}
    assert "all_reduce" in per_device[4096]
    assert per_device[8] == per_device[4096]
