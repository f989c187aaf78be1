"""Every layer on x with any axis cut over devices gives what it gives on one device.

On Explicit axes, which `jax.make_mesh` makes by default, JAX's types say how each array is sharded;
on Auto axes only the compiler knows.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import normjax as nj
from tests.compare import assert_trees_close
from tests.contract.cases import CASES, REORDERED

KINDS = [
    pytest.param(AxisType.Explicit, id="explicit"),
    pytest.param(AxisType.Auto, id="auto", marks=pytest.mark.slow),
]
# The axis of x that is cut, over how many devices. Ghosts of 3 examples and groups of 2 channels
# lie within devices, or across them. VMAPPED is an axis in front of the others.
VMAPPED = -1
CUTS = [(0, 2), (0, 6), (1, 3), (2, 2), (2, 4)]


def named(values):
    """A parameter for a test, with a name that says what it is."""
    return pytest.param(
        *values, id="-".join(str(getattr(value, "name", value)) for value in values)
    )


@cache
def step(case, vmapped):
    """y, new statistics, y at inference and gradients; of x alone with another axis, if vmapped."""

    def run(params, batch_stats, x):
        def loss(params, x):
            y, new = case.apply(True)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y)), (y, new)

        gradients, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, new, case.apply(False)(params, batch_stats, x)[0], gradients

    return jax.vmap(run, (None, None, 0)) if vmapped else run


def operands(case, vmapped):
    params, batch_stats, x = case.arguments(np.random.default_rng(0))
    return params, batch_stats, jnp.stack([x, 2 * x]) if vmapped else x


@cache
def on_one_device(case, vmapped):
    return jax.jit(step(case, vmapped))(*operands(case, vmapped))


def line(devices, kind):
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices()[:devices])


def cut(value, axis, mesh):
    """Puts a value onto the mesh, with one axis cut; whole, if it has no such axis or it is 1."""
    sharded = [None] * value.ndim
    if value.ndim and value.shape[axis] > 1:
        sharded[axis] = "d"
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*sharded)))


def assert_equals_one_device(case, vmapped, kind, axis, devices, *, cut_leaves=False):
    mesh = line(devices, kind)
    params, batch_stats, x = operands(case, vmapped)
    with jax.set_mesh(mesh):
        x = cut(x, axis + vmapped, mesh)
        if cut_leaves:
            params, batch_stats = jax.tree.map(
                lambda leaf: cut(leaf, -1, mesh), (params, batch_stats)
            )
        outcome = jax.jit(step(case, vmapped))(params, batch_stats, x)
    assert_trees_close(jax.device_get(outcome), on_one_device(case, vmapped), **REORDERED)


def cuts_of_each_case():
    """Each cut of every case: on Explicit axes, which refuse more than Auto ones; some on both.

    Under vmap or not by turns. Where both kinds of axes have a cut, one of them is under vmap.
    """
    for place, case in enumerate(CASES):
        on_auto = {place % len(CUTS), (place + 2) % len(CUTS)}
        for turn, cut_axis in enumerate(CUTS):
            vmapped = (place + turn) % 2 == 1
            yield case, vmapped, AxisType.Explicit, *cut_axis
            if turn in on_auto:
                yield case, not vmapped, AxisType.Auto, *cut_axis
        yield case, True, AxisType.Auto if place % 2 else AxisType.Explicit, VMAPPED, 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "vmapped", "kind", "axis", "devices"), [*map(named, cuts_of_each_case())]
)
def test_an_axis_of_x_may_be_cut(case, vmapped, kind, axis, devices):
    assert_equals_one_device(case, vmapped, kind, axis, devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "vmapped", "kind"),
    [
        named((case, place % 2 == 1, (AxisType.Explicit, AxisType.Auto)[place // 2 % 2]))
        for place, case in enumerate(CASES)
    ],
)
def test_features_may_be_cut_with_parameters_and_statistics(case, vmapped, kind):
    assert_equals_one_device(case, vmapped, kind, 2, 2, cut_leaves=True)


@pytest.mark.slow
def test_vmap_in_training_on_a_default_mesh(rng):
    """The shortest program that raised an error: its mesh has Explicit axes."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    params, batch_stats = nj.batch_norm_init(4)
    x = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
    layer = jax.jit(jax.vmap(partial(nj.batch_norm, params, batch_stats, train=True)))
    expected = layer(x=x)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "data")))
        assert_trees_close(jax.device_get(layer(x=sharded)), expected, **REORDERED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, -1])
def test_moments_of_any_cut(rng, axis, kind):
    x = jnp.asarray(rng.normal(5, 1, (6, 3, 4)), jnp.float32)
    for axes in ((0, 1), (1, 2), -1):
        expected = nj.moments(x, axes)
        mesh = line(2, kind)
        with jax.set_mesh(mesh):
            found = jax.jit(partial(nj.moments, reduction_axes=axes))(cut(x, axis, mesh))
        assert_trees_close(jax.device_get(found), expected, **REORDERED)


# One mesh axis is mapped by hand, the other one left to JAX, and features are cut over it.
SYNCED = ("batch_norm", "batch_renorm", "activated_batch_norm", "running_norm")
PARTLY_MAPPED = [
    named((case, check_vma, kind))
    for place, case in enumerate(case for case in CASES if case.variant == "plain")
    for check_vma, kind in zip(
        (place % 2 == 0, place % 2 == 1), (AxisType.Explicit, AxisType.Auto), strict=True
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "check_vma", "kind"), PARTLY_MAPPED)
def test_shard_map_over_some_axes_with_features_cut_over_another(case, check_vma, kind):
    given = operands(case, False)
    weights = case.layer.name in ("weight_norm", "weight_standardization", "spectral_norm")
    examples = PartitionSpec() if weights else PartitionSpec("data")
    settings = {"axis_name": "data"} if case.layer.name in SYNCED else {}

    def run(params, batch_stats, x):
        def loss(x):
            y, new = case.apply(True, **settings)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y)), (y, new)

        dx, (y, new) = jax.grad(loss, has_aux=True)(x)
        return y, dx, new

    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4]
    )

    def over_model(leaf):
        features = "model" if leaf.ndim and leaf.shape[-1] > 1 else None
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), features) if leaf.ndim else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), examples),
        out_specs=(examples, examples, PartitionSpec()),
        axis_names={"data"},
        check_vma=check_vma,
    )
    with jax.set_mesh(mesh):
        y, dx, new = jax.device_get(jax.jit(mapped)(*jax.tree.map(over_model, given)))
    expected, expected_new, _, (_, expected_dx) = on_one_device(case, False)
    assert_trees_close((y, dx, new), (expected, expected_dx, expected_new), **REORDERED)
