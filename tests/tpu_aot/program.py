"""Compiles synced batch norm for a TPU pod that is not there, and prints what was compiled as JSON.

A process of its own: libtpu must be told of its topology before JAX starts, and may be loaded by one process at a time.
"""

import json
import os
import sys
from functools import partial

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
FEATURES = 128


def main(topology: str, way: str, masked: bool) -> None:
    os.environ.update(ENVIRONMENT)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import normjax as nj
    from tests.distributed.hlo import collectives

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("data",))
    whole, split = PartitionSpec(), PartitionSpec("data")

    def shaped(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params, batch_stats = jax.tree.map(
        lambda leaf: shaped(leaf.shape, leaf.dtype, whole), jax.eval_shape(partial(nj.batch_norm_init, FEATURES))
    )
    batch = 4 * len(devices)
    x = shaped((batch, 8, 8, FEATURES), jnp.bfloat16, split)
    mask = shaped((batch, 1, 1, 1), jnp.bool_, split) if masked else None

    def forward(params, batch_stats, x, mask):
        axis_name = None if way == "jit" else "data"
        return nj.batch_norm(params, batch_stats, x, True, mask=mask, axis_name=axis_name)

    def backward(params, batch_stats, x, mask):
        loss = lambda params, x: jnp.sum(forward(params, batch_stats, x, mask)[0].astype(jnp.float32) ** 2)  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(params, x)

    found = {"devices": len(devices)}
    for name, run, outputs in (("forward", forward, (split, whole)), ("backward", backward, (whole, split))):
        if way == "jit":
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), outputs)
            program = jax.jit(run, out_shardings=places)
        else:
            program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(whole, whole, split, split), out_specs=outputs))
        found[name] = collectives(program.lower(params, batch_stats, x, mask).compile())
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "masked")
