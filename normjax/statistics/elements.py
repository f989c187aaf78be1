"""Reads, masks, weights, names and squares the elements of x for statistics."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Inexact

from normjax._typing import Activations, Mask, is_weight, widen
from normjax.platforms.plain import PLAIN

# The checkpoint names of a layer's statistics, of its input, and of an output that replaces the
# input in the backward pass.
STATISTICS = "normjax_statistics"
INPUT = "normjax_input"
OUTPUT = "normjax_output"


class Input(NamedTuple):
    """The input of a layer, in its own dtype and in at least float32.

    Gradients flow through `x32`, so they are summed before they are rounded to the dtype of `x`.
    Reductions read and store `x`, which is smaller.

    Attributes:
      x: the input, with zeros where the mask hides a NaN or an infinity.
      x32: the same values in at least float32.
      sound: False where the mask hid a NaN or an infinity; None without a mask.
    """

    x: Inexact[Array, "..."]
    x32: Inexact[Array, "..."]
    sound: Bool[Array, "..."] | None = None


def read(x: Activations, mask: Mask | None = None) -> Input:
    """Returns x, named for checkpoint policies, and x in at least float32.

    A masked NaN is replaced by 0, since a NaN times a gradient of 0 would be NaN.
    """
    sound = None
    if mask is not None:
        sound = counts(mask) | jnp.isfinite(x)
        x = jnp.where(sound, x, _zero(x))
    x = named(x, INPUT)
    return Input(x, widen(x), sound)


def masked(x: Array, mask: Mask | None) -> Array:
    """Returns x, with zeros for elements that do not count."""
    return x if mask is None else jnp.where(counts(mask), x, _zero(x))


def _zero(x: Array) -> np.ndarray:
    """Returns a zero of x's dtype. With a Python number, jax2onnx would return float64."""
    return np.zeros((), x.dtype)


def weighted(x: Array, mask: Mask | None) -> Array:
    """Returns x times the weights, if the mask holds weights."""
    return x * mask.astype(x.dtype) if is_weight(mask) else x


def counts(mask: Mask) -> Array:
    """Returns a bool mask of the elements that count."""
    return mask > 0 if is_weight(mask) else mask


def named(value: Array, name: str = STATISTICS) -> Array:
    """Marks an array that `jax.checkpoint` should store."""
    if PLAIN.value:
        return value
    if jnp.iscomplexobj(value):  # jax.checkpoint cannot store complex arrays by name
        return lax.complex(named(value.real, name), named(value.imag, name))
    return checkpoint_name(value, name)


def times(x: Array, factor: float) -> Array:
    """Returns x times a constant; returns x itself if the constant is 1."""
    return x if factor == 1 else x * factor


def abs2(x: Array) -> Array:
    """Returns |x|^2, real."""
    return real_product(x, x) if jnp.iscomplexobj(x) else x * x


def real_product(a: Array, b: Array) -> Array:
    """Returns Re(conj(a) b), without a complex product if both are real."""
    return a.real * b.real + a.imag * b.imag if jnp.iscomplexobj(a) else a * b
