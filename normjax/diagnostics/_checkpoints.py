"""Reads checkpoints of any format, which it knows by what is in them; whatever is wrong is one line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

_OPTIMIZER = "opt_state"  # which may be twice as large as all else
_FOREIGN = {b"PK\x03\x04": "a zip archive, as of PyTorch or NumPy", b"\x89HDF": "HDF5, as of Keras"}


class UnreadableError(Exception):
    """Why a checkpoint cannot be read, in one line."""


def read_checkpoint(path: Path) -> Any:
    """Returns the arrays of a checkpoint of Orbax, Flax's msgpack or safetensors, as a tree of NumPy arrays."""
    if not path.exists():
        raise UnreadableError("there is no such file or folder")
    try:
        return _read_orbax(_item(path)) if path.is_dir() else _reader(path)(path)
    except (UnreadableError, KeyboardInterrupt):
        raise
    except ImportError as error:
        extra = "pip install 'normjax[diagnostics]'"
        raise UnreadableError(f"reading it takes the package {error.name}: {extra}") from error
    except Exception as error:  # of many kinds: whatever is wrong with the files
        raise UnreadableError(f"it is cut off or damaged ({type(error).__name__}: {_first_line(error)})") from error


def _reader(path: Path) -> Callable[[Path], Any]:
    """Returns what reads a file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise UnreadableError("it is empty")
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors
    if 0x80 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return _read_msgpack
    kind = next((f": it is {kind}" for begin, kind in _FOREIGN.items() if start.startswith(begin)), "")
    raise UnreadableError(f"its format is none of Orbax, Flax's msgpack and safetensors{kind}")


def _read_msgpack(path: Path) -> Any:
    from flax import serialization

    return serialization.msgpack_restore(path.read_bytes())


def _read_safetensors(path: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Returns arrays by their paths: what slashes, bars or dots divide in their names."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    divider = next((mark for mark in "|/." if any(mark in name for name in arrays)), "/")
    return {tuple(name.split(divider)): array for name, array in arrays.items()}


def _item(folder: Path) -> dict[str, Path]:
    """Returns the folders with trees of a checkpoint; of a folder of steps, those of the newest step."""
    if (folder / "_METADATA").exists():
        return {"": folder}
    inside = [child for child in folder.iterdir() if child.is_dir() and ".orbax-checkpoint-tmp" not in child.name]
    items = {child.name: child for child in inside if (child / "_METADATA").exists()}
    steps = {child: int(found[1]) for child in inside if (found := re.search(r"(\d+)$", child.name))}
    if items and not set(items.values()) <= set(steps):
        return items if len(items) > 1 else {"": next(iter(items.values()))}
    if not steps:
        raise UnreadableError("the folder is no checkpoint of Orbax: it has neither _METADATA nor folders of steps")
    return _item(max(steps, key=lambda child: steps[child]))


def _read_orbax(items: dict[str, Path]) -> Any:
    with _quiet():
        trees = {name: _restore(folder) for name, folder in items.items()}
    return trees.get("", trees)


def _restore(folder: Path) -> dict[tuple[str, ...], np.ndarray]:
    """Returns the arrays of a tree as NumPy's, on whatever devices they were; the optimizer's are not read."""
    import orbax.checkpoint as ocp

    json.loads((folder / "_METADATA").read_text())  # whose error says more than Orbax's
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(folder.absolute())
        tree = metadata.item_metadata.tree
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
        wanted = {path: leaf for path, leaf in leaves if _OPTIMIZER not in jax.tree_util.keystr(path[:1])}
        part = _nested({tuple(_key(key) for key in path): leaf for path, leaf in wanted.items()})
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
        arguments = ocp.args.PyTreeRestore(item=part, restore_args=restore, partial_restore=True)
        return checkpointer.restore(folder.absolute(), args=arguments)


def _nested(leaves: dict[tuple[Any, ...], Any]) -> Any:
    tree: dict[Any, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return tree


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Orbax logs about devices off the terminal: nothing goes to one."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
