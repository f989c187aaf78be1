"""Programs for GPUs: no conditional, whose predicate the host would wait for; one collective."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType

import normjax as nj
from tests.compare import assert_close
from tests.distributed.mapped import DEVICES, SPLIT, WHOLE, mesh
from tests.platforms import ELSEWHERE, Platform

BATCH = {
    "batch_norm": nj.batch_norm,
    "batch_renorm": partial(nj.batch_renorm, r_max=3.0, d_max=5.0),
    "activated_batch_norm": nj.activated_batch_norm,
    "ghost batches": partial(nj.batch_norm, virtual_batch_size=2),
}
EXAMPLES = {
    "layer_norm": nj.layer_norm,
    "rms_norm": nj.rms_norm,
    "group_norm": partial(nj.group_norm, num_groups=4),
    "instance_norm": nj.instance_norm,
}
FEATURES = 8


def loss(layer, params, batch_stats, x, mask):
    y, new = layer(params, batch_stats, x, True, **({} if mask is None else {"mask": mask}))
    return jnp.sum(y**2), new


def program(platform, layer, *, masked=False):
    """Returns the text of a step's program for a platform, compiled here."""
    params, batch_stats = nj.batch_norm_init(FEATURES, count=layer is BATCH["batch_renorm"])
    batch_stats = {} if layer in EXAMPLES.values() else batch_stats
    if layer is nj.rms_norm:
        del params["bias"]
    step = jax.jit(jax.value_and_grad(partial(loss, layer), argnums=(0, 2), has_aux=True))
    x, mask = jnp.ones((4, 3, 3, FEATURES)), jnp.ones((4, 3, 3, 1), bool) if masked else None
    exported = export.export(step, platforms=[platform], disabled_checks=ELSEWHERE)
    here = jax.jit(exported(params, batch_stats, x, mask).call)
    return here.lower(params, batch_stats, x, mask).compile().as_text()


@pytest.mark.parametrize("layer", BATCH | EXAMPLES)
def test_there_is_no_conditional(layer):
    assert " conditional(" not in program("cuda", (BATCH | EXAMPLES)[layer])


def test_nor_with_a_mask_unlike_on_tpus():
    assert " conditional(" not in program("rocm", nj.batch_norm, masked=True)
    assert " conditional(" in program("tpu", nj.batch_norm, masked=True)


def sent(devices, *, masked=False, backward=False):
    """Counts the gathers and sums of a step that shares its statistics over so many devices."""

    def run(params, batch_stats, x, mask):
        layer = partial(nj.batch_norm, axis_name="data")
        if not backward:
            return layer(params, batch_stats, x, True, mask=mask)[1]
        return jax.grad(partial(loss, layer), has_aux=True, argnums=2)(params, batch_stats, x, mask)

    params, batch_stats = nj.batch_norm_init(FEATURES)
    shape = jax.ShapeDtypeStruct((2 * devices, 3, FEATURES), jnp.float32)
    mask = jax.ShapeDtypeStruct((2 * devices, 3, 1), bool) if masked else None
    many = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    over = mesh(data=devices) if devices == DEVICES else many
    mapped = jax.shard_map(
        run,
        mesh=over,
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT),
        out_specs=(SPLIT, WHOLE) if backward else WHOLE,
    )
    traced = jax.jit(mapped).trace(params, batch_stats, shape, mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return tuple(text.count(f'"stablehlo.{kind}"') for kind in ("all_gather", "all_reduce"))


@pytest.mark.parametrize("masked", [False, True])
def test_devices_gather_their_moments_in_one_collective(masked):
    """Each has a reference of its own, so there is none to agree on."""
    assert sent(DEVICES, masked=masked) == (1, 0)
    assert sent(DEVICES, masked=masked, backward=True) == (1, 1)


def test_many_devices_take_two_sums():
    assert sent(128) == (0, 2)


@pytest.mark.parametrize("shape", [(64, 3), (4, 32, 3), (2, 9, 9, 3)])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_sample_that_is_far_from_the_mean_is_a_part_of_the_variance(platform, shape, rng):
    """The worst: the sample is far from all else, which is far from zero."""
    x = np.float32(rng.normal(1e4, 1, shape))
    sampled = x[:2] if len(shape) == 2 else x[:, :1]
    for distance in (0.0, 10.0, 1e5):
        sampled[...] = 1e4 - distance
        moments = partial(nj.moments, reduction_axes=tuple(range(len(shape) - 1)))
        found = Platform(platform)(moments, x)
        expected = np.float64(x).reshape(-1, 3).var(0)
        assert_close(found.var, expected, rtol=5e-5)
