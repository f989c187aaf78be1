#!/usr/bin/env python3
"""Compiles layers and training steps for a TPU, and reads their costs off the programs.

    pip install -e '.[bench]'
    python benchmarks/static.py                                       # minutes; one chip
    python benchmarks/static.py --only resnet50 --peers normjax flax.linen

JAX compiles ahead of time by libtpu's compiler, on any x86-64 machine. The first table shows bytes
accessed / temporary bytes in MB, collectives, and seconds to compile. Bytes accessed are XLA's
count, which takes every branch as taken: the second pass of normjax's batch norm, which runs only
where the first one cancelled, is in them.

The second table shows the cycles, in thousands, that the compiler expects of a run, and their ratio
to normjax's. It writes an estimate into each fusion, with the time that memory needs. Branches that
are not taken are counted apart, as untaken (`hlo.estimated_cycles`). It is the compiler's own cost
model, and no clock: good for one program beside another.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import hlo
import jax
import tpu
from harness import networks, peers, programs, records
from harness.cases import Case, storage, suite
from jax.sharding import SingleDeviceSharding

LAYERS = ("256x56x56x256", "8x2048x4096", "256x197x768", "64x56x56x256")


def main() -> None:
    """Compiles all rows for all peers, writes JSON and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:2x2", help="its first chip is compiled for")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=networks.PEERS,
        default=["normjax", "flax.linen"],
        metavar="PEER",
    )
    parser.add_argument("--suite", choices=["tiny", "tpu"], default="tpu")
    parser.add_argument(
        "--out", type=pathlib.Path, help="default: benchmarks/results/static-TOPOLOGY.json"
    )
    options = parser.parse_args()
    device = tpu.devices(options.topology)[0]
    rows = [
        (case.name, lambda peer, case=case: layer(case, peer, device))
        for case in cases(options.suite)
    ]
    rows += [
        (f"{network.title} step", lambda peer, network=network: step(network, peer, device))
        for network in networks.suite(options.suite)
    ]
    results = records.header() | {"topology": options.topology}
    rows = [(name, compiled) for name, compiled in rows if options.only in name]
    if not rows:
        parser.error(f"no row has {options.only!r} in its name")
    out = options.out or records.RESULTS / f"static-{options.topology.replace(':', '-')}.json"
    results["rows"] = []
    for name, compiled in rows:
        results["rows"].append(
            {"name": name, "peers": {peer: costs(compiled, peer) for peer in options.peers}}
        )
        records.write(results, out)  # at once: a network takes minutes to compile
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], cell) + "\n")
    print(records.peer_table(results["rows"], cell_of_cycles) + "\n")
    print("\n".join(means(results["rows"], options.peers)))


def cases(name: str) -> list[Case]:
    """Returns the layers' rows: the GPU suite's, at one shape of each network."""
    found = suite("tiny" if name == "tiny" else "gpu")
    return (
        found
        if name == "tiny"
        else [case for case in found if "x".join(map(str, case.shape)) in LAYERS]
    )


def layer(case: Case, peer: str, device: Any) -> Any:
    """Returns the lowered program of a layer, as it is timed elsewhere."""
    if peer == "none":
        raise peers.Unable("no layer, no row")
    leaves = [
        name for name in ("scale", "bias", "mean", "var") if (case.layer, name) != ("rms", "bias")
    ]
    arrays = (
        ["x"]
        + ["cotangent"] * (case.mode == "forward+backward")
        + ["residual"] * (case.then == "add+relu")
    )
    shapes = {name: jax.ShapeDtypeStruct((case.features,), "float32") for name in leaves}
    shapes |= {name: jax.ShapeDtypeStruct(case.shape, storage(case.dtype)) for name in arrays}
    run, operands = programs.traceable(peer, case, shapes)
    return jax.jit(run).lower(*on(device, operands))


def step(network: networks.Network, peer: str, device: Any) -> Any:
    """Returns the lowered program of a network's training step."""
    inputs, labels = networks.batch(network)
    with networks.normalized_by(peer):
        state = jax.eval_shape(network.init, jax.random.key(0), inputs)
        operands = on(device, (*state, *jax.eval_shape(lambda *given: given, inputs, labels)))
        return jax.jit(networks.step(network), donate_argnums=(0, 1)).lower(*operands)


def on(device: Any, tree: Any) -> Any:
    """Returns shapes on the device."""
    place = SingleDeviceSharding(device)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
    )


def costs(lowered: Callable[[str], Any], peer: str) -> dict[str, Any]:
    """Compiles and returns what the program costs."""
    try:
        program = lowered(peer)
    except ImportError as error:
        return {"skipped": f"not installed: {error}"}
    except peers.Unable as error:
        return {"skipped": f"unable: {error}"}
    start = time.perf_counter()
    compiled = program.compile()
    seconds = round(time.perf_counter() - start, 2)
    cycles = hlo.estimated_cycles(compiled.as_text())
    estimate = {"": cycles.taken, "_untaken": cycles.untaken} if cycles else {}
    return {
        "compile_seconds": seconds,
        **{f"estimated_cycles{which}": count for which, count in estimate.items()},
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
        "collectives": len(hlo.collectives(compiled)),
        **programs.compiled_memory(compiled),
    }


def cell(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Says in a cell what a program costs."""
    moved, temporary = got["bytes_accessed"] / 1e6, got["temporary_bytes"] / 1e6
    return (
        f"{moved:,.5g} / {temporary:,.4g} MB, {got['collectives']}, {got['compile_seconds']:.3g} s"
    )


def cell_of_cycles(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell: a program's estimated cycles, in thousands, and their ratio to normjax's."""
    if "estimated_cycles" not in got:
        return "-"
    taken, untaken = got["estimated_cycles"], got["estimated_cycles_untaken"]
    branches = f" + {untaken / 1e3:,.5g} untaken" if untaken else ""
    own = row["peers"].get("normjax", {}).get("estimated_cycles")
    ratio = f" ({taken / own:.3f}x)" if own and got is not row["peers"]["normjax"] else ""
    return f"{taken / 1e3:,.6g}{branches}{ratio}"


def means(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Says for each peer the geometric mean of the ratios of its cycles to normjax's."""
    lines = []
    for name in names:
        pairs = [
            (row["peers"][name]["estimated_cycles"], row["peers"]["normjax"]["estimated_cycles"])
            for row in rows
            if all("estimated_cycles" in row["peers"].get(each, {}) for each in (name, "normjax"))
        ]
        if name != "normjax" and pairs:
            mean = math.exp(sum(math.log(other / own) for other, own in pairs) / len(pairs))
            lines.append(f"{name}: {mean:.3f}x of normjax's cycles, the mean of {len(pairs)} rows")
    return lines


if __name__ == "__main__":
    main()
