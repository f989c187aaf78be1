#!/usr/bin/env python3
"""Compares ways to write the variance of batch normalization and its derivative.

    python benchmarks/formulations.py                 times on this machine's CPU
    python benchmarks/formulations.py --tpu v5e:2x2   bytes and collectives; needs no TPU
    python benchmarks/formulations.py --tpu v5e:16x16 --chips 256

The program has two conv-BN-ReLU layers and their mean (CPU times are for the layer alone). It is
compiled for a TPU but not run, so the figures have no noise. `bytes` counts branches of
conditionals as always taken. The row `guard, branch emptied` is the same program with an empty
branch, which shows the cost of a step that does not take the branch. It writes a JSON file to
benchmarks/results/ and prints the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import tpu
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax as nj

AXES, EPSILON = (0, 1, 2), 1e-5
RESULTS = pathlib.Path(__file__).parent / "results"
Layer = Callable[..., tuple[jax.Array, Any]]


def unsafe(x, shift):
    """E[x^2] - E[x]^2, as in Flax."""
    del shift
    x = x.astype(jnp.float32)
    mean = x.mean(AXES)
    return mean, jnp.maximum(0, (x * x).mean(AXES) - mean * mean)


def two_passes(x, shift):
    """E[(x - E[x])^2]."""
    del shift
    x = x.astype(jnp.float32)
    mean = x.mean(AXES)
    return mean, ((x - mean) ** 2).mean(AXES)


def shifted(x, shift):
    """One pass around a shift."""
    centered = x.astype(jnp.float32) - shift
    offset = centered.mean(AXES)
    return shift + offset, jnp.maximum(0, (centered * centered).mean(AXES) - offset * offset)


def shifted_by_first(x, shift):
    """One pass around the first element, a shift that depends on the data."""
    del shift
    return shifted(x, lax.stop_gradient(x[0, 0, 0].astype(jnp.float32)))


def guard(x, shift, second_pass):
    """One pass around the running mean, and a second one in a branch if the first one cancelled."""
    mean, var = shifted(x, shift)
    cancelled = jnp.any(~((mean - shift) ** 2 <= 64 * (var + EPSILON)))
    return lax.cond(cancelled, second_pass, lambda x, first: first, x, (mean, var))


def guarded(x, shift):
    """The guard, unchanged."""
    return guard(x, shift, lambda x, first: shifted(x, first[0]))


def emptied(x, shift):
    """The guard, with a branch that only reads one element."""
    return guard(x, shift, lambda x, first: (first[0] + x[0, 0, 0, 0], first[1]))


def normalize(x, mean, var, scale, bias):
    return ((x.astype(jnp.float32) - mean) * (scale * lax.rsqrt(var + EPSILON)) + bias).astype(
        x.dtype
    )


def with_moments(moments) -> Layer:
    def layer(x, shift, scale, bias):
        mean, var = moments(x, lax.stop_gradient(shift))
        return normalize(x, mean, var, scale, bias), (mean, var)

    return layer


def jvp_of_moments(moments) -> Callable:
    """Moments with a derivative rule that does not depend on shifts and branches."""
    rule = jax.custom_jvp(moments)

    @rule.defjvp
    def _(primals, tangents):
        x, shift = primals
        mean, var = rule(x, shift)
        dx = tangents[0].astype(jnp.float32)
        return (mean, var), (dx.mean(AXES), 2 * ((x.astype(jnp.float32) - mean) * dx).mean(AXES))

    return rule


def vjp_of_layer(moments) -> Layer:
    """The layer with a hand-written backward pass, without forward mode or second order."""

    @jax.custom_vjp
    def layer(x, shift, scale, bias):
        mean, var = moments(x, shift)
        return normalize(x, mean, var, scale, bias), (mean, var)

    def forward(x, shift, scale, bias):
        y, (mean, var) = layer(x, shift, scale, bias)
        return (y, (mean, var)), (x, mean, var, scale)

    def backward(kept, cotangents):
        x, mean, var, scale = kept
        g = cotangents[0].astype(jnp.float32)
        inverse, centered, n = (
            lax.rsqrt(var + EPSILON),
            x.astype(jnp.float32) - mean,
            x.size // x.shape[-1],
        )
        d_bias, projection = g.sum(AXES), (g * centered).sum(AXES)
        dx = scale * inverse * (g - d_bias / n - centered * (inverse**2 * projection / n))
        return dx.astype(x.dtype), jnp.zeros_like(mean), projection * inverse, d_bias

    layer.defvjp(forward, backward)
    return layer


def normjax_layer(x, shift, scale, bias):
    running = {"mean": shift, "var": jnp.ones_like(shift)}
    return nj.batch_norm({"scale": scale, "bias": bias}, running, x, train=True)


LAYERS: dict[str, Layer] = {
    "E[x^2] - E[x]^2 (Flax)": with_moments(unsafe),
    "two passes": with_moments(two_passes),
    "shift: first element": with_moments(shifted_by_first),
    "shift: running mean, no guard": with_moments(shifted),
    "guard, branch emptied, custom_jvp": with_moments(jvp_of_moments(emptied)),
    "guard, plain autodiff": with_moments(guarded),
    "guard, custom_jvp of moments": with_moments(jvp_of_moments(guarded)),
    "guard, custom_vjp of the layer": vjp_of_layer(guarded),
    "normjax.batch_norm": normjax_layer,
}


def network(layer: Layer) -> Callable:
    """Two conv-BN-ReLU layers; returns their mean and the new statistics."""

    def apply(params, shifts, x):
        seen = []
        for (kernel, scale, bias), shift in zip(params, shifts, strict=True):
            x = lax.conv_general_dilated(
                x,
                kernel.astype(x.dtype),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x, moments = layer(x, shift, scale, bias)
            seen.append(moments)
            x = jax.nn.relu(x)
        return x.astype(jnp.float32).mean(), seen

    return apply


def programs(layer: Layer) -> dict[str, Callable]:
    apply = network(layer)
    return {
        "forward": apply,
        "forward+backward": jax.value_and_grad(apply, argnums=(0, 2), has_aux=True),
    }


def shapes(batch: int, size: int, channels: int, dtype, whole=None, split=None) -> tuple:
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=whole)
    params = [(of((3, 3, channels, channels)), of((channels,)), of((channels,)))] * 2
    x = jax.ShapeDtypeStruct((batch, size, size, channels), dtype, sharding=split)
    return params, [of((channels,))] * 2, x


def compiled_figures(args: argparse.Namespace, dtype) -> list[dict]:
    mesh = Mesh(np.array(tpu.devices(args.tpu)[: args.chips]), ("data",))
    whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    operands = shapes(args.batch * args.chips, args.size, args.channels, dtype, whole, split)
    rows = []
    for name, layer in LAYERS.items():
        for mode, program in programs(layer).items():
            compiled: Any = jax.jit(program).lower(*operands).compile()
            rows.append(
                {
                    "layer": name,
                    "mode": mode,
                    "dtype": jnp.dtype(dtype).name,
                    "bytes": compiled.cost_analysis()["bytes accessed"],
                    "temporary bytes": compiled.memory_analysis().temp_size_in_bytes,
                    "all-reduces": len(hlo.collectives(compiled)),
                }
            )
    return rows


def timed_figures(args: argparse.Namespace, dtype) -> list[dict]:
    """Medians of interleaved runs of the layer alone, so that drift affects all alike."""
    shape = (args.batch, args.size, args.size, args.channels)
    x, g = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in (0, 1))
    features = jnp.ones(args.channels)
    operands = (x, x[0, 0, 0].astype(jnp.float32), features, features)
    runs: dict[tuple[str, str], Callable] = {}
    for name, layer in LAYERS.items():
        runs[name, "forward"] = jax.jit(layer)
        runs[name, "forward+backward"] = jax.jit(
            lambda *operands, layer=layer: jax.vjp(lambda *o: layer(*o)[0], *operands)[1](g)
        )
    times = {key: [] for key in runs}
    for repeat in range(args.repeats + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            if repeat:
                times[key].append(1e3 * (time.perf_counter() - start))
    return [
        {"layer": name, "mode": mode, "dtype": jnp.dtype(dtype).name, "ms": statistics.median(seen)}
        for (name, mode), seen in times.items()
    ]


def print_table(rows: list[dict], columns: list[str]) -> None:
    print("| layer | mode | dtype |" + "".join(f" {column} | x Flax |" for column in columns))
    print("|---|---|---|" + "---:|---:|" * len(columns))
    base = {(row["mode"], row["dtype"]): row for row in rows if "Flax" in row["layer"]}
    for row in rows:
        reference = base[row["mode"], row["dtype"]]
        cells = "".join(
            f" {row[c]:,.4g} | {row[c] / max(reference[c], 1e-9):.3f} |" for c in columns
        )
        print(f"| {row['layer']} | {row['mode']} | {row['dtype']} |{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tpu", help="a topology to compile for, such as v5e:2x2 or v5e:16x16")
    parser.add_argument("--chips", type=int, default=1, help="how many of its chips")
    parser.add_argument("--batch", type=int, default=32, help="examples for each chip")
    parser.add_argument("--size", type=int, default=56, help="height and width")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    figures = compiled_figures if args.tpu else timed_figures
    rows = [row for dtype in (jnp.bfloat16, jnp.float32) for row in figures(args, dtype)]
    print_table(rows, ["bytes", "temporary bytes", "all-reduces"] if args.tpu else ["ms"])
    where = f"tpu-{args.tpu.replace(':', '-')}-{args.chips}" if args.tpu else "cpu"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"formulations-{where}.json"
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    path.write_text(
        json.dumps(
            {"arguments": vars(args), "jax": jax.__version__, **machine, "rows": rows}, indent=1
        )
        + "\n"
    )
    print(f"\nWritten to {path}")


if __name__ == "__main__":
    main()
