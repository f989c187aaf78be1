"""Reads checkpoints; their content tells the format, and an error describes a problem in a line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

_OPTIMIZER = "opt_state"  # it is not read, since it may be twice as large as the parameters
_LEFT_BEHIND = 0.3  # seconds to wait for other reads of Orbax, which fail after the first failure
_FOREIGN = {b"PK\x03\x04": "a zip archive, as of PyTorch or NumPy", b"\x89HDF": "HDF5, as of Keras"}


class UnreadableError(Exception):
    """The reason why a checkpoint cannot be read, in one line."""


def read_checkpoint(path: Path) -> Any:
    """Returns the NumPy arrays of a checkpoint of Orbax, Flax's msgpack or safetensors."""
    if not path.exists():
        raise UnreadableError("there is no such file or folder")
    try:
        return _read_orbax(_item(path)) if path.is_dir() else _reader(path)(path)
    except (UnreadableError, KeyboardInterrupt):
        raise
    except ImportError as error:
        extra = "pip install 'normjax[diagnostics]'"
        raise UnreadableError(f"reading it requires the package {error.name}: {extra}") from error
    except Exception as error:  # damaged files raise errors of many kinds
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise UnreadableError(f"it is cut off or damaged ({problem})") from error


def _reader(path: Path) -> Callable[[Path], Any]:
    """Returns the function that reads a file, chosen by its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise UnreadableError("it is empty")
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    if 0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return _read_msgpack
    kinds = [f": it is {kind}" for begin, kind in _FOREIGN.items() if start.startswith(begin)]
    kind = kinds[0] if kinds else ""
    raise UnreadableError(f"its format is none of Orbax, Flax's msgpack and safetensors{kind}")


def _read_msgpack(path: Path) -> Any:
    from flax import serialization

    return serialization.msgpack_restore(path.read_bytes())


def _read_safetensors(path: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the arrays by path; names are split at slashes, bars or dots."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    divider = next((mark for mark in "|/." if any(mark in name for name in arrays)), "/")
    return {tuple(name.split(divider)): array for name, array in arrays.items()}


def _item(folder: Path) -> dict[str, Path]:
    """Returns the folders of a checkpoint's trees by name; of several steps, the newest's."""
    if (folder / "_METADATA").exists():
        return {"": folder}
    inside = [child for child in folder.iterdir() if child.is_dir()]
    inside = [child for child in inside if ".orbax-checkpoint-tmp" not in child.name]
    items = {child.name: child for child in inside if (child / "_METADATA").exists()}
    numbers = {child: re.search(r"(\d+)$", child.name) for child in inside}
    steps = {child: int(number[1]) for child, number in numbers.items() if number}
    if items and not set(items.values()) <= set(steps):
        return items if len(items) > 1 else {"": next(iter(items.values()))}
    if not steps:
        raise UnreadableError(
            "the folder is not a checkpoint of Orbax: it has neither _METADATA nor folders of steps"
        )
    return _item(max(steps, key=lambda child: steps[child]))


def _read_orbax(items: dict[str, Path]) -> Any:
    with _quiet():
        trees = {name: _restore(folder) for name, folder in items.items()}
    return trees.get("", trees)


def _restore(folder: Path) -> Any:
    """Returns the NumPy arrays of a tree, without the optimizer's."""
    import orbax.checkpoint as ocp

    json.loads((folder / "_METADATA").read_text())  # if it is damaged, this error says more
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(folder.absolute())
        if metadata.item_metadata is None:
            problem = f"Orbax finds no arrays in {folder.name}"
            raise UnreadableError(f"it is cut off or damaged: {problem}")
        tree = metadata.item_metadata.tree
        if isinstance(tree, Mapping):
            tree = {name: inner for name, inner in tree.items() if name != _OPTIMIZER}

        def as_numpy(leaf: Any) -> Any:
            return ocp.RestoreArgs(restore_type=np.ndarray if hasattr(leaf, "shape") else None)

        restore = jax.tree.map(as_numpy, tree)
        arguments = ocp.args.PyTreeRestore(item=tree, restore_args=restore, partial_restore=True)
        return checkpointer.restore(folder.absolute(), args=arguments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's messages off the terminal.

    Orbax warns about devices, and after a failure about other reads that are still running.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception:
        time.sleep(_LEFT_BEHIND)
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
