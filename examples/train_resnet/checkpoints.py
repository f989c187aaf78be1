"""Checkpoints with Orbax: written in the background, complete or absent, and checked when read.

A checkpoint is a folder named by its step, with `state` (params, batch_stats, the optimizer's
state) and `meta`: the position in the data, what the course of the training depends on, and a
checksum of each array. Orbax writes under another name and renames at the end, so that a process
that dies leaves no half of a checkpoint under the step's name; the checksums are for files that
disks or people have cut off or changed since.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train_resnet import runtime
from train_resnet.options import Options
from train_resnet.steps import Program, SetupError, State

TEMPORARY = ".orbax-checkpoint-tmp"
FACTOR = 2654435761


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, options: Options, program: Program):
        self.options, self.program, self.folder = options, program, options.out / "checkpoints"
        found: dict[str, Any] = {"step": None, "problem": None}
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                found["step"] = self._newest()
            except SetupError as error:
                found["problem"] = str(error)
        # One process looks and all do as it says, so that no two go on from different steps.
        found = runtime.tell(found)[0]
        if found["problem"] is not None:
            raise SetupError(found["problem"])
        self.step: int | None = found["step"]
        kept = ocp.CheckpointManagerOptions(
            max_to_keep=options.keep, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=kept, item_names=("state", "meta")
        )
        self._checksums = jax.jit(lambda state: jax.tree.map(_checksum, state))

    def restore(self) -> tuple[State, int]:
        """Returns state and data position of the newest complete checkpoint, or of the start."""
        if self.step is None:
            return self.program.init(), 0
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(self.program.abstract_state()),
            meta=ocp.args.JsonRestore(),
        )
        restored = self.manager.restore(self.step, args=items)
        return restored["state"], restored["meta"]["position"]

    def save(self, state: State, step: int, position: int) -> None:
        """Starts to write a checkpoint, unless there is one of this step."""
        if step == self.step:
            return
        checksums = {name: int(value) for name, value in _named(self._checksums(state)).items()}
        meta = {"position": position, "course": self.options.course(), "checksums": checksums}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(step, args=items)
        self.step = step

    def close(self) -> None:
        """Waits until all is written."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _newest(self) -> int | None:
        """Returns the newest step with a complete checkpoint; moves others away, with a warning."""
        for path in sorted(self.folder.glob(f"*{TEMPORARY}*")):
            _warn(f"{path}: skipped: it was cut off while it was written")
            shutil.rmtree(path)
        for step in sorted(
            (int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), reverse=True
        ):
            if (problem := self._problem(step)) is None:
                return step
            _warn(f"{self.folder / str(step)}: skipped for the checkpoint before it: {problem}")
            aside = self.folder / f"corrupt-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        return None

    def _problem(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint; raises SetupError if other options made it."""
        folder = self.folder / str(step)
        try:
            meta = json.loads((folder / "meta" / "metadata").read_text())
            course, checksums, _ = meta["course"], meta["checksums"], meta["position"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"its meta cannot be read: {_first_line(error)}"
        for name, value in self.options.course().items():
            if course.get(name) != value:
                flag = f"--{name.replace('_', '-')}"
                raise SetupError(
                    f"{folder} was made with {flag} {course.get(name)}, not {value}; "
                    "choose another --out"
                )
        try:
            state = _read(folder / "state", self.program.abstract_state())
        except Exception as error:  # of many kinds: whatever is wrong with the files
            return _first_line(error)
        wrong = [
            name
            for name, value in _named(state).items()
            if checksums.get(name) != int(_checksum(value))
        ]
        return (
            f"{len(wrong)} arrays are not as they were written, such as {wrong[0]}"
            if wrong
            else None
        )


def _read(folder: Path, abstract: Any) -> Any:
    """Returns a state as NumPy arrays, read by this process alone."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="check",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    checkpointer = ocp.Checkpointer(handler, multiprocessing_options=alone)
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    try:
        return checkpointer.restore(folder, args=ocp.args.StandardRestore(arrays))
    finally:
        checkpointer.close()


def _checksum(leaf: Any) -> Any:
    """Returns a checksum of the bits of an array, on the device where that is (or by NumPy)."""
    xp = jnp if isinstance(leaf, jax.Array) else np
    words = (
        jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        if xp is jnp
        else np.asarray(leaf).view(np.uint32)
    )
    words = words.reshape(-1)
    odd = 2 * xp.arange(words.size, dtype=xp.uint32) + xp.uint32(1)
    return xp.sum(words * odd * xp.uint32(FACTOR), dtype=xp.uint32)


def _named(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
