#!/usr/bin/env python3
"""Measures the overhead of a batch norm: tracing, equations, eager calls and compilation.

    python benchmarks/overhead.py                       # a minute
    python benchmarks/overhead.py --counts              # seconds: counts only, always the same
    python benchmarks/overhead.py --json FILE           # for benchmarks/compare.py

All figures are for one layer in training mode, on a float32 array of 16x8x8x4.

These are counted while `jax.make_jaxpr` traces the layer, with empty caches of JAX and the library:
  calls        calls of Python functions (`sys.setprofile`) in the layer's own files: the package
               normjax, or Flax's file of normalization layers. A generator expression counts each
               time that it is resumed, so the count grows with the rank of x.
  first sum    the calls before the first sum over x.
  functions    the distinct functions that were called, as pairs of file and name.
  files        the distinct files.
  climbs       calls at a higher level right after a call at a lower level. The levels are
               adapters; layers and weights; platforms and kernels; statistics. Modules that all
               of them use, such as checks, are excluded.
  around       calls in the rest of Flax, which its modules make before and after the layer.
  again        calls for a second layer of the same shape in the same function.
  equations    equations of the jaxpr, including nested jaxprs (jit, cond, custom derivatives), and
               without them in brackets: forward, and with the gradients of scale, bias and x.

These are timed, with all programs interleaved:
  eager        microseconds of a call outside jit, as CPU time of all threads and wall time. These
               are medians over rounds; each round waits for its results once, at the end.
  compilation  seconds of CPU time to trace, lower and compile a training step of 50 layers of
               Dense, BatchNorm and ReLU (benchmarks/small.py), as the minimum over rounds.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import flax.linen
import jax
import small
from flax import nnx
from harness import records, tracing

import normjax as nj

SHAPE = (16, 8, 8, 4)
Apply = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]


class Subject(NamedTuple):
    """A layer: a pure function, an eager call, and the location of its code."""

    own: pathlib.Path
    function: Apply
    eager: Callable[[], Any]


def subjects() -> dict[str, Subject]:
    """Returns the layers by name."""
    return {
        "normjax.batch_norm": _function(),
        "normjax.linen.BatchNorm": _linen(nj.linen.BatchNorm, tracing.NORMJAX),
        "normjax.nnx.BatchNorm": _nnx(nj.nnx.BatchNorm, tracing.NORMJAX),
        "flax.linen.BatchNorm": _linen(
            flax.linen.BatchNorm, tracing.FLAX / "linen" / "normalization.py"
        ),
        "flax.nnx.BatchNorm": _nnx(nnx.BatchNorm, tracing.FLAX / "nnx" / "nn" / "normalization.py"),
    }


def _function() -> Subject:
    def function(params: Any, batch_stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return nj.batch_norm(params, batch_stats, x, train=True)

    operands = _operands()
    return Subject(tracing.NORMJAX, function, lambda: function(*operands))


def _linen(norm: Any, own: pathlib.Path) -> Subject:
    layer = norm(use_running_average=False)

    def function(params: Any, batch_stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    operands = _operands()
    return Subject(own, function, lambda: function(*operands))


def _nnx(norm: Any, own: pathlib.Path) -> Subject:
    layer = norm(SHAPE[-1], rngs=nnx.Rngs(0))
    graph = nnx.split(layer)[0]
    _, _, x = _operands()

    def function(params: Any, batch_stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        variables = {name: nnx.Param(value) for name, value in params.items()}
        kept = {name: nnx.BatchStat(value) for name, value in batch_stats.items()}
        merged = nnx.merge(graph, nnx.State(variables | kept))
        y = merged(x)
        return y, nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat))

    return Subject(own, function, lambda: (layer(x), layer.mean[...], layer.var[...]))


@cache
def _operands() -> tuple[Any, Any, jax.Array]:
    params, batch_stats = nj.batch_norm_init(SHAPE[-1])
    return params, batch_stats, jax.random.normal(jax.random.key(0), SHAPE)


def counts(subject: Subject) -> dict[str, int]:
    """Returns the figures of a layer that do not depend on the machine."""
    walk = first_walk(subject)
    files = {code.co_filename for code in walk.own}
    forward, backward = (
        tracing.equations(tracing.traced(function, *_operands()).jaxpr)
        for function in (subject.function, _with_gradients(subject.function))
    )
    return {
        "calls": len(walk.own),
        "calls_before_first_sum": walk.before_first_sum,
        "functions": len({(code.co_filename, code.co_name) for code in walk.own}),
        "files": len(files),
        "climbs": tracing.climbs(pathlib.Path(code.co_filename) for code in walk.own),
        "calls_around": walk.around,
        "calls_again": len(second_walk(subject).own),
        "equations": forward[0],
        "equations_outermost": forward[1],
        "equations_with_gradients": backward[0],
        "equations_with_gradients_outermost": backward[1],
    }


def first_walk(subject: Subject) -> tracing.Walk:
    """Traces a layer with all caches empty."""
    operands = _operands()
    tracing.empty_caches()
    return tracing.watched(subject.own, lambda: tracing.traced(subject.function, *operands))


def second_walk(subject: Subject) -> tracing.Walk:
    """Traces a layer twice in one function, and records the second trace."""
    walks = []

    def network(params: Any, batch_stats: Any, x: jax.Array) -> jax.Array:
        y, _ = subject.function(params, batch_stats, x)
        walks.append(tracing.watched(subject.own, lambda: subject.function(params, batch_stats, y)))
        return y

    operands = _operands()
    tracing.empty_caches()
    tracing.traced(network, *operands)
    return walks[0]


def _with_gradients(function: Apply) -> Callable[..., Any]:
    def run(params: Any, batch_stats: Any, x: jax.Array) -> Any:
        y, backward, new = jax.vjp(
            lambda params, x: function(params, batch_stats, x), params, x, has_aux=True
        )
        return y, new, backward(x)  # x stands for the gradient of y

    return run


def eager(found: dict[str, Subject], rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Returns the microseconds of a call outside jit, as medians over interleaved rounds."""
    for each in found.values():
        _of_a_call(each.eager, 1)  # compiles the operations of a call
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(found), len(found)):
            seen[name].append(_of_a_call(found[name].eager, calls))
    medians = {}
    for name, times in seen.items():
        cpu, wall = (statistics.median(clock) for clock in zip(*times, strict=True))
        medians[name] = {"eager_cpu_us": cpu, "eager_us": wall}
    return medians


