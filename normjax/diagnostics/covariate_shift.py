"""Internal covariate shift, as the change of a layer's gradient when the layers before it are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from normjax import _checks
from normjax._trees import check_alike, open_module, path_names
from normjax.diagnostics._losses import Loss, checked, difference, differentiable, inner, norm

_FUNCTION = "internal_covariate_shift"


class CovariateShift(NamedTuple):
    """How much the gradient of each layer changes; with leading axes of steps, where it was recorded over them.

    Attributes:
      distance: the Euclidean distance of the two gradients, `(*steps, layers)`, in the order of
        `layers`; 0, up to rounding, for the first of them.
      cosine: the cosine of the angle between them, `(*steps, layers)`; 1 without a shift.
      gradient_norm: the length of the gradient before, `(*steps, layers)`; `distance /
        gradient_norm` compares networks.
    """

    distance: Float[Array, "*steps layers"]
    cosine: Float[Array, "*steps layers"]
    gradient_norm: Float[Array, "*steps layers"]


def internal_covariate_shift(
    loss: Loss, params: PyTree, updated: PyTree, *, layers: Sequence[str | Sequence[str]]
) -> CovariateShift:
    r"""Measures how much an update of the layers before a layer changes what its own gradient should have been.

    For layer i, at the parameters :math:`w_1 \dots w_k` of step t and those of step t + 1, *on the
    same batch*:

    .. math:: G_i  &= \nabla_{w_i} L(w_1^{(t)}, \dots, w_{i-1}^{(t)}, w_i^{(t)}, w_{i+1}^{(t)}, \dots, w_k^{(t)}) \\
              G'_i &= \nabla_{w_i} L(w_1^{(t+1)}, \dots, w_{i-1}^{(t+1)}, w_i^{(t)}, w_{i+1}^{(t)},
              \dots, w_k^{(t)})

    .. math:: \text{distance}_i = \lVert G_i - G'_i \rVert_2, \qquad
              \text{cosine}_i = \frac{\langle G_i, G'_i \rangle}{\lVert G_i \rVert_2 \lVert G'_i
              \rVert_2}

    It costs a gradient for each layer, and one more. It compiles itself, each time that it is
    called; in a training loop, call it inside of `jax.jit`.

    Args:
      loss: from parameters (or the module) to the loss, a scalar, on the batch of this step, with
        its random numbers, and in training mode; new statistics are left out.
      params: those of step t, any tree of arrays, or an nnx module. Read in at least float32.
      updated: those of step t + 1, in a tree like `params`, or a module like it.
      layers: the paths of the layers in the order that data passes them, as `"encoder/Dense_0"`; a
        tuple of paths is one layer, such as `("Dense_0", "BatchNorm_0")`. Each leaf of `params`
        belongs to one of them.

    Returns:
      A `CovariateShift` of `len(layers)` layers, in at least float32. The cosine is 1 where both
      gradients are zero, and 0 where one is.

    Raises:
      ValueError: for a leaf in no layer or in two, a layer that names no leaf, or trees that do not
        fit.
      TypeError: for parameters that are not real floating-point, or a loss that is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> def loss(params):
      ...     return 0.5 * (params["second"] * params["first"]) ** 2   # of the second layer: second * first ** 2
      >>> params, updated = {"first": 1.0, "second": 2.0}, {"first": 3.0, "second": 1.0}
      >>> shift = nj.diagnostics.internal_covariate_shift(loss, params, updated, layers=("first", "second"))
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

            partly = jax.tree.map(
                lambda old, new, j: jnp.where(j < i, new, old), params, updated, layer_of
            )
            return _compare(of_layer(before), of_layer(jax.grad(loss)(partly)))

        return lax.map(shift, jnp.arange(len(layers)))

    return measure(params, updated)


def _compare(before: PyTree, after: PyTree) -> CovariateShift:
    distance, length, other = norm(difference(before, after)), norm(before), norm(after)
    product = length * other
    cosine = jnp.clip(inner(before, after) / jnp.where(product > 0, product, 1), -1, 1)
    return CovariateShift(distance, jnp.where((length == 0) & (other == 0), 1, cosine), length)


def _layers(params: PyTree, layers: Sequence[str | Sequence[str]]) -> PyTree[int]:
    """Returns the number of each leaf's layer; refuses leaves and layers that do not belong to each other once."""
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in layers]
    paths = [path for group in groups for path in group]
    layer_of = {path: i for i, group in enumerate(groups) for path in group}
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = ["/".join(path_names(path)) for path, _ in flat]
    owners = {
        leaf: [path for path in paths if f"{leaf}/".startswith(f"{path}/")] for leaf in leaves
    }
    problems = [
        f"{path!r} of layers is no path in params" for path in paths if not _holds(path, owners)
    ]
    problems += [
        f"{leaf!r} is in {len(held)} layers" for leaf, held in owners.items() if len(held) != 1
    ]
    if problems:
        _checks.raise_error(
            _FUNCTION,
            problems[0],
            expected="layers that hold each leaf of params once",
            got=f"layers={layers!r} for the leaves {leaves}",
            fix="Name the layers in the order that data passes them: ('Dense_0', ('Dense_1', 'BatchNorm_0'))",
        )
    return jax.tree.unflatten(structure, [layer_of[owners[leaf][0]] for leaf in leaves])


def _holds(path: str, owners: Mapping[str, list[str]]) -> bool:
    return any(path in held for held in owners.values())
