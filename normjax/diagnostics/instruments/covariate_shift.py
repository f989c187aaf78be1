"""Measures how updates of earlier layers change a layer's gradient: internal covariate shift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from normjax import _checks
from normjax._trees import check_alike, open_module, path_names
from normjax.diagnostics.instruments._losses import (
    Loss,
    checked,
    difference,
    differentiable,
    inner,
    norm,
)

_FUNCTION = "internal_covariate_shift"


class CovariateShift(NamedTuple):
    """How much the gradient of each layer changes; stacked histories have leading axes of steps.

    Attributes:
      distance: the Euclidean distance between the gradients before and after the update of earlier
        layers, `(*steps, layers)`, in the order of `layers`; 0, up to rounding, for the first.
      cosine: the cosine of the angle between the two, `(*steps, layers)`; 1 without a shift.
      gradient_norm: the length of the gradient before the update, `(*steps, layers)`. To compare
        networks, use `distance / gradient_norm`.
    """

    distance: Float[Array, "*steps layers"]
    cosine: Float[Array, "*steps layers"]
    gradient_norm: Float[Array, "*steps layers"]


def internal_covariate_shift(
    loss: Loss, params: PyTree, updated: PyTree, *, layers: Sequence[str | Sequence[str]]
) -> CovariateShift:
    r"""Measures how much a layer's gradient changes when the layers before it are updated.

    For layer i, with the parameters :math:`w_1 \dots w_k` of step t and of step t + 1, *on the same
    batch*:

    .. math:: G_i  &= \nabla_{w_i} L(w_1^{(t)}, \dots, w_{i-1}^{(t)}, w_i^{(t)}, w_{i+1}^{(t)},
              \dots, w_k^{(t)}) \\
              G'_i &= \nabla_{w_i} L(w_1^{(t+1)}, \dots, w_{i-1}^{(t+1)}, w_i^{(t)}, w_{i+1}^{(t)},
              \dots, w_k^{(t)})

    .. math:: \text{distance}_i = \lVert G_i - G'_i \rVert_2, \qquad
              \text{cosine}_i = \frac{\langle G_i, G'_i \rangle}{\lVert G_i \rVert_2 \lVert G'_i
              \rVert_2}

    It computes a gradient for each layer, and one more. It compiles at each call; in a training
    loop, call it inside of `jax.jit`.

    Args:
      loss: maps parameters (or the module) to the loss, a scalar, on the batch of this step, with
        the random numbers of this step, in training mode and without new statistics.
      params: the parameters of step t, any tree of arrays, or an nnx module. They are read in at
        least float32.
      updated: the parameters of step t + 1, a tree or a module like `params`.
      layers: the paths of the layers in the order in which data passes them, such as
        `"encoder/Dense_0"`. A tuple of paths is one layer, such as `("Dense_0", "BatchNorm_0")`.
        Each leaf of `params` belongs to exactly one layer.

    Returns:
      A `CovariateShift` of `len(layers)` layers, in at least float32. The cosine is 1 if both
      gradients are zero, and 0 if only one is.

    Raises:
      ValueError: for a leaf in no layer or in two, a layer without leaves, or trees that do not
        match.
      TypeError: for parameters that are not real floating-point, or a loss that is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> def loss(params):  # its gradient for the second layer is second * first ** 2
      ...     return 0.5 * (params["second"] * params["first"]) ** 2
      >>> params, updated = {"first": 1.0, "second": 2.0}, {"first": 3.0, "second": 1.0}
      >>> layers = ("first", "second")
      >>> shift = nj.diagnostics.internal_covariate_shift(loss, params, updated, layers=layers)
      >>> print(shift.distance, shift.cosine)
      [ 0. 16.] [1. 1.]

    References:
      Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?" (NeurIPS
      2018), definition 2.1 and figure 3.
    """
    loss, params = checked(_FUNCTION, loss, params)
    updated, _ = open_module(updated, loss)
    check_alike(_FUNCTION, ("updated", updated), ("params", params))
    updated = differentiable(_FUNCTION, "updated", updated)
    layer_of = _layers(params, layers)

    @jax.jit
    def measure(params: PyTree, updated: PyTree) -> CovariateShift:
        before = jax.grad(loss)(params)

        def shift(i: Array) -> CovariateShift:
            def of_layer(tree: PyTree) -> PyTree:
                return jax.tree.map(lambda leaf, j: jnp.where(j == i, leaf, 0), tree, layer_of)

            def mix(old: Array, new: Array, j: int) -> Array:
                return jnp.where(j < i, new, old)

            mixed = jax.tree.map(mix, params, updated, layer_of)
            return _compare(of_layer(before), of_layer(jax.grad(loss)(mixed)))

        return lax.map(shift, jnp.arange(len(layers)))

    return measure(params, updated)


def _compare(before: PyTree, after: PyTree) -> CovariateShift:
    distance, length, other = norm(difference(before, after)), norm(before), norm(after)
    product = length * other
    cosine = jnp.clip(inner(before, after) / jnp.where(product > 0, product, 1), -1, 1)
    return CovariateShift(distance, jnp.where((length == 0) & (other == 0), 1, cosine), length)


def _layers(params: PyTree, layers: Sequence[str | Sequence[str]]) -> PyTree[int]:
    """Returns each leaf's layer by number; raises an error unless each leaf is in one layer."""
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in layers]
    paths = [path for group in groups for path in group]
    layer_of = {path: i for i, group in enumerate(groups) for path in group}
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = ["/".join(path_names(path)) for path, _ in flat]
    owners: dict[str, list[str]] = {}
    for leaf in leaves:
        owners[leaf] = [path for path in paths if f"{leaf}/".startswith(f"{path}/")]
    found = {path for own in owners.values() for path in own}
    problems = [f"{path!r} of layers is not in params" for path in paths if path not in found]
    for leaf, own in owners.items():
        if len(own) != 1:
            problems.append(f"{leaf!r} is in {len(own)} layers")
    if problems:
        _checks.raise_error(
            _FUNCTION,
            problems[0],
            expected="each leaf of params in one layer",
            got=f"layers={layers!r} for the leaves {leaves}",
            fix="Name the layers in the order that data passes them, such as "
            "('Dense_0', ('Dense_1', 'BatchNorm_0'))",
        )
    return jax.tree.unflatten(structure, [layer_of[owners[leaf][0]] for leaf in leaves])
