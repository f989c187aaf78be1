"""Finds the kernels to whose scale a network is invariant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from normjax._trees import plain
from normjax._typing import Axes, DTypeLike
from normjax.optim.lengths import Settings, invariance_test


def scale_invariant(
    params: PyTree,
    function: Callable[[Any], PyTree],
    *,
    feature_axes: Axes = (),
    scales: Sequence[float] = (0.5, 2.0),
    tolerance: float = 1e-2,
    dtype: DTypeLike | None = jnp.float64,
) -> PyTree[bool]:
    r"""Finds parameters whose scale does not affect the network, as in kernels before a norm.

    .. math:: f(c w) = f(w) \text{ for all } c > 0 \quad\Longrightarrow\quad
              \langle w, \nabla_w f \rangle = 0, \qquad \nabla f(c w) = \frac1c \nabla f(w)

    Each leaf is tested separately, in two ways. Both compare a change of its norm with a random
    change of the same size; v is random and has the norm of w:

    .. math:: \frac{|\langle w, g \rangle|}{\lVert w \rVert \lVert g \rVert / \sqrt{\dim w}}
              \le \text{tolerance}, \qquad
              \frac{\lVert f(c w) - f(w) \rVert}{\lVert f(w + |c - 1| v) - f(w) \rVert} \le
              \text{tolerance}

    with gradients g of random combinations of the outputs (root mean squares over them), for each c
    of `scales`. For parameters that are not invariant, both ratios are near 1 or larger, at any
    width and depth. The test adds noise to `params`, because at the start of training, when biases
    are zero, more parameters are invariant than later.

    The epsilon of a normalization makes the invariance approximate: the ratios are about `epsilon /
    variance`, with the variance of its input (3 times that for c = 0.5), usually about 1e-5. If the
    variance is below 1000 epsilon, the kernel is not reported as invariant.

    A leaf on which the function does not depend, such as a bias before batch norm, is not reported
    either, since it has no direction to learn. Integers, and leaves with a single number per
    feature, are not reported.

    Args:
      params: any tree of arrays, or an nnx module: its `nnx.Param`s.
      function: maps parameters (or the module) to what should be invariant: a loss or outputs (any
        tree of arrays) for a few typical examples, in *training* mode. With running statistics,
        nothing is invariant. Do not return new running statistics, which depend on the scale. The
        function is compiled.
      feature_axes: the axes along which each feature has its own scale, such as -1 for the output
        channels before batch norm; `()` for one scale of the whole kernel, as before layer norm.
      scales: the values of c. They alternate between the features along `feature_axes`.
      tolerance: the largest ratio for which a parameter is invariant.
      dtype: the dtype to compute in; None for the dtypes of `params`, if the function requires
        them. If the function rounds to bfloat16, the ratios are about 0.01, which requires a
        `tolerance` of 0.1.

    Returns:
      A tree of Python bools with the structure of `params` (without nnx variables): a mask for
      `project_scale_invariant` and `renormalize`.

    Raises:
      ValueError: if parameters or outputs are not finite, with their path; if a scale is not
        positive.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> kernel_in = jax.random.normal(jax.random.key(1), (8, 4))
      >>> kernel_out = jax.random.normal(jax.random.key(2), (4, 2))
      >>> params = {"in": kernel_in, "out": kernel_out}
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
