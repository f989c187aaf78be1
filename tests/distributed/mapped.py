"""One step of synced batch norm on 8 devices, in each of JAX's ways to map, and the same step on one device."""

from functools import partial

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
    """Equal to rtol of each array's largest value: single values may lie near zero by cancellation."""
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


def one_device(params, batch_stats, x, weight, mask, **settings):
    return jax.jit(partial(step, **settings))(params, batch_stats, x, weight, mask)


def summed(step, **settings):
    """The step as it stands in pmap or an unchecked shard_map: gradients of parameters are added up by hand."""

    def run(*operands):
        y, batch_stats, d_params, dx = step(*operands, axis_name="data", **settings)
        return y, batch_stats, lax.psum(d_params, "data"), dx

    return run


def shard_mapped(*operands, check_vma, **settings):
    run = partial(step, axis_name="data", **settings) if check_vma else summed(step, **settings)
    return jax.jit(
        jax.shard_map(
            run,
            mesh=mesh(data=DEVICES),
            in_specs=(WHOLE, WHOLE, SPLIT, SPLIT, SPLIT),
            out_specs=(SPLIT, WHOLE, WHOLE, SPLIT),
            check_vma=check_vma,
        )
    )


def collectives(compiled):
    """Kind and number of elements of each collective outside of conditionals' branches."""
    return [
        (found.kind, found.elements) for found in hlo.collectives(compiled) if not found.in_branch
    ]


def stacked(tree):
    """Splits the examples over a new leading axis of devices."""
    return jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), tree)


def over_axis(transform):
    """pmap or vmap as a function of whole batches."""

    def build(*_, **settings):
        mapped = transform(
            summed(step, **settings), axis_name="data", in_axes=(None, None, 0, 0, 0)
        )

        def run(params, batch_stats, *examples):
            y, batch_stats, d_params, dx = mapped(params, batch_stats, *stacked(examples))
            joined = [jnp.asarray(a).reshape(-1, *a.shape[2:]) for a in (y, dx)]
            first = jax.tree.map(lambda a: a[0], (batch_stats, d_params))
            return joined[0], *first, joined[1]

        return run

    return build


def sharded_jit(params, batch_stats, *examples, explicit, **settings):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))

    def run(params, batch_stats, *examples):
        examples = jax.tree.map(
            lambda a: jax.device_put(a, NamedSharding(devices, SPLIT)), examples
        )
        with jax.set_mesh(devices):
            return jax.jit(partial(step, **settings))(params, batch_stats, *examples)

    return run


WAYS = {
    "pmap": over_axis(jax.pmap),
    "vmap": over_axis(jax.vmap),
    "shard_map": partial(shard_mapped, check_vma=True),
    "shard_map unchecked": partial(shard_mapped, check_vma=False),
    "jit": partial(sharded_jit, explicit=False),
    "jit explicit": partial(sharded_jit, explicit=True),
}
