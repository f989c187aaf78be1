"""Times the inference of a ResNet before and after folding batch norm.

    python benchmarks/folding.py                  # ResNet-18, images of 32x32 pixels, on the CPU
    python benchmarks/folding.py --network resnet50 --pixels 224 --repeats 10

The two programs are `model.apply` and `normjax.deploy.fold(...).apply`. Each is compiled for each
batch size, with its variables as arguments and as constants that XLA can fold. In every repeat, all
programs run in turn.

The results are medians over the repeats, printed and written to benchmarks/results/: milliseconds
of wall time, milliseconds of CPU time on all cores (including threads that spin while they wait,
but excluding other processes), and the ratio of the source's time to the program's time in the same
repeat.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import jax  # noqa: E402 (the platform is chosen before JAX starts)
import jax.numpy as jnp  # noqa: E402
from train_resnet.resnet import STAGES, ResNet  # noqa: E402

import normjax as nj  # noqa: E402

WARM_UP = 2


class Times(NamedTuple):
    """Wall time and CPU time of a run, in seconds."""

    clock: float
    work: float


def random_statistics(path: Any, leaf: jax.Array) -> jax.Array:
    """Draws statistics, scales and biases as after training, so that no layer is the identity."""
    key = jax.random.fold_in(jax.random.key(1), zlib.crc32(jax.tree_util.keystr(path).encode()))
    name = path[-1].key
    if name in ("var", "scale"):
        return jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
    return leaf if name == "kernel" else 0.1 * jax.random.normal(key, leaf.shape)


def programs(
    infer: Callable, variables: Any, folded: nj.deploy.Folded, x: jax.Array
) -> dict[str, Callable]:
    """Compiles the programs for inputs like x."""
    runs = {}
    for name, apply, own in (
        ("source", infer, variables),
        ("folded", folded.apply, folded.variables),
    ):
        runs[name] = functools.partial(jax.jit(apply).lower(own, x).compile(), own)
        runs[f"{name}, constants"] = jax.jit(functools.partial(apply, own)).lower(x).compile()
    return runs


def timed(runs: dict[str, Callable], x: jax.Array, repeats: int) -> dict[str, list[Times]]:
    """Returns the times of each repeat, by program."""
    seen: dict[str, list[Times]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(-WARM_UP, repeats):
        for i in range(len(names)):
            name = names[(repeat + i) % len(names)]
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(runs[name](x))
            if repeat >= 0:
                seen[name].append(
                    Times(time.perf_counter() - start[0], time.process_time() - start[1])
                )
    return seen


def _source(name: str) -> str:
    return name.replace("folded", "source")


def rows(seen: dict[str, list[Times]], batch: int) -> list[dict]:
    found = []
    for name in seen:
        row: dict[str, Any] = {"program": name, "batch": batch}
        for kind in Times._fields:
            own, source = (
                [getattr(each, kind) for each in seen[program]] for program in (name, _source(name))
            )
            row |= {f"{kind}_ms": 1e3 * statistics.median(own), f"{kind}_ms_least": 1e3 * min(own)}
            row[f"{kind}_speedup"] = statistics.median(
                a / b for a, b in zip(source, own, strict=True)
            )
        found.append(row)
    return found


def measure(args: argparse.Namespace) -> dict:
    model = ResNet(args.network, 64, 1000, dtype=jnp.float32)
    infer = functools.partial(model.apply, train=False)
    key, of = jax.random.key(0), (args.pixels, args.pixels, 3)
    variables = jax.jit(functools.partial(model.init, train=False))(key, jnp.zeros((1, *of)))
    variables = jax.tree.map_with_path(random_statistics, variables)
    folded = nj.deploy.fold(infer, variables, jax.random.normal(key, (2, *of)), show=False)
    found = []
    for batch in args.batches:
        x = jax.random.normal(key, (batch, *of))
        found += rows(timed(programs(infer, variables, folded, x), x, args.repeats), batch)
    count = sum(each.kernel is not None for each in folded.found)
    return {
        "rows": found,
        "folded": count,
        "batch_norms": len(folded.found),
        "relative_error": folded.error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=STAGES, default="resnet18")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    result = {"arguments": vars(args), "jax": jax.__version__, "python": platform.python_version()}
    result |= {
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
    result |= {"load_before": os.getloadavg()[0]} | measure(args)
    path = (
        ROOT
        / "benchmarks"
        / "results"
        / f"folding-{args.network}-{args.pixels}-{jax.default_backend()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n")
    error = result["relative_error"]
    print(f"{result['folded']} of {result['batch_norms']} folded, relative error {error:.1e}")
    for row in result["rows"]:
        figures = (
            f"{kind} {row[f'{kind}_ms']:9.2f} ms {row[f'{kind}_speedup']:.2f}x"
            for kind in Times._fields
        )
        print(f"batch {row['batch']:4}  {row['program']:18}", *figures)
    print(path)


if __name__ == "__main__":
    main()
