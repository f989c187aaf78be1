"""Reads named arrays from a dict, a file or an object of another library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from normjax import _checks, _extras

Arrays = dict[str, np.ndarray]
Source = Mapping[str, Any] | str | os.PathLike[str]


@runtime_checkable
class TorchModule(Protocol):
    """The part of `torch.nn.Module` that is used; PyTorch is not imported."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def named_modules(self) -> Iterable[tuple[str, Any]]: ...


@runtime_checkable
class KerasLayer(Protocol):
    """The part of a Keras 3 layer or model that is used; Keras is not imported."""

    name: str
    built: bool

    @property
    def weights(self) -> Sequence[Any]: ...


def read_mapping(function: str, source: Any) -> Arrays:
    """Returns the arrays of a mapping or a .safetensors file as NumPy arrays."""
    if isinstance(source, str | os.PathLike):
        return _read_file(function, os.fspath(source))
    if not isinstance(source, Mapping):
        _checks.raise_error(
            function,
            "the source contains no arrays",
            expected="a mapping from names to arrays, the path of a .safetensors file, or the "
            "library's own object",
            got=f"{type(source).__name__}",
            fix="Pass a mapping, such as module.state_dict()",
            kind=TypeError,
        )
    return {str(key): to_numpy(function, str(key), value) for key, value in source.items()}


def to_numpy(function: str, key: str, value: Any) -> np.ndarray:
    """Returns an array of NumPy, JAX, PyTorch or Keras as a NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16, so PyTorch's .numpy() raises an error.
        if str(value.dtype) == "torch.bfloat16":
            return value.float().numpy().astype(jnp.bfloat16)
        return value.numpy().copy()
    value = np.asarray(value)
    if value.dtype == object or value.dtype.kind in "USM":
        _checks.raise_error(
            function,
            f"{key!r} is not an array",
            expected="numbers",
            got=f"{value.dtype} of shape {value.shape}",
            fix="Leave it out, or pass the state_dict inside it",
            kind=TypeError,
        )
    return value


def _read_file(function: str, path: str) -> Arrays:
    if not path.endswith(".safetensors"):
        _checks.raise_error(
            function,
            "the file is not a .safetensors file",
            expected="a path that ends in .safetensors",
            got=f"{path!r}",
            fix="Load it first, and pass the mapping: torch.load(path, weights_only=True), or "
            "np.load(path)",
        )
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        _extras.raise_for_missing(function, f"reading {path!r} requires the package", error)
    return load_file(path)
