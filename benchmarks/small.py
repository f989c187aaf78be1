#!/usr/bin/env python3
"""Measures the time of the import, and of compiling networks, against Flax's.

    python benchmarks/small.py

Import: milliseconds of `import normjax` in a fresh process that has imported JAX. Compilation:
seconds of CPU time to trace, lower and compile a training step of 50 layers of Dense, BatchNorm and
ReLU, and of a ResNet-50, in turns. Each is the least of some repetitions, since other work on the
machine only adds to it.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
from harness import networks, records

import normjax as nj

IMPORT = """
import time, jax, jax.numpy
start = time.perf_counter()
import normjax
print(1e3 * (time.perf_counter() - start))
"""
NORMS = {"normjax": nj.linen.BatchNorm, "flax.linen": nn.BatchNorm}


class Dense50(nn.Module):
    """50 layers of 64 features."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns a scalar."""
        for _ in range(50):
            x = nn.relu(self.norm(use_running_average=False)(nn.Dense(64, use_bias=False)(x)))
        return x.mean()


def dense50(peer: str) -> tuple[Callable, tuple]:
    """Returns a function that gives gradients, and the shapes of its arguments."""
    model, x = Dense50(NORMS[peer]), jnp.ones((128, 64))

    def gradients(variables: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            return model.apply(variables | {"params": params}, x, mutable=["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return gradients, (jax.eval_shape(model.init, jax.random.key(0), x), x)


def resnet50(peer: str) -> tuple[Callable, tuple]:
    """Returns the step of the benchmark's ResNet-50, and its arguments."""
    del peer  # which the context that this runs in has put in its place
    (network,) = [network for network in networks.suite("cpu") if network.name == "resnet50"]
    inputs, labels = networks.batch(network)
    return networks.step(network), (
        *jax.eval_shape(network.init, jax.random.key(0), inputs),
        inputs,
        labels,
    )


def seconds(made: Callable[[str], tuple[Callable, tuple]], peer: str) -> dict[str, float]:
    """Traces, lowers and compiles; returns the CPU time of each."""
    jax.clear_caches()
    with networks.normalized_by(peer):
        function, arguments = made(peer)
        times = [time.process_time()]
        traced = jax.jit(function).trace(*arguments)
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        lowered.compile()
        times.append(time.process_time())
    parts = [after - before for before, after in zip(times, times[1:], strict=False)]
    return dict(zip(("trace", "lower", "compile"), parts, strict=True)) | {
        "total": times[-1] - times[0]
    }


def least(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the least of each figure."""
    found = list(found)
    return {name: round(min(one[name] for one in found), 3) for name in found[0]}


def main() -> None:
    """Measures, writes JSON and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=records.RESULTS / "small-cpu.json")
    options = parser.parse_args()
    imported = [
        float(
            subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout
        )
        for _ in range(2 * options.rounds)
    ]
    results = records.header() | {"import_ms": round(min(imported), 1), "rows": []}
    print(f"import normjax: {results['import_ms']} ms beyond JAX")
    for made in (dense50, resnet50):
        turns = [{peer: seconds(made, peer) for peer in NORMS} for _ in range(options.rounds)]
        rows = {peer: least(turn[peer] for turn in turns) for peer in NORMS}
        results["rows"].append(
            {"name": f"compilation of {made.__name__}, seconds of CPU time", "peers": rows}
        )
        ratio = rows["normjax"]["total"] / rows["flax.linen"]["total"]
        print(f"{made.__name__}: {rows}, {ratio:.2f}x", flush=True)
        records.write(results, options.out)


if __name__ == "__main__":
    main()
