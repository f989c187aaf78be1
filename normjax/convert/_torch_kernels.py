"""Converts PyTorch's layouts of kernels, and of the state of weight_norm and spectral_norm."""

from __future__ import annotations

import math

import numpy as np

from normjax import _checks
from normjax.convert._leaf import Leaf


def to_kernel(weight: np.ndarray) -> np.ndarray:
    """Transposes `(out, in, *window)` to `(*window, in, out)`."""
    return weight.transpose(*range(2, weight.ndim), 1, 0) if weight.ndim > 1 else weight


def from_kernel(kernel: np.ndarray) -> np.ndarray:
    """Transposes `(*window, in, out)` to `(out, in, *window)`."""
    rank = kernel.ndim
    if rank < 2:
        return kernel
    return np.ascontiguousarray(kernel.transpose(rank - 1, rank - 2, *range(rank - 2)))


def norms(function: str, weight: np.ndarray, scale: Leaf) -> np.ndarray:
    """Reshapes the scale of weight_norm along the first axis of the weight with its size."""
    size, rank = scale.value.size, weight.ndim
    if scale.value.ndim == 0:
        return scale.value
    if scale.value.ndim > 1 or size not in weight.shape:
        sizes = ", ".join(map(str, sorted(set(weight.shape))))
        _misfit(function, scale, f"({sizes}) or ()", weight)
    axis = weight.shape.index(size)
    return scale.value.reshape([-1 if other == axis else 1 for other in range(rank)])


def power_iteration(
    function: str, weight: np.ndarray, u: Leaf, v: Leaf, size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the singular vector from which the next step starts, and sigma.

    The hook of `torch.nn.utils.spectral_norm` computes v from u and then u from v, as normjax does.
    The parametrization computes u from v first; this equals normjax with PyTorch's v as u, and all
    other axes of the kernel as `feature_axes`. If `size`, the wanted number of elements, is known,
    it determines which vector is returned.
    """
    sizes = (u.value.size, v.value.size)
    readings = [_rows(weight, axis) for axis in (0, 1)]
    readings = [rows for rows in readings if rows.shape == sizes]
    if not readings:
        _misfit(function, u, f"and {v.key!r} one, of the kernel's rows and columns", weight)
    sigma = max((u.value @ rows @ v.value for rows in readings), key=abs)
    size_decides = size is not None and not size == u.value.size == v.value.size
    from_v = size == v.value.size if size_decides else u.key.endswith("._u")
    vector = _window_first(v.value, weight.shape) if from_v else u.value
    return vector[None], sigma


def singular_vectors(
    function: str, weight: np.ndarray, known: Leaf, axis: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns PyTorch's u and v, of which normjax stores one; `axis` is the row axis.

    The shapes may be ambiguous about which vector is stored, and along which axis (0, or 1 in
    transposed convolutions). Of the possible interpretations, the one with the largest singular
    value estimate is used, since the vector is near a singular vector.
    """
    vector = known.value.reshape(-1)
    found = []
    for rows in (_rows(weight, axis) for axis in ((0, 1) if axis is None else (axis,))):
        if vector.size == rows.shape[0]:
            other = vector @ rows
            found.append((np.linalg.norm(other), vector, _unit(other)))
        if vector.size == rows.shape[1]:
            v = _window_last(vector, weight.shape)
            other = rows @ v
            found.append((np.linalg.norm(other), _unit(other), v))
    if not found:
        _misfit(function, known, "of a row or a column of the kernel", weight)
    _, u, v = max(found, key=lambda reading: reading[0])
    return u, v


def _rows(weight: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(np.linalg.norm(vector), np.finfo(vector.dtype).tiny)


def _window_first(v: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reorders a vector over PyTorch's columns `(channels, *window)` to `(*window, channels)`."""
    window = math.prod(shape[2:])
    return v.reshape(-1, window).T.reshape(-1)


def _window_last(v: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return v.reshape(math.prod(shape[2:]), -1).T.reshape(-1)


def _misfit(function: str, leaf: Leaf, expected: str, weight: np.ndarray) -> None:
    _checks.raise_error(
        function,
        f"{leaf.key!r} does not fit its kernel",
        expected=f"shape {expected}",
        got=f"shape {leaf.value.shape} for a kernel of shape {weight.shape} in PyTorch's layout",
        fix="Check that both belong to the same layer",
    )
