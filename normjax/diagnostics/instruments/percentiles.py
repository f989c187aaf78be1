"""Describes the distribution of each layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from normjax import _checks
from normjax._trees import KeyPath, check_arrays, show
from normjax._typing import Axes, widen


class Percentiles(NamedTuple):
    """Percentiles of each layer's inputs; stacked histories have leading axes of steps.

    Attributes:
      q: the percentiles, from 0 to 100, `(*steps, q)`.
      values: for each layer, `(*steps, q, *features)`, in a tree of the structure of the inputs.
    """

    q: Float[Array, "*steps q"]
    values: PyTree[Float[Array, "*steps q *features"]]


def percentiles(
    inputs: PyTree, q: Sequence[float] = (15, 50, 85), *, feature_axes: Axes = ()
) -> Percentiles:
    r"""Returns a few percentiles of each layer's inputs, which are small enough to store each step.

    Percentile q is the value that q percent of the elements are below, interpolated linearly. The
    percentiles 15, 50 and 85 are from figure 1 of the 2015 paper: for a normal distribution, these
    are the mean and about one standard deviation below and above it.

    In a training loop, jit it along with the step, stack the results, as `lax.scan` or
    `jax.tree.map(lambda *x: jnp.stack(x), *history)` does, and draw them with
    `normjax.diagnostics.plot.percentiles`. `layer_inputs` returns the inputs in a Flax model; a
    model of pure functions can return them itself.

    Args:
      inputs: any tree of arrays, one for each layer, `(batch, ..., features)`, floating-point.
      q: the percentiles, from 0 to 100.
      feature_axes: the axes along which each feature has its own percentiles, such as -1 for
        channels; `()` for one distribution of the whole layer.

    Returns:
      `Percentiles`, in at least float32.

    Raises:
      ValueError: for percentiles outside 0 to 100, or axes that an input does not have, by its
        path.
      TypeError: for inputs that are not real floating-point.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> inputs = {"Dense_0": jnp.arange(101.0)[:, None], "Dense_1": jnp.ones((4, 2))}
      >>> seen = nj.diagnostics.percentiles(inputs)
      >>> print(seen.values["Dense_0"].round(), seen.values["Dense_1"])
      [15. 50. 85.] [1. 1. 1.]
      >>> print(nj.diagnostics.percentiles(inputs, feature_axes=-1).values["Dense_1"].shape)
      (3, 2)

    References:
      Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
      Covariate Shift" (2015), figure 1 (b, c).
    """
    wanted = list(q) if isinstance(q, Sequence) else [q]
    _check_percentiles(wanted)
    check_arrays("percentiles", "inputs", inputs)

    def of_layer(path: KeyPath, x: Any) -> Array:
        name = f"percentiles at {show('inputs', path)}"
        x = widen(_real(name, x))
        features = _checks.axes(name, "feature_axes", feature_axes, x.shape)
        return jnp.percentile(x, jnp.asarray(wanted, x.dtype), _checks.other_axes(features, x.ndim))

    values = jax.tree_util.tree_map_with_path(of_layer, inputs)
    return Percentiles(jnp.asarray(wanted, jnp.float32), values)


def _check_percentiles(q: Sequence[float]) -> None:
    for one in q:
        _checks.between("percentiles", "q", one, 0.0, 100.0)
    if not q:
        _checks.raise_error(
            "percentiles",
            "q is empty",
            expected="percentiles",
            got=f"q={q!r}",
            fix="Pass (15, 50, 85)",
        )


def _real(name: str, x: Any) -> Array:
    """Returns the inputs of a layer; raises an error if they are not real floating-point."""
    x = _checks.activations(name, x)
    if jnp.iscomplexobj(x):
        _checks.raise_error(
            name,
            "complex numbers have no order",
            expected="real inputs",
            got=f"x.dtype={x.dtype} for x.shape={x.shape}",
            fix="Pass x.real, or jnp.abs(x)",
            kind=TypeError,
        )
    return x
