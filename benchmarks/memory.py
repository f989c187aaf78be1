"""Measures the memory of training: a ResNet-50 step compiled for a TPU chip, and single layers.

Nothing runs, so no TPU is needed. For the step, the temporary bytes and the bytes accessed are
those of the compiled program. For layers, they are the bytes that a `jax.vjp` of convolution, norm,
activation and convolution stores. One compilation takes minutes.

    pip install -e '.[bench]'
    python benchmarks/memory.py --out benchmarks/results/memory-v5e-1.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import optax
import pod
import static
import tpu
from harness import records

import normjax as nj

BATCH = 64
STEM = nj.remat_policy(recompute=lambda x: x.shape[1:3] == (112, 112))
STEPS: dict[str, tuple[Any, Callable[..., bool] | None]] = {
    "flax": (nn.BatchNorm, None),
    "normjax": (nj.linen.BatchNorm, None),
    "normjax, remat_policy()": (nj.linen.BatchNorm, nj.remat_policy()),
    "normjax, remat_policy(recompute=stem)": (nj.linen.BatchNorm, STEM),
}


def training_step(
    batch_norm: Any, policy: Callable[..., bool] | None
) -> tuple[Any, tuple[Any, ...]]:
    """Returns one step of SGD with momentum on a ResNet-50, and the shapes of its arguments."""
    model = pod.ResNet50(
        lambda **settings: batch_norm(**settings | {"axis_name": None, "axis_index_groups": None}),
        None,
    )
    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(
        params: Any, batch_stats: Any, state: Any, images: jax.Array, labels: jax.Array
    ) -> Any:
        def network(params: Any, images: jax.Array) -> Any:
            return model.apply(
                {"params": params, "batch_stats": batch_stats}, images, mutable=["batch_stats"]
            )

        def loss(params: Any) -> Any:
            lean = network if policy is None else jax.checkpoint(network, policy=policy)
            logits, updates = lean(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates[
                "batch_stats"
            ]

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), new, state, value

    images = jax.ShapeDtypeStruct((BATCH, 224, 224, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    state = jax.eval_shape(optimizer.init, variables["params"])
    return step, (variables["params"], variables["batch_stats"], state, images, labels)


def costs_of_step(
    batch_norm: Any, policy: Callable[..., bool] | None, device: Any
) -> dict[str, Any]:
    """Compiles the step for the device, and returns its costs."""
    step, arguments = training_step(batch_norm, policy)
    start = time.perf_counter()
    compiled: Any = (
        jax.jit(step, donate_argnums=(0, 1, 2)).lower(*static.on(device, arguments)).compile()
    )
    accessed = compiled.cost_analysis()["bytes accessed"]
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "bytes_accessed": accessed,
        "bytes_accessed_branches_not_taken": accessed - hlo.bytes_in_branches(compiled),
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def convolution(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """A 1x1 convolution, from and to NHWC."""
    return jnp.einsum("...i,io->...o", x, kernel)


def two_layers(name: str) -> Callable[..., jax.Array]:
    """Returns (convolution, batch norm, leaky ReLU) and a convolution, in one of three variants."""

    def norm(scale: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
        if name == "flax":
            layer = nn.BatchNorm(use_running_average=False, dtype=x.dtype)
            start = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": start}
            y, _ = layer.apply(variables, x, mutable=["batch_stats"])
            return nn.leaky_relu(y)
        params, (_, batch_stats) = {"scale": scale, "bias": bias}, nj.batch_norm_init(x.shape[-1])
        if name == "activated_batch_norm":
            return nj.activated_batch_norm(params, batch_stats, x, True)[0]
        return nn.leaky_relu(nj.batch_norm(params, batch_stats, x, True)[0])

    def network(
        kernels: tuple[jax.Array, jax.Array], scale: jax.Array, bias: jax.Array, x: jax.Array
    ) -> jax.Array:
        return convolution(kernels[1], norm(scale, bias, convolution(kernels[0], x)))

    return network


def kept_bytes(network: Callable[..., jax.Array], shape: tuple[int, ...], dtype: Any) -> int:
    """Returns the bytes stored for a network's backward pass, without the network's arguments."""
    features = shape[-1]
    kernel, vector = (
        jax.ShapeDtypeStruct((features, features), dtype),
        jax.ShapeDtypeStruct((features,), jnp.float32),
    )
    given = ((kernel, kernel), vector, vector, jax.ShapeDtypeStruct(shape, dtype))
    kept = jax.tree.leaves(
        jax.eval_shape(lambda *given: jax.vjp(jax.jit(network), *given)[1], *given)
    )
    return _bytes(kept) - _bytes([kernel, kernel, given[-1]])


def _bytes(leaves: list[Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def main() -> None:
    """Prints the figures, row by row, and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=list(STEPS), nargs="*", default=list(STEPS), help="which steps to compile"
    )
    parser.add_argument("--topology", default="v5e:2x2", help="one chip of it is compiled for")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    device = tpu.devices(options.topology)[0]
    results = records.header() | {
        "topology": f"one chip of {options.topology}",
        "batch": BATCH,
        "kept": {},
        "steps": {},
    }
    shape = (BATCH, 56, 56, 64)
    for name in ("flax", "batch_norm", "activated_batch_norm"):
        kept = {
            str(jnp.dtype(dtype)): kept_bytes(two_layers(name), shape, dtype)
            for dtype in (jnp.float32, jnp.bfloat16)
        }
        results["kept"][name] = kept
        print(name, json.dumps(kept), flush=True)
    for name in options.only:
        results["steps"][name] = costs_of_step(*STEPS[name], device)
        print(name, json.dumps(results["steps"][name]), flush=True)
        if options.out:  # after each row, since the next row takes minutes
            options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
