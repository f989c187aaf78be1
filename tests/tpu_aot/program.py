"""Compiles synced batch norm for a TPU pod that is not there, and prints what was compiled as JSON.

A process of its own: libtpu must be told of its topology before JAX starts, and may be loaded by
  one process at a time.
"""

import json
import sys
from functools import partial

FEATURES = 128


def main(topology: str, way: str, masked: bool) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import normjax as nj
    from benchmarks import tpu
    from benchmarks.hlo import collectives

    devices = tpu.devices(topology)
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def shaped(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params, batch_stats = jax.tree.map(
        lambda leaf: shaped(leaf.shape, leaf.dtype, whole),
        jax.eval_shape(partial(nj.batch_norm_init, FEATURES)),
    )
    batch = 4 * len(devices)
    x = shaped((batch, 8, 8, FEATURES), jnp.bfloat16, split)
    mask = shaped((batch, 1, 1, 1), jnp.bool_, split) if masked else None

    def forward(params, batch_stats, x, mask):
        axis_name = None if way == "jit" else "data"
        return nj.batch_norm(params, batch_stats, x, True, mask=mask, axis_name=axis_name)

    def backward(params, batch_stats, x, mask):
        def loss(params, x):
            return jnp.sum(forward(params, batch_stats, x, mask)[0].astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    found = {"devices": len(devices)}
    for name, run, outputs in (
        ("forward", forward, (split, whole)),
        ("backward", backward, (whole, split)),
    ):
        if way == "jit":
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), outputs)
            program = jax.jit(run, out_shardings=places)
        else:
            program = jax.jit(
                jax.shard_map(
                    run, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=outputs
                )
            )
        seen = collectives(program.lower(params, batch_stats, x, mask).compile())
        found[name] = [(one.kind, one.elements) for one in seen if not one.in_branch]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "masked")
