"""How PyTorch lays out kernels, and what its weight_norm and spectral_norm keep of them."""

from __future__ import annotations

import numpy as np

from normjax import _checks
from normjax.convert._trees import Leaf


def to_kernel(weight: np.ndarray) -> np.ndarray:
    """From `(out, in, *window)` to `(*window, in, out)`."""
    return weight.transpose(*range(2, weight.ndim), 1, 0) if weight.ndim > 1 else weight


def from_kernel(kernel: np.ndarray) -> np.ndarray:
    """From `(*window, in, out)` to `(out, in, *window)`."""
    rank = kernel.ndim
    return np.ascontiguousarray(kernel.transpose(rank - 1, rank - 2, *range(rank - 2))) if rank > 1 else kernel


def norms(function: str, weight: np.ndarray, scale: Leaf) -> np.ndarray:
    """The scale of weight_norm along the axis of the weight that it fits, the first if several do."""
    size, rank = scale.value.size, weight.ndim
    if scale.value.ndim == 0:
        return scale.value
    if scale.value.ndim > 1 or size not in weight.shape:
        _misfit(function, scale, f"({', '.join(map(str, sorted(set(weight.shape))))}) or ()", weight)
    axis = weight.shape.index(size)
    return scale.value.reshape([-1 if other == axis else 1 for other in range(rank)])


def singular_value(function: str, weight: np.ndarray, u: Leaf, v: Leaf) -> np.ndarray:
    """The estimate from a pair of singular vectors."""
    matrix = _matrix(function, weight, u)
    if v.value.shape != matrix.shape[1:]:
        _misfit(function, v, f"{matrix.shape[1:]}", weight)
    return u.value @ matrix @ v.value


def other_vector(function: str, weight: np.ndarray, u: Leaf) -> np.ndarray:
    """The unit vector v that a half step of power iteration gives from u."""
    v = u.value.reshape(-1) @ _matrix(function, weight, u)
    return v / max(np.linalg.norm(v), np.finfo(np.float32).tiny).astype(v.dtype)


def _matrix(function: str, weight: np.ndarray, u: Leaf) -> np.ndarray:
    """The weight with a row for each element of u, along axis 0 or, in transposed convolutions, 1.

    Where both would fit, the right one is where u, which is near a singular vector, is stretched more.
    """
    vector = u.value.reshape(-1)
    axes = [axis for axis, size in enumerate(weight.shape) if size == vector.size]
    if not axes:
        _misfit(function, u, f"of one axis of the kernel, among {weight.shape}", weight)
    matrices = [np.moveaxis(weight, axis, 0).reshape(vector.size, -1) for axis in axes]
    return max(matrices, key=lambda matrix: float(np.linalg.norm(vector @ matrix)))


def _misfit(function: str, leaf: Leaf, expected: str, weight: np.ndarray) -> None:
    _checks.refuse(
        function,
        f"{leaf.key!r} does not fit its kernel",
        expected=f"shape {expected}",
        got=f"shape {leaf.value.shape} for a kernel of shape {weight.shape} in PyTorch's layout",
        fix="Check that both belong to the same layer",
    )
