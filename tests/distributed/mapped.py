"""A step of synced batch norm on 8 devices, mapped in each of JAX's ways, and on one device."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax as nj
from benchmarks import hlo
from tests.compare import assert_close

DEVICES, FEATURES = 8, 3
SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def mesh(**axes) -> Mesh:
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(*axes.values()), tuple(axes))


def operands(rng, *, dtype=jnp.float32, offset=0.0, mask=None, features=FEATURES):
    """Scale, bias and running statistics that are no special case, and x of 4 examples a device."""
    params, batch_stats = nj.batch_norm_init(features)
    params = {
        leaf: value + jnp.asarray(rng.normal(size=features), jnp.float32)
        for leaf, value in params.items()
    }
    batch_stats["mean"] += 0.5
    x, weight = (
        jnp.asarray(rng.normal(size=(4 * DEVICES, 5, features)), jnp.float32) for _ in range(2)
    )
    return params, batch_stats, (x + offset).astype(dtype), weight / x.size, mask


def assert_steps_close(actual, expected, rtol=1e-5):
    """Asserts equality to rtol of each array's largest value, as values may cancel to zero."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, atol=rtol * float(jnp.abs(b).max()))


def loss(params, batch_stats, x, weight, mask, **settings):
    """A device's share of the global mean loss; masked outputs do not count."""
    y, batch_stats = nj.batch_norm(params, batch_stats, x, True, mask=mask, **settings)
    y = y if mask is None else jnp.where(mask, y, 0)
    return jnp.sum(y.astype(jnp.float32) * weight), (y, batch_stats)


def step(params, batch_stats, x, weight, mask, **settings):
    """Returns y, batch_stats, and the gradients of params and x."""
    (_, (y, batch_stats)), (d_params, dx) = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)(
        params, batch_stats, x, weight, mask, **settings
    )
    return y, batch_stats, d_params, dx


one_device = jax.jit(step, static_argnames="virtual_batch_size")


def summed(step, **settings):
    """The step in pmap or an unchecked shard_map, which sums the parameters' gradients itself."""

    def run(*operands):
        y, batch_stats, d_params, dx = step(*operands, axis_name="data", **settings)
        return y, batch_stats, lax.psum(d_params, "data"), dx

    return run


def collectives(compiled):
    """Kind and number of elements of each collective outside of conditionals' branches."""
    return [
        (found.kind, found.elements) for found in hlo.collectives(compiled) if not found.in_branch
    ]


def stacked(tree):
    """Splits the examples over a new leading axis of devices."""
    return jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), tree)


WAYS = ("pmap", "vmap", "shard_map", "shard_map unchecked", "jit", "jit explicit")


@cache
def synced_step(way):
    """The step as a function of whole batches: mapped over devices, or for sharded operands."""
    if way in ("pmap", "vmap"):
        return over_axis(getattr(jax, way))
    if way in ("jit", "jit explicit"):
        return step
    check_vma = way == "shard_map"
    return jax.shard_map(
        partial(step, axis_name="data") if check_vma else summed(step),
        mesh=mesh(data=DEVICES),
        in_specs=(WHOLE, WHOLE, SPLIT, SPLIT, SPLIT),
        out_specs=(SPLIT, WHOLE, WHOLE, SPLIT),
        check_vma=check_vma,
    )


def over_axis(transform):
    """pmap or vmap of the step."""
    mapped = transform(summed(step), axis_name="data", in_axes=(None, None, 0, 0, 0))

    def run(params, batch_stats, *examples):
        y, batch_stats, d_params, dx = mapped(params, batch_stats, *stacked(examples))
        joined = [jnp.asarray(a).reshape(-1, *a.shape[2:]) for a in (y, dx)]
        first = jax.tree.map(lambda a: a[0], (batch_stats, d_params))
        return joined[0], *first, joined[1]

    return run


def synced(on_platform, way, params, batch_stats, *examples):
    """Returns what the step gives on 8 devices, by the program of a platform."""
    if way not in ("jit", "jit explicit"):
        return on_platform(synced_step(way), params, batch_stats, *examples)
    kind = jax.sharding.AxisType.Explicit if "explicit" in way else jax.sharding.AxisType.Auto
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
    examples = jax.device_put(examples, NamedSharding(devices, SPLIT))
    with jax.set_mesh(devices):
        return on_platform(step, params, batch_stats, *examples)