def _of_a_call(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    result = jax.block_until_ready(call())
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    taken = time.process_time() - cpu, time.perf_counter() - wall
    return 1e6 * taken[0] / calls, 1e6 * taken[1] / calls


def compilation(rounds: int) -> dict[str, dict[str, float]]:
    """Returns the seconds of CPU time to compile 50 layers, interleaved."""
    turns = [
        {peer: small.seconds(small.dense50, peer) for peer in small.NORMS} for _ in range(rounds)
    ]
    found = {peer: small.least(turn[peer] for turn in turns) for peer in small.NORMS}
    for figures in found.values():
        figures["ratio"] = figures["total"] / found["flax.linen"]["total"]
    return found


def shown(rows: list[dict[str, Any]]) -> str:
    """Returns the tables."""
    head = ["", "calls", "first sum", "functions", "files", "climbs", "around", "again"]
    head += ["equations", "with gradients"]
    timed = "eager_us" in rows[0]["peers"]["normjax.batch_norm"]
    head += ["eager us, CPU", "wall"] if timed else []
    tables = [records.table(head, [_cells(*item) for item in rows[0]["peers"].items()])]
    for row in rows[1:]:
        parts = ["trace", "lower", "compile", "total"]
        cells = [
            [peer, *(f"{got[part]:.3g}" for part in parts), f"{got['ratio']:.3f}x"]
            for peer, got in row["peers"].items()
        ]
        tables.append(records.table([row["name"], *parts, "of Flax"], cells))
    return "\n\n".join(tables)


def _cells(name: str, got: dict[str, Any]) -> list[str]:
    counted = ("calls", "calls_before_first_sum", "functions", "files", "climbs")
    cells = [str(got[figure]) for figure in (*counted, "calls_around", "calls_again")]
    for figure in ("equations", "equations_with_gradients"):
        cells.append(f"{got[figure]} ({got[f'{figure}_outermost']})")
    cells += [f"{got[clock]:.0f}" for clock in ("eager_cpu_us", "eager_us") if clock in got]
    return [name, *cells]


def main() -> None:
    """Counts, measures and prints; writes JSON if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", action="store_true", help="no times")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=200, help="eager ones in a round")
    parser.add_argument("--compilations", type=int, default=5, help="rounds of 50 layers; or 0")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    found = subjects()
    peers: dict[str, dict[str, Any]] = {name: counts(each) for name, each in found.items()}
    name = f"batch norm, training, {'x'.join(map(str, SHAPE))} float32"
    results = records.header() | {"rows": [{"name": name, "peers": peers}]}
    if not options.counts:
        for name, times in eager(found, options.rounds, options.calls).items():
            peers[name].update(times)
        if options.compilations:
            name = "compilation of 50 layers, seconds of CPU time"
            results["rows"].append({"name": name, "peers": compilation(options.compilations)})
    if options.json:
        records.write(results, options.json)
    print(shown(results["rows"]))


if __name__ == "__main__":
    main()
