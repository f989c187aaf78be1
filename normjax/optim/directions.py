"""Computes norms and directions of kernels, or of their features, in at least float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from normjax import _checks
from normjax._trees import KeyPath, show
from normjax._typing import Axes, widen
from normjax.statistics.elements import abs2, real_product


def reduced_axes(
    function: str, feature_axes: Axes, kernel: Array, path: KeyPath
) -> tuple[int, ...]:
    """Returns the axes over which a norm is computed.

    Raises an error with the path of a kernel that lacks one of the feature axes.
    """
    where = f"{function} at {show('params', path)}"
    features = _checks.axes(where, "feature_axes", feature_axes, kernel.shape)
    return _checks.other_axes(features, kernel.ndim)


def norm(kernel: Array, axes: tuple[int, ...]) -> Array:
    """Returns the Euclidean norm, without overflow or underflow; `axes` get size 1."""
    wide = widen(kernel)
    largest = jnp.max(jnp.abs(wide), axes, keepdims=True, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum(abs2(wide / unit), axes, keepdims=True))


def inner(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """Returns the real inner product over `axes`, which get size 1."""
    return jnp.sum(real_product(widen(a), widen(b)), axes, keepdims=True)


def unit(kernel: Array, axes: tuple[int, ...]) -> Array:
    """Returns the kernel with norm 1; zeros stay zeros."""
    length = norm(kernel, axes)
    return widen(kernel) / jnp.where(length > 0, length, 1)


def tangent(update: Array, kernel: Array, axes: tuple[int, ...]) -> Array:
    """Returns the update without its component along the kernel."""
    direction = unit(kernel, axes)
    return widen(update) - inner(direction, update, axes) * direction
