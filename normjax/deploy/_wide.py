"""Converts leaves to NumPy's float64, and results back to the leaves' dtype."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from normjax._trees import check_finite


def widened(function: str, path: str, leaf: Any) -> np.ndarray:
    """Returns a leaf as float64 or complex128; raises an error if it is not finite."""
    leaf = np.asarray(leaf)
    wide = leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
    fix = "Find the step that produced them, or use an earlier checkpoint"
    check_finite(function, path, wide, fix)
    return wide


def narrowed(function: str, path: str, value: np.ndarray, like: Any) -> Any:
    """Returns a value in the dtype of `like`, as a NumPy or JAX array like `like`."""
    dtype = np.asarray(like).dtype
    with np.errstate(over="ignore"):
        narrow = value.astype(dtype)
    check_finite(function, f"the folded {path} in {dtype}", narrow, "Fold in a wider dtype")
    return narrow if isinstance(like, np.ndarray) else jnp.asarray(narrow)
