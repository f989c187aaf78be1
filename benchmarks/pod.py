"""Compiles a ResNet-50 training step for a TPU pod slice; reads its bytes and collectives.

JAX compiles ahead of time for 256 chips, with the synced batch norms of normjax and Flax in groups
of 128 examples. Nothing runs, so no TPU is needed, and there are neither times nor noise. Compiling
takes minutes.

    pip install -e '.[bench]'
    python benchmarks/pod.py --out benchmarks/results/pod-v5e-256.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from functools import partial
from typing import Any

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax as nj


class Bottleneck(nn.Module):
    """Three convolutions, each normalized, and a shortcut."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns relu(x + branch(x))."""
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), self.stride)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(self.conv(4 * self.width, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """He et al. (2016), with the stride in the 3x3 convolutions."""

    batch_norm: Any
    groups: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to logits, in training mode."""
        conv = partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        norm = partial(
            self.batch_norm,
            use_running_average=False,
            momentum=0.9,
            dtype=jnp.bfloat16,
            axis_name="data",
            axis_index_groups=self.groups,
        )
        x = nn.relu(norm()(conv(64, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage and not block else 1, conv, norm)(x)
        return nn.Dense(1000, dtype=jnp.bfloat16)(x.mean((1, 2))).astype(jnp.float32)


def training_step(model: nn.Module) -> Any:
    """One step of SGD with momentum, on each device's part of the batch."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(
        params: Any, batch_stats: Any, state: Any, images: jax.Array, labels: jax.Array
    ) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = model.apply(variables, images, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates[
                "batch_stats"
            ]

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        gradients, value = jax.lax.pmean((gradients, value), "data")
        updates, state_new = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), jax.lax.pmean(new, "data"), state_new, value

    return step, optimizer


def compile_step(batch_norm: Any, mesh: Mesh, per_chip: int, group: int) -> dict[str, Any]:
    """Compiles the step, and returns its costs."""
    chips = mesh.devices.size
    groups = np.arange(chips).reshape(-1, max(group // per_chip, 1)).tolist()
    model = ResNet50(batch_norm, groups)
    step, optimizer = training_step(model)
    images = jax.ShapeDtypeStruct((per_chip * chips, 224, 224, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((per_chip * chips,), jnp.int32)
    one = jax.ShapeDtypeStruct((per_chip, 224, 224, 3), jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), one)
    state = jax.eval_shape(optimizer.init, variables["params"])
    whole, split = PartitionSpec(), PartitionSpec("data")
    specs = (whole, whole, whole, split, split)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(whole,) * 4, check_vma=False)
    operands = (variables["params"], variables["batch_stats"], state, images, labels)
    placed = [
        jax.tree.map(
            lambda a, spec=spec: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
            ),
            tree,
        )
        for tree, spec in zip(operands, specs, strict=True)
    ]
    start = time.perf_counter()
    compiled = jax.jit(mapped, donate_argnums=(0, 1, 2)).lower(*placed).compile()
    return costs(compiled) | {"compile_seconds": round(time.perf_counter() - start, 1)}


def costs(compiled: Any) -> dict[str, Any]:
    """Returns collectives (separately in branches), bytes accessed and memory of one chip."""
    found = hlo.collectives(compiled)
    usual = [collective for collective in found if not collective.in_branch]
    memory = compiled.memory_analysis()
    return {
        "collectives": len(usual),
        "collective_bytes": sum(collective.bytes for collective in usual),
        "collectives_in_branches": len(found) - len(usual),
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def main() -> None:
    """Compiles both, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--per-chip", type=int, default=32, help="examples on each chip")
    parser.add_argument("--group", type=int, default=128, help="examples that share statistics")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    devices = tpu.devices(options.topology)
    mesh = Mesh(np.array(devices), ("data",))
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "topology": options.topology,
        "chips": len(devices),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
    }
    for name, batch_norm in (("flax", nn.BatchNorm), ("normjax", nj.linen.BatchNorm)):
        results[name] = compile_step(batch_norm, mesh, options.per_chip, options.group)
        print(name, json.dumps(results[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
