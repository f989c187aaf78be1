"""Runs a network's training step with each peer's layers: checks, memory and times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import networks, peers
from .networks import Network
from .programs import compiled_memory, kept_bytes
from .timing import Program, interleaved, summary

# The largest relative difference of the loss from that with normjax's layers, after some steps.
STEPS, TOLERANCE = 3, {"float32": 1e-3, "bfloat16": 2e-2}


class Trained(NamedTuple):
    """A compiled step, the losses of the first steps, and its memory use."""

    program: Program
    losses: np.ndarray
    memory: dict[str, float]


def run(
    rows: Sequence[Network], names: Iterable[str], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Returns the rows of networks; prints and skips those that do not start in time."""
    end, found = time.monotonic() + seconds, []
    for i, network in enumerate(rows):
        if time.monotonic() > end:
            print(
                f"out of time after {seconds:.0f} s; not run: "
                + "; ".join(each.title for each in rows[i:])
            )
            break
        found.append(row(network, list(names), rounds))
        print(f"{i + 1}/{len(rows)} {network.title}: done", flush=True)
    return found


def row(network: Network, names: list[str], rounds: int) -> dict[str, Any]:
    """Returns a step's milliseconds, bytes and compile seconds with each peer's layers."""
    own = train(network, "normjax")
    programs: dict[str, Program] = {"normjax": own.program}
    found: dict[str, dict[str, Any]] = {"normjax": dict(own.memory)}
    for name in names:
        if name == "normjax":
            continue
        try:
            other = train(network, name)
        except ImportError as error:
            found[name] = {"skipped": f"not installed: {error}"}
        except peers.Unable as error:
            found[name] = {"skipped": f"unable: {error}"}
        else:
            worst = float(np.max(np.abs(other.losses / own.losses - 1)))
            if name != "none" and not worst <= TOLERANCE[network.dtype]:
                off = f"the loss is off by {worst:.2g} of normjax's in {STEPS} steps"
                found[name] = {"skipped": f"wrong: {off}"}
            else:
                programs[name], found[name] = other.program, other.memory | {"error": worst}
    times = interleaved(programs, rounds)
    for name in programs:
        found[name] |= summary(times[name], times["normjax"])
    return {"name": f"{network.title} step", "peers": found}


def train(network: Network, peer: str) -> Trained:
    """Compiles a network's step with a peer's layers, and runs the first steps."""
    inputs, labels = (jnp.asarray(value) for value in networks.batch(network))
    with networks.normalized_by(peer):
        state = jax.jit(network.init)(jax.random.key(0), inputs)
        start = time.perf_counter()
        compiled = (
            jax.jit(networks.step(network), donate_argnums=(0, 1))
            .lower(*state, inputs, labels)
            .compile()
        )
        memory: dict[str, float] = {"compile_seconds": round(time.perf_counter() - start, 3)}
        kept = kept_bytes(
            lambda params: networks.loss(network, params, state[1], inputs, labels)[0], state[0]
        )
    state = [*state]

    def call() -> jax.Array:
        state[0], state[1], value = compiled(*state, inputs, labels)
        return value

    losses = np.array([float(call()) for _ in range(STEPS)])
    queues = jax.default_backend() != "cpu"
    return Trained(
        Program(call, jax.block_until_ready, queues),
        losses,
        memory | compiled_memory(compiled) | {"kept_bytes": kept},
    )


def cell(row: dict[str, Any], got: dict[str, Any]) -> str:
    """Returns a cell with a step's time, temporary bytes, and bytes stored for backward."""
    ratio = "" if got is row["peers"]["normjax"] else f" ({got['ratio']:.2f}x)"
    sizes = "/".join(f"{got.get(name, 0) / 1e6:.4g}" for name in ("temporary_bytes", "kept_bytes"))
    return f"{got['ms']:.4g}{ratio} {sizes} MB"
