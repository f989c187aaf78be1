"""The contents of a checkpoint: arrays, checksums, and whether they fit this program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train_resnet.digest import Facts, difference
from train_resnet.options import Options
from train_resnet.steps import Program

FACTOR = 2654435761


def read_meta(folder: Path) -> dict[str, Any]:
    """Returns the metadata of a verified checkpoint."""
    return json.loads((folder / "meta" / "metadata").read_text())


def misfit(
    folder: Path, meta: dict[str, Any], options: Options, facts: Facts, program: Program
) -> str | None:
    """Returns the reason why this program, options and data cannot continue a checkpoint."""
    for name, value in options.course().items():
        if (made := meta["course"].get(name)) != value:
            flag = f"--{name.replace('_', '-')}"
            return f"{folder} was made with {flag} {made}, not {value}; choose another --out"
    if (odd := _odd_arrays(meta["arrays"], arrays(program.abstract_state()))) is not None:
        return (
            f"{folder} is of another program: {odd}; go back to that program, or choose another "
            "--out. Nothing was changed"
        )
    changed = difference(facts, meta["data"])
    if changed is not None and not options.allow_other_data:
        return (
            f"the data are not those of {folder}: {changed}; restore them, choose another --out, "
            "or go on with --allow-other-data"
        )
    return None


def _odd_arrays(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """Returns the first array that only one of two states has, or that differs in shape."""
    odd = [name for name in expected | found if found.get(name) != expected.get(name)]
    if not odd:
        return None
    name = odd[0]
    more = f" (and {len(odd) - 1} arrays more)" if len(odd) > 1 else ""
    if name not in found:
        return f"it has no {name} {expected[name]}{more}"
    if name not in expected:
        return f"its {name} {found[name]} is not in this program{more}"
    return f"its {name} is {found[name]}, not {expected[name]}{more}"


def read_state(folder: Path, abstract: Any) -> Any:
    """Returns a state as NumPy arrays, read only by this process."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="check",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    try:
        return checkpointer.restore(folder / "state", args=ocp.args.StandardRestore(blank))
    finally:
        checkpointer.close()


def wrong_arrays(state: Any, checksums: dict[str, int]) -> str | None:
    """Returns the arrays that differ from those on the devices."""
    found = {name: int(checksum(value)) for name, value in named(state).items()}
    wrong = [name for name, value in found.items() if checksums.get(name) != value]
    if not wrong:
        return None
    return f"{len(wrong)} arrays are not as they were written, such as {wrong[0]}"


def checksum(leaf: Any) -> Any:
    """Returns a checksum of the bits of an array, computed on its device (or by NumPy)."""
    leaf = leaf.astype(np.uint8) if leaf.dtype == bool else leaf
    word = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    if isinstance(leaf, jax.Array):
        xp, words = jnp, jax.lax.bitcast_convert_type(leaf, word)
    else:
        xp, words = np, np.asarray(leaf).view(word)
    words = words.reshape(-1).astype(xp.uint32)
    odd = 2 * xp.arange(words.size, dtype=xp.uint32) + xp.uint32(1)
    return xp.sum(words * odd * xp.uint32(FACTOR), dtype=xp.uint32)


def arrays(state: Any) -> dict[str, str]:
    """Returns the names, dtypes and shapes of a state."""
    return {
        name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in named(state).items()
    }


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
