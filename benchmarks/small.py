#!/usr/bin/env python3
"""Measures import, compilation of networks, and batch norms over seeds, against Flax.

    python benchmarks/small.py
    python benchmarks/small.py --only bit26 seeds

Import: milliseconds of `import normjax` in a new process that has imported JAX. Compilation:
seconds of CPU time to trace, lower and compile a training step of 50 layers of Dense, BatchNorm and
ReLU, of a ResNet-50, a ResNet-18, and a BiT of 26 layers with group norm and weight
standardization, in turns; and the characters and operations of its StableHLO. Each is the minimum
over repetitions, since other work on the machine only increases it. Seeds: milliseconds of a batch
norm under `jax.vmap` over 16 seeds, as in benchmarks/layers.py: medians, and the median ratio.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
from harness import bit, networks, records, timing

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
    """Returns a function that returns gradients, and the shapes of its arguments."""
    model, x = Dense50(NORMS[peer]), jnp.ones((128, 64))

    def gradients(variables: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            return model.apply(variables | {"params": params}, x, mutable=["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return gradients, (jax.eval_shape(model.init, jax.random.key(0), x), x)


def resnet(name: str, peer: str) -> tuple[Callable, tuple]:
    """Returns the step of one of the benchmark's ResNets, and its arguments."""
    del peer  # replaced by the context in which this runs
    (network,) = [network for network in networks.suite("cpu") if network.name == name]
    inputs, labels = networks.batch(network)
    return networks.step(network), (
        *jax.eval_shape(network.init, jax.random.key(0), inputs),
        inputs,
        labels,
    )


def bit26(peer: str) -> tuple[Callable, tuple]:
    """Returns a function that returns gradients of a BiT, and its arguments."""
    model, x = bit.BiT26(peer, networks.CLASSES), jnp.ones((4, 64, 64, 3))
    labels = jnp.zeros(4, jnp.int32)

    def gradients(variables: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(variables: Any) -> Any:
            logits: Any = model.apply(variables, x)
            return networks.cross_entropy(logits, labels)

        return jax.value_and_grad(loss)(variables)

    return gradients, (jax.eval_shape(model.init, jax.random.key(0), x), x, labels)


NETWORKS = {
    "dense50": dense50,
    "resnet50": partial(resnet, "resnet50"),
    "resnet18": partial(resnet, "resnet18"),
    "bit26": bit26,
}


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
        text = lowered.as_text()
    parts = [after - before for before, after in zip(times, times[1:], strict=False)]
    return dict(zip(("trace", "lower", "compile"), parts, strict=True)) | {
        "total": times[-1] - times[0],
        "characters": len(text),
        "operations": len(re.findall(r"\bstablehlo\.|\bchlo\.|\bcall @", text)),
    }


def least(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the minimum of each figure."""
    found = list(found)
    return {name: round(min(one[name] for one in found), 3) for name in found[0]}


SEEDS = 16


def over_seeds(peer: str, shape: tuple[int, ...], backward: bool) -> timing.Program:
    """Returns a compiled batch norm in training under vmap over seeds."""
    layer = NORMS[peer](use_running_average=False)
    variables = jax.vmap(layer.init, (0, None))(
        jax.random.split(jax.random.key(0), SEEDS), jnp.ones(shape)
    )
    x, y_dot = jax.random.normal(jax.random.key(0), (2, SEEDS, *shape))

    def run(variables: Any, x: jax.Array, y_dot: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> Any:
            return layer.apply(variables | {"params": params}, x, mutable=["batch_stats"])

        if not backward:
            return forward(variables["params"], x)
        y, transposed, new = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, new, transposed(y_dot)

    compiled = jax.jit(jax.vmap(run)).lower(variables, x, y_dot).compile()
    return timing.Program(lambda: compiled(variables, x, y_dot), jax.block_until_ready)


def seeds(rounds: int) -> Iterable[dict[str, Any]]:
    """Yields the rows of batch norms over seeds."""
    timing.keep_memory()
    for shape in ((128, 256), (1024, 256)):
        for backward in (False, True):
            programs = {peer: over_seeds(peer, shape, backward) for peer in NORMS}
            seen = timing.interleaved(programs, rounds, sample_seconds=2e-2)
            base = seen["flax.linen"]
            mode = "forward+backward" if backward else "forward"
            yield {
                "name": f"batch norm {mode} {SEEDS} seeds of {'x'.join(map(str, shape))}, ms",
                "peers": {peer: timing.summary(own, base) for peer, own in seen.items()},
            }


def compilation(name: str, rounds: int) -> dict[str, Any]:
    """Returns the row of a network."""
    made = NETWORKS[name]
    turns = [{peer: seconds(made, peer) for peer in NORMS} for _ in range(rounds)]
    rows = {peer: least(turn[peer] for turn in turns) for peer in NORMS}
    return {"name": f"compilation of {name}, seconds of CPU time", "peers": rows}


def imported(rounds: int) -> float:
    """Returns the milliseconds of the import."""
    command = [sys.executable, "-c", IMPORT]
    found = [
        float(subprocess.run(command, capture_output=True, check=True).stdout)
        for _ in range(2 * rounds)
    ]
    return round(min(found), 1)


def shown(row: dict[str, Any]) -> str:
    """Returns a line with normjax's figures, and their ratios to Flax's."""
    own, base = (row["peers"][peer] for peer in NORMS)
    if "ratio" in own:  # for interleaved times
        return f"{row['name']}: {own['ms']:.3g}, {own['ratio']:.2f}x of Flax's"
    figures = [f"{name} {own[name]:.5g} ({own[name] / base[name]:.2f}x)" for name in own]
    return f"{row['name']}: {', '.join(figures)} of Flax's"


def main() -> None:
    """Measures, writes JSON and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["import", *NETWORKS, "seeds"])
    parser.add_argument("--out", type=pathlib.Path, default=records.RESULTS / "small-cpu.json")
    options = parser.parse_args()
    chosen = options.only or ["import", *NETWORKS, "seeds"]
    results: dict[str, Any] = records.header() | {"rows": []}
    if "import" in chosen:
        results["import_ms"] = imported(options.rounds)
        print(f"import normjax: {results['import_ms']} ms beyond JAX")
    for name in chosen:
        rows: Iterable[dict[str, Any]] = []
        if name in NETWORKS:
            rows = [compilation(name, options.rounds)]
        elif name == "seeds":
            rows = seeds(3 * options.rounds)
        for row in rows:
            results["rows"].append(row)
            print(shown(row))
            records.write(results, options.out)


if __name__ == "__main__":
    main()
