"""Which kernels a network is invariant to the scale of, found by numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from normjax._typing import Axes, DTypeLike
from normjax.optim._invariance import Settings, invariance_test
from normjax.optim._trees import plain


def scale_invariant(
    params: PyTree,
    function: Callable[[Any], PyTree],
    *,
    feature_axes: Axes = (),
    scales: Sequence[float] = (0.5, 2.0),
    tolerance: float = 1e-2,
    dtype: DTypeLike | None = jnp.float64,
) -> PyTree[bool]:
    r"""Finds the parameters that a network is invariant to the scale of, such as kernels before normalization.

    .. math:: f(c w) = f(w) \text{ for all } c > 0 \quad\Longrightarrow\quad
              \langle w, \nabla_w f \rangle = 0, \qquad \nabla f(c w) = \frac1c \nabla f(w)

    Each leaf is tested by itself, in two ways, both of which compare a change of length with a
    random change of the same size, v with the norm of w:

    .. math:: \frac{|\langle w, g \rangle|}{\lVert w \rVert \lVert g \rVert / \sqrt{\dim w}} \le \text{tolerance},
              \qquad
              \frac{\lVert f(c w) - f(w) \rVert}{\lVert f(w + |c - 1| v) - f(w) \rVert} \le
              \text{tolerance}

    with gradients g of random combinations of the outputs (root mean squares over them), and every
    c of `scales`. Both ratios are near 1, or larger, for other parameters, in whatever width and
    depth. The point of the test is `params`
    with noise: at the start of training, where biases are zeros, more is invariant than stays so.

    The epsilon of a normalization makes invariance approximate: the ratios are about `epsilon /
    variance` of what is normalized (3 times that for c = 0.5), some 1e-5 usually. Is the variance
    below 1e3 epsilon, the kernel is none.

    A leaf that the function does not depend on, such as a bias that batch norm cancels, is not
    among those that are
    found: it has no direction to learn. Nor is one of integers, or with single numbers along
      `feature_axes`.

    Args:
      params: any tree of arrays, or an nnx module: its `nnx.Param`s.
      function: from parameters (or the module) to what should be invariant: a loss or outputs, any
        tree of arrays, on a few examples of the usual scale, in *training* mode. With running
        statistics, nothing is invariant; new statistics, which do depend on the scale, are to be
        left out. It is compiled.
      feature_axes: the axes along which each feature has a scale of its own, such as -1 for the
        output channels before batch norm; `()` for one scale of the whole kernel, which is all that
        layer norm allows.
      scales: c. Along `feature_axes` each feature has another one of them.
      tolerance: largest ratio.
      dtype: to compute in; None for that of `params`, where the function cannot do otherwise. If it
        rounds to bfloat16 inside, the ratios are some 0.01, and want a `tolerance` of 0.1.

    Returns:
      Python bools in a tree of the structure of `params` (nnx's variables opened): a mask for
      `project_scale_invariant` and `renormalize`.

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
      >>> print(nj.optim.scale_invariant(params, function))
      {'in': True, 'out': False}

    References:
      Li & Arora, "An Exponential Learning Rate Schedule for Deep Learning" (ICLR 2020), Lemma 1.3.
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
    """
    structure = jax.tree.structure(plain(params))
    settings = Settings(feature_axes, scales, tolerance, dtype)
    with invariance_test("scale_invariant", params, function, settings) as test:
        return jax.tree.unflatten(structure, [test.finds(i) for i in range(structure.num_leaves)])
