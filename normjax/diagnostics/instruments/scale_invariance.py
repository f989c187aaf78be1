"""Measures how far a network is invariant to the scale of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from normjax._trees import path_names, plain
from normjax._typing import Axes, DTypeLike
from normjax.optim.lengths import InvarianceTest, Settings, invariance_test


class ScaleInvariance(NamedTuple):
    """The effect of a parameter's scale, compared with a random change.

    Attributes:
      invariant: whether only the parameter's direction counts: `change` and `cosine / chance` are
        at most the tolerance, and the parameter has an influence.
      change: how far outputs move when the parameter is scaled, relative to how far they move with
        a random change of the same size: the largest value over `scales`. It is near 0 for a kernel
        before normalization, and near 1 for others.
      cosine: the cosine of the angle between the parameter and its gradient: the root mean square
        over random combinations of the outputs, and of all features the largest. It is 0 if they
        are orthogonal.
      chance: the root mean square cosine between random directions, 1 / sqrt(dim).
      influence: the effect of a random change of the parameter's size on the outputs, relative to
        the effect of the most influential leaf. Below 1e-6, as for a bias that batch norm cancels,
        the parameter has no direction to learn.
    """

    invariant: bool
    change: float
    cosine: float
    chance: float
    influence: float


def scale_invariance(
    params: PyTree,
    function: Callable[[Any], PyTree],
    *,
    feature_axes: Axes = (),
    scales: Sequence[float] = (0.5, 2.0),
    tolerance: float = 1e-2,
    dtype: DTypeLike | None = jnp.float64,
) -> dict[str, ScaleInvariance]:
    r"""Measures for each parameter how far the network is from being invariant to its scale.

    .. math:: f(c w) = f(w) \quad\Longrightarrow\quad \langle w, \nabla_w f \rangle = 0, \qquad
              \text{change} = \max_c \frac{\lVert f(c w) - f(w) \rVert}{\lVert f(w + |c - 1| v) -
              f(w) \rVert}, \qquad \text{cosine} = \frac{|\langle w, g \rangle|}{\lVert w \rVert
              \lVert g \rVert}

    with a random v that is as long as w. `normjax.optim.scale_invariant` makes a mask for an
    optimizer from the same test, at a point near `params`, in float64. The numbers say how close a
    kernel is to passing or failing. A `change` of 1e-5 is the effect of a normalization's epsilon,
    `epsilon / variance`. A `change` of 1e-2 shows an epsilon that is large relative to the
    variance, as after weight decay.

    Args:
      params: any tree of arrays, or an nnx module: its `nnx.Param`s.
      function: maps parameters (or the module) to a loss or outputs, any tree of arrays, on a few
        examples, in *training* mode and without new running statistics. It is compiled.
      feature_axes: the axes along which each feature has its own scale, such as -1 for the output
        channels before batch norm; `()` for one scale of the whole kernel.
      scales: the values of c. Along `feature_axes` they alternate from feature to feature.
      tolerance: the largest `change` and `cosine / chance` of an `invariant` parameter.
      dtype: the dtype to compute in; None for the dtypes of `params`.

    Returns:
      A `ScaleInvariance` of Python numbers for each leaf by its path, such as
      `"block/conv/kernel"`. Leaves of integers, and leaves with one number for each feature, are
      left out.

    Raises:
      ValueError: for parameters or outputs that are not finite (with their path), and for scales
        that are not positive.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> kernel_in = jax.random.normal(jax.random.key(1), (8, 4))
      >>> kernel_out = jax.random.normal(jax.random.key(2), (4, 2))
      >>> params = {"in": kernel_in, "out": kernel_out}
      >>> def function(params):
      ...     h, _ = nj.batch_norm(*nj.batch_norm_init(4), x @ params["in"], train=True)
      ...     return jax.nn.relu(h) @ params["out"]
      >>> for path, found in nj.diagnostics.scale_invariance(params, function).items():
      ...     print(path, found.invariant, f"{found.change:.0e}")
      in True 7e-06
      out False 7e-01

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
      Li & Arora, "An Exponential Learning Rate Schedule for Deep Learning" (ICLR 2020), Lemma 1.3.
    """
    settings = Settings(feature_axes, scales, tolerance, dtype)
    with invariance_test("scale_invariance", params, function, settings) as test:
        leaves = jax.tree_util.tree_leaves_with_path(plain(params))
        names = ["/".join(path_names(path)) for path, _ in leaves]
        return {names[i]: _numbers(test, i) for i in test.tested}


def _numbers(test: InvarianceTest, i: int) -> ScaleInvariance:
    changes = list(test.changes(i))
    return ScaleInvariance(
        invariant=test.passes(i, [test.radial(i), *changes]),
        change=max(changes, default=0.0),
        cosine=test.cosine(i),
        chance=test.chance(i),
        influence=test.influence(i),
    )
