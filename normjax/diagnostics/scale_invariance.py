"""How invariant a network is to the scale of each parameter, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from normjax._trees import path_names, plain
from normjax._typing import Axes, DTypeLike
from normjax.optim.invariance import InvarianceTest, Settings, invariance_test


class ScaleInvariance(NamedTuple):
    """What the scale of a parameter does, beside what chance would do.

    Attributes:
      invariant: whether only its direction counts: `change` and `cosine / chance` are at most the
        tolerance, and it has an influence.
      change: how far outputs move when it is scaled, relative to how far they move with a random
        change of that size: the largest over `scales`. Near 0 for a kernel before normalization,
          near 1 for others.
      cosine: of the angle between it and its gradient, root mean square over random combinations of
        the outputs; the largest of all features. 0 where they are orthogonal.
      chance: that of a random direction, 1 / sqrt(dim).
      influence: of a random change of its size on the outputs, relative to the most influential
        leaf. Below 1e-6, as for a bias that batch norm cancels, it has no direction to learn.
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

    with random v of the norm of w. These are the numbers behind `normjax.optim.scale_invariant`,
    which makes the mask
    for an optimizer of them: the same test, at a point near `params`, in float64. They say how
      nearly a kernel passes
    or fails: a `change` of 1e-5 is the epsilon of a normalization, `epsilon / variance`; one of
      1e-2 is an epsilon that
    has become large beside what it normalizes, as weight decay makes it.

    Args:
      params: any tree of arrays, or an nnx module: its `nnx.Param`s.
      function: from parameters (or the module) to a loss or outputs, any tree of arrays, on a few
        examples, in *training* mode and without new running statistics. It is compiled.
      feature_axes: the axes along which each feature has a scale of its own, such as -1 for the
        output channels before batch norm; `()` for one scale of the whole kernel.
      scales: c. Along `feature_axes` each feature has another one of them.
      tolerance: largest `change` and `cosine / chance` of what is `invariant`.
      dtype: to compute in; None for that of `params`.

    Returns:
      A `ScaleInvariance` for each leaf by its path, `"block/conv/kernel"`, of Python numbers.
      Leaves without a
      length are absent: integers, and those with single numbers along `feature_axes`.

    Raises:
      ValueError: for parameters or outputs that are not finite, by their path; scales that are not
        positive.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> keys = jax.random.split(jax.random.key(1))
      >>> params = {"in": jax.random.normal(keys[0], (8, 4)), "out": jax.random.normal(keys[1], (4, 2))}
      >>> def function(params):
      ...     h, _ = nj.batch_norm(*nj.batch_norm_init(4), x @ params["in"], train=True)
      ...     return jax.nn.relu(h) @ params["out"]
      >>> for path, found in nj.diagnostics.scale_invariance(params, function).items():
      ...     print(path, found.invariant, f"{found.change:.0e}", f"{found.cosine / found.chance:.0e}")
      in True 1e-05 8e-07
      out False 1e+00 6e-01

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
      Li & Arora, "An Exponential Learning Rate Schedule for Deep Learning" (ICLR 2020), Lemma 1.3.
    """
    settings = Settings(feature_axes, scales, tolerance, dtype)
    with invariance_test("scale_invariance", params, function, settings) as test:
        paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain(params))]
        return {"/".join(paths[i]): _numbers(test, i) for i in test.tested}


def _numbers(test: InvarianceTest, i: int) -> ScaleInvariance:
    changes = list(test.changes(i))
    return ScaleInvariance(
        invariant=test.passes(i, [test.radial(i), *changes]),
        change=max(changes, default=0.0),
        cosine=test.cosine(i),
        chance=test.chance(i),
        influence=test.influence(i),
    )
