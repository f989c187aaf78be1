"""From leaves to NumPy's float64, and back to the dtype that they had."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from normjax import _checks


def widened(function: str, path: str, leaf: Any) -> np.ndarray:
    """Returns a leaf as float64 or complex128; refuses values that are not finite."""
    leaf = np.asarray(leaf)
    wide = leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
    _refuse_not_finite(
        function, path, wide, "Look for the step that made them, or start from a sound checkpoint"
    )
    return wide


def narrowed(function: str, path: str, value: np.ndarray, like: Any) -> Any:
    """Returns a value in the dtype of `like`, and as what that is, a NumPy or a JAX array."""
    dtype = np.asarray(like).dtype
    with np.errstate(over="ignore"):
        narrow = value.astype(dtype)
    _refuse_not_finite(
        function, f"the folded {path}, rounded to {dtype},", narrow, "Fold in a wider dtype"
    )
    return narrow if isinstance(like, np.ndarray) else jnp.asarray(narrow)


def _refuse_not_finite(function: str, path: str, values: np.ndarray, fix: str) -> None:
    sound = np.isfinite(values)
    if not sound.all():
        first = tuple(int(i) for i in np.argwhere(~sound)[0])
        _checks.raise_error(
            function,
            f"{path} is not finite",
            expected="finite numbers",
            got=f"{int((~sound).sum())} of {sound.size} that are not, the first at {first}: {values[first]}",
            fix=fix,
        )
