"""Orbax checkpoints that are written in the background, atomically, and verified before use.

A checkpoint is a folder named by its step, with `state` (params, batch_stats, the optimizer's
state), `meta` (see `Checkpoints.save`) and checksums of all files, which are written last (see
sealed.py). It is written under another name and renamed at the end, so that a process that dies
does not leave an incomplete checkpoint under the step's name. The checksums detect files that were
changed later by disk errors or by people. If the files of a checkpoint are unchanged, but it does
not fit, it belongs to another program. This is an error, and the checkpoint is kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train_resnet import checksums, preflight, stored
from train_resnet.digest import Facts
from train_resnet.ending import first_line, say
from train_resnet.options import Options
from train_resnet.sealed import UNSEALED, SealedPath
from train_resnet.steps import Program, SetupError, State
from train_resnet.watchdog import progress

TEMPORARY = ".orbax-checkpoint-tmp"


class SaveError(Exception):
    """Raised if a checkpoint cannot be written; the message is one line."""


class Start(NamedTuple):
    """The start of a run: its first step is the one after `step`."""

    state: State
    step: int
    position: int


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, options: Options, program: Program, facts: Facts):
        self.options, self.program, self.facts = options, program, facts
        self.folder = options.out / "checkpoints"
        self.step: int | None = None
        self.not_finite: set[int] = set()
        self._summary = jax.jit(
            lambda state: (jax.tree.map(stored.checksum, state), _finite(state))
        )

    def restore(self) -> Start:
        """Returns the newest intact checkpoint, or the start of the run.

        Raises SetupError, without changing any file, if it belongs to another program or run.
        """
        aside: list[tuple[int, str, str]] = []
        start = None
        for step in self._tell(self._steps() if jax.process_index() == 0 else [])[0]:
            progress.now(f"reading the checkpoint of step {step}")
            look = self._tell(self._look(step) if jax.process_index() == 0 else {})[0]
            if look["misfit"] is not None:
                raise SetupError(look["misfit"])
            problem, name, state = look["problem"], look["name"], None
            if problem is None:
                state, problem, name = self._read(step, look["meta"])
            if problem is None:
                assert state is not None
                start = Start(state, step, look["meta"]["position"])
                break
            aside.append((step, name, problem))
        self._clean_up(aside)
        if aside and start is None and jax.process_index() == 0:
            say("warning: no usable checkpoint is left: the run starts at step 0")
        self.step = None if start is None else start.step
        self._open()
        return start or Start(self.program.init(), 0, 0)

    def save(self, state: State, step: int, position: int) -> bool:
        """Starts to write a checkpoint unless it exists; returns False if the state has NaNs."""
        self.check()
        if step == self.step:
            return True
        progress.now(f"writing the checkpoint of step {step}")
        sums, finite = jax.device_get(self._summary(state))
        if not finite:
            self.not_finite.add(step)
            if not self.options.allow_nan:
                return False
        meta = {
            "position": position,
            "course": self.options.course(),
            "data": self.facts,
            "finite": bool(finite),
            "arrays": stored.arrays(state),
            "checksums": {name: int(value) for name, value in stored.named(sums).items()},
        }
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._attempt(lambda: self.manager.save(step, args=items))
        self.step = step
        return True

    def check(self) -> None:
        """Raises SaveError if the last checkpoint could not be written, without waiting for it."""
        self._attempt(self.manager.check_for_errors)

    def close(self) -> None:
        """Waits until everything is written."""
        progress.now("writing the last checkpoint")
        self._attempt(self.manager.wait_until_finished)
        self.manager.close()

    def newest(self) -> str:
        """Describes the newest checkpoint in words."""
        steps = self._steps()
        return f"the last checkpoint is of step {steps[0]}" if steps else "no checkpoint is written"

    def _attempt(self, write: Any) -> None:
        try:
            write()
        except jax.errors.JaxRuntimeError:
            raise  # written by another process
        except Exception as error:  # any error that a disk may cause
            raise SaveError(
                f"{self.folder}: a checkpoint cannot be written: {first_line(error)}; "
                f"{self.newest()}"
            ) from error

    def _open(self) -> None:
        """Opens the folder with Orbax, after it has been cleaned up."""
        kept = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self.options.keep, self.not_finite),
            async_options=ocp.AsyncOptions(timeout_secs=self.options.stall),
            temporary_path_class=SealedPath,
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=kept, item_names=("state", "meta")
        )

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir())
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def _look(self, step: int) -> dict[str, Any]:
        """Returns what process 0 finds in the folder, without reading arrays."""
        folder = self.folder / str(step)
        found = {"problem": None, "misfit": None, "name": "corrupt"}
        if not any(self.folder.glob(f"*/{checksums.NAME}")):
            earlier = (
                f"{folder} has no {checksums.NAME}: an earlier version of this program wrote it"
            )
            return found | {
                "misfit": f"{earlier}. Continue with that version, or choose another --out"
            }
        if wrong := checksums.wrong_files(folder):
            of = "its arrays" if wrong[0].startswith("state") else "it"
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return found | {
                "problem": f"files of {of} are not as they were written: {wrong[0]}{more}"
            }
        meta = stored.read_meta(folder)
        if not meta["finite"] and not self.options.allow_nan:
            return found | {"name": "not-finite", "problem": "not all of its values are finite"}
        misfit = stored.misfit(folder, meta, self.options, self.facts, self.program)
        if not meta["finite"]:
            self.not_finite.add(step)
        return found | {"misfit": misfit, "meta": meta}

    def _read(self, step: int, meta: dict[str, Any]) -> tuple[State | None, str | None, str]:
        """Returns the state on all devices, or the problem and a new name for the folder."""
        folder, state, problem, misfit = self.folder / str(step), None, None, None
        try:
            state = stored.read_state(folder, self.program.abstract_state())
            problem = stored.wrong_arrays(state, meta["checksums"])
        except Exception as error:  # intact: missing, or of another version of Orbax
            misfit = f"{folder} cannot be read, and its files are right: {first_line(error)}"
        for index, other in enumerate(self._tell({"problem": problem, "misfit": misfit})):
            if other["misfit"] is not None:
                raise SetupError(preflight.of_process(index, other["misfit"]))
            problem = problem or other["problem"]
        if problem is not None:
            return None, problem, "corrupt"
        return jax.tree.map(self._everywhere, state), None, ""

    def _everywhere(self, leaf: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            leaf.shape, self.program.whole, lambda index: leaf[index]
        )

    def _clean_up(self, aside: list[tuple[int, str, str]]) -> None:
        """Renames checkpoints that cannot be used, and removes incomplete ones."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for step, name, problem in aside:
                path = self.folder / str(step)
                say(f"warning: {path}: skipped, using the previous checkpoint: {problem}")
                path.rename(_free(self.folder / f"{name}-{step}"))
            for path in (*self.folder.glob(f"*{TEMPORARY}*"), *self.folder.glob(f"*{UNSEALED}")):
                say(f"warning: {path}: skipped: it was cut off while it was written")
                shutil.rmtree(path)
        self._tell({})  # no process reads the folder before this

    def _tell(self, content: Any) -> list[Any]:
        return preflight.tell(self.options, content)


class _Kept:
    """Preserves the newest checkpoints, and the newest one without NaNs."""

    def __init__(self, number: int, not_finite: set[int]):
        self.number, self.not_finite = number, not_finite

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Returns the checkpoints that Orbax must not delete."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        finite = [step for step in steps if step not in self.not_finite]
        kept = {*steps[-self.number :], *finite[-1:]}
        return [step in kept for step in steps]


def _finite(state: State) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _free(path: Path) -> Path:
    """Returns the path, with a number appended if the folder exists."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
