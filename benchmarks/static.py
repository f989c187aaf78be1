#!/usr/bin/env python3
"""Compiles layers and training steps for a TPU, and reads their costs from the programs.

    pip install -e '.[bench]'
    python benchmarks/static.py                                       # minutes; one chip
    python benchmarks/static.py --only resnet50 --peers normjax flax.linen

JAX compiles ahead of time with libtpu's compiler, on any x86-64 machine. The first table shows
bytes accessed / temporary bytes in MB, collectives, and seconds to compile. XLA's count of bytes
accessed includes every branch, so it includes the second pass of normjax's batch norm, which only
runs if the first pass cancelled.

The second table shows the thousands of cycles that the compiler predicts for a run, and their ratio
to normjax's. The compiler writes an estimate into each fusion, including memory time. Branches that
are not taken are counted separately, as untaken (`hlo.estimated_cycles`). These are predictions of
the compiler's cost model, not measurements; use them only to compare programs.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import hlo
import jax
import tpu
from harness import networks, peers, programs, records
from harness.cases import Case, shapes, suite
from jax.sharding import SingleDeviceSharding

LAYERS = ("256x56x56x256", "8x2048x4096", "256x197x768", "64x56x56x256")


class Row(NamedTuple):
    """A row of the table: a program of each peer, and other entries in the JSON."""

    name: str
    lowered: Callable[[str], Any]  # by peer name
    about: dict[str, Any]


def main() -> None:
    """Compiles all rows for all peers, writes JSON and prints the table."""
    parser = arguments(__doc__, ["tiny", "tpu"], "tpu", networks.PEERS)
    parser.add_argument("--topology", default="v5e:2x2", help="its first chip is compiled for")
    parser.set_defaults(peers=["normjax", "flax.linen"])
    options = parser.parse_args()
    devices = tpu.devices(options.topology)
    rows = chosen(cases(options.suite), networks.suite(options.suite), devices, options.only)
    if not rows:
        parser.error(f"no row has {options.only!r} in its name")
    out = options.out or records.RESULTS / f"static-{options.topology.replace(':', '-')}.json"
    results = records.header() | {"topology": options.topology}
    run(rows, options.peers, figures, results, out)
    print(records.skipped(results["rows"]) + "\n")
    print(records.peer_table(results["rows"], cell) + "\n")
    print(records.peer_table(results["rows"], cell_of_cycles) + "\n")
    print("\n".join(means(results["rows"], options.peers)))


def arguments(
    text: str | None, suites: Sequence[str], suite: str, names: Sequence[str]
) -> argparse.ArgumentParser:
    """Returns a parser with the options of all scripts that read compiled programs."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="PEER")
    parser.add_argument("--suite", choices=suites, default=suite)
    parser.add_argument("--out", type=pathlib.Path, help="default: a file in benchmarks/results")
    return parser


def cases(name: str) -> list[Case]:
    """Returns the rows of layers: the GPU suite, at one shape of each network."""
    found = suite("tiny" if name == "tiny" else "gpu")
    return (
        found
        if name == "tiny"
        else [case for case in found if "x".join(map(str, case.shape)) in LAYERS]
    )


def chosen(
    layers: Iterable[Case], steps: Iterable[networks.Network], devices: Sequence[Any], only: str
) -> list[Row]:
    """Returns the rows of layers and of networks whose names have `only` in them."""
    rows = [
        Row(
            case.name,
            partial(layer, case, devices),
            {"case": case._asdict(), "x_bytes": case.nbytes // case.devices},
        )
        for case in layers
    ]
    rows += [Row(f"{each.title} step", partial(step, each, devices[0]), {}) for each in steps]
    return [row for row in rows if only in row.name]


def run(
    rows: Iterable[Row],
    names: Sequence[str],
    read: Callable[[Any], dict[str, Any]],
    results: dict[str, Any],
    out: pathlib.Path,
) -> None:
    """Adds rows to results, and writes each immediately, since compilation takes minutes."""
    results["rows"] = []
    for row in rows:
        found = {peer: costs(row.lowered, peer, read) for peer in names}
        results["rows"].append({"name": row.name, **row.about, "peers": found})
        records.write(results, out)


def layer(case: Case, devices: Sequence[Any], peer: str) -> Any:
    """Returns the lowered program of a layer, the same one that is timed elsewhere."""
    if peer == "none":
        raise peers.Unable("no layer, no row")
    abstract = {
        name: jax.ShapeDtypeStruct(
            programs.arranged(shape, peers.features_first(peer, case)),
            dtype,
            sharding=programs.sharding(case, devices, leaf=len(shape) == 1),
        )
        for name, (shape, dtype) in shapes(case).items()
    }
    traced, operands = programs.traceable(peer, case, abstract)
    if case.devices == 1:
        operands = on(devices[0], operands)  # also the arguments of a backward pass
    return jax.jit(traced).lower(*operands)


def step(network: networks.Network, device: Any, peer: str) -> Any:
    """Returns the lowered program of a network's training step."""
    if peer not in networks.PEERS:
        raise peers.Unable("its layers take features first")
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


def costs(
    lowered: Callable[[str], Any], peer: str, read: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """Compiles a peer's program, and returns its costs."""
    try:
        program = lowered(peer)
        start = time.perf_counter()
        compiled = program.compile()
    except ImportError as error:
        return {"skipped": f"not installed: {records.first_line(error)}"}
    except peers.Unable as error:
        return {"skipped": f"unable: {records.first_line(error)}"}
    # any error: a peer that fails must not end the run
    except Exception as error:
        return {"skipped": f"failed: {type(error).__name__}: {records.first_line(error)}"}
    return {
        "compile_seconds": round(time.perf_counter() - start, 2),
        **read(compiled),
        "collectives": len(hlo.collectives(compiled)),
        **programs.compiled_memory(compiled),
    }


def figures(compiled: Any) -> dict[str, Any]:
    """Returns the figures that libtpu's compiler reports for a program."""
    cycles = hlo.estimated_cycles(compiled.as_text())
    estimate = {"": cycles.taken, "_untaken": cycles.untaken} if cycles else {}
    return {
        **{f"estimated_cycles{which}": count for which, count in estimate.items()},
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
    }


def cell(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell with the costs of a program."""
    moved, temporary = got["bytes_accessed"] / 1e6, got["temporary_bytes"] / 1e6
    return (
        f"{moved:,.5g} / {temporary:,.4g} MB, {got['collectives']}, {got['compile_seconds']:.3g} s"
    )


def cell_of_cycles(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell with a program's estimated kilocycles, and their ratio to normjax's."""
    if "estimated_cycles" not in got:
        return "-"
    taken, untaken = got["estimated_cycles"], got["estimated_cycles_untaken"]
    branches = f" + {untaken / 1e3:,.5g} untaken" if untaken else ""
    own = row["peers"].get("normjax", {}).get("estimated_cycles")
    ratio = f" ({taken / own:.3f}x)" if own and got is not row["peers"]["normjax"] else ""
    return f"{taken / 1e3:,.6g}{branches}{ratio}"


def means(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Returns, for each peer, the geometric mean of the ratios of its cycles to normjax's."""
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
