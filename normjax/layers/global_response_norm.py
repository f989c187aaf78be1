"""Global response normalization (Woo et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn.initializers import zeros
from jaxtyping import Array

from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import (
    Activations,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DTypeLike,
    Initializer,
    Mask,
    Params,
    PRNGKey,
    promote,
)
from normjax.layers.affine import init_params, initial_scale, lay_out, scale_and_bias
from normjax.layers.jit_step import jit_step
from normjax.layers.operands import axes_within_examples, check_operands, check_spec
from normjax.platforms.plain import custom_jvp
from normjax.statistics.devices import pcast_like
from normjax.statistics.elements import Input, named, read
from normjax.statistics.per_example import ExampleSpec, mean_square
from normjax.statistics.spec import or_one


@with_foreign_names
def global_response_norm_init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    scale_init: Initializer = zeros,
    scale_offset: float = 0.0,
    bias_init: Initializer = zeros,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns the parameters that `global_response_norm` starts from, and `{}`.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x.
      use_scale: whether to use a learnable scale.
      use_bias: whether to use a learnable bias.
      scale_init: initializer of the scale.
      scale_offset: the constant that the layer adds to the stored scale. The default `scale_init`
        then stores `-scale_offset`, so that the effective scale starts at 0.
      bias_init: initializer of the bias.
      key: random key, only needed for a random initializer.
      param_dtype: dtype of scale and bias.

    Returns:
      `params`: a dict of `scale` and `bias` (zeros), each `(*num_features)`; and an empty
        `batch_stats`. With these, y equals x.

    Raises:
      ValueError: if a size is not positive. TypeError: if `param_dtype` is an integer type, or a
        random initializer has no key.

    Example:
      >>> import normjax as nj
      >>> print(nj.global_response_norm_init(2)[0]["scale"])
      [0. 0.]
    """
    if _foreign:
        raise_for_foreign(global_response_norm_init, _foreign)
    scale_init = initial_scale(scale_init, scale_offset, start=0)
    makers = {"scale": (use_scale, scale_init), "bias": (use_bias, bias_init)}
    params = init_params("global_response_norm_init", num_features, makers, key, param_dtype)
    return params, {}


class ResponseSpec(ExampleSpec):
    """The static arguments of a step whose epsilon is added to norms, not to their squares."""

    @property
    def least_variance(self) -> float:
        """Returns 2^-21 epsilon^2: squares below 2^-27 of it may underflow.

        Such squares belong to norms below 2^-24 epsilon.
        """
        return self.epsilon**2 * 2.0**-21


@jax.named_scope("global_response_norm")
@with_foreign_names
def global_response_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    scale_offset: float = 0.0,
    reduction_axes: Axes | None = None,
    feature_axes: Axes = -1,
    epsilon: float = 1e-6,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Scales each channel by its spatial norm, relative to the mean norm of all channels.

    .. math:: y = x + (o + \gamma)\, x\, \frac{G_c}{\frac1C \sum_k G_k + \epsilon} + \beta, \qquad
              G_c = \sqrt{\sum_i |x_{ic}|^2}

    with the norm G over the positions of one channel of one example. Scale and bias start at zero,
    so y starts equal to x. Use it in convolutional networks after the activation of a block's wide
    layer, where it keeps channels from becoming alike, as in ConvNeXt V2 (timm, Hugging Face
    transformers).

    Args:
      params: dict of `scale` and `bias`, each `(*features)`, or `(*leading, *features)` for a scale
        and bias per example. Leading dimensions must match the first non-feature axes of x. A
        missing scale is 1.
      batch_stats: `{}`.
      x: floating-point or complex, with examples along axis 0, such as `(batch, height, width,
        channels)`.
      train: Python bool. Training and inference compute the same values.
      scale_offset: o, added to the scale in at least float32; see `layer_norm`.
      reduction_axes: the axes over which the norm is computed; by default all but axis 0 and the
        feature axes.
      feature_axes: the axes of the channels; the mean of the norms is taken over them. A leaf has
        the sizes of these axes in ascending order.
      epsilon: added to the mean of the norms.
      mask: bool, broadcastable to x, True for elements that count; or non-negative weights, one per
        element. Elements that do not count do not affect the norms. If one of them is NaN or
        infinite, its y is the bias, which derivatives treat as a constant. The mean leaves out
        channels without any element that counts.
      axis_name: mapped axis or axes over which `reduction_axes` are sharded. Norms are all-reduced
        over them. The channels must not be sharded.
      axis_index_groups: groups of indices of that axis; each group shares norms, as in
        `jax.lax.psum`.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and `{}`. y is computed in at least float32 and rounded once. y and
      its gradients are accurate for x up to 1e23. A norm has no derivative at x = 0; there, the
      derivative of y is 1.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an invalid argument: a reduction over
        axis 0 or over a feature axis, wrong axes, leaves, dtypes or masks, or an axis name that is
        not in scope.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> x = jnp.array([[[3.0, 0.0], [4.0, 5.0]]])  # both norms are 5
      >>> params, batch_stats = nj.global_response_norm_init(2)
      >>> y, _ = nj.global_response_norm(params, batch_stats, x, train=True)
      >>> doubled, _ = nj.global_response_norm({"scale": jnp.ones(2)}, {}, x, train=True)
      >>> print(y.ravel(), doubled.ravel().round())
      [3. 0. 4. 5.] [ 6.  0.  8. 10.]

    References:
      Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (CVPR
      2023), section 3, eq. 1-3 and Algorithm 1.
    """
    if _foreign:
        raise_for_foreign(global_response_norm, _foreign)
    function = "global_response_norm"
    operands = check_operands(
        function,
        params,
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        mask=mask,
        dtype=dtype,
        find_axes=partial(axes_within_examples, function, reduction_axes),
    )
    spec = check_spec(
        function,
        operands,
        operands.axes,
        epsilon,
        axis_name,
        axis_index_groups,
        ResponseSpec,
        scale_offset=scale_offset,
    )
    return _global_response_norm(operands.params, operands.x, operands.mask, spec), batch_stats


@jit_step
def _global_response_norm(
    params: Params, x: Array, mask: Array | None, spec: ResponseSpec
) -> Array:
    params = lay_out(params, x.ndim, spec)
    inputs = read(x, mask)
    response = named(_relative_norms(spec, inputs, mask))
    dtype = promote(inputs.x32.dtype, *[leaf.dtype for leaf in params.values()])
    scale, bias = pcast_like(inputs.x32, *scale_and_bias(params, dtype))
    y = inputs.x32.astype(dtype) * (1 + scale * response.astype(dtype)) + bias
    if inputs.sound is not None:
        y = jnp.where(inputs.sound, y, lax.stop_gradient(bias))
    return y.astype(spec.dtype)


def _relative_norms(spec: ResponseSpec, x: Input, mask: Mask | None) -> Array:
    """Returns each channel's norm divided by the mean norm, with the rank of x; 0 if all are 0."""
    count, square = mean_square(spec, x, mask)
    # Two roots: the product of count and mean square may overflow.
    root_of_count = jnp.sqrt(jnp.asarray(count, square.dtype)) / spec.unit(x.x)
    norm = spec.expand(root_of_count * _root(square))
    if mask is None:
        mean = jnp.mean(norm, spec.feature_axes, keepdims=True)
    else:
        counted = jnp.broadcast_to(spec.expand(count) > 0, norm.shape).astype(norm.dtype)
        number = jnp.sum(counted, spec.feature_axes, keepdims=True)
        mean = jnp.sum(norm, spec.feature_axes, keepdims=True) / or_one(number)
    return _ratio(norm, or_one(mean + spec.epsilon))


@custom_jvp
def _ratio(a: Array, b: Array) -> Array:
    return a / b


@_ratio.defjvp
def _ratio_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Divides by the norm once. JAX's rule divides by its square, which may overflow."""
    a, b = primals
    a_dot, b_dot = tangents
    ratio = _ratio(a, b)
    return ratio, _ratio(a_dot - ratio * b_dot, b)


@custom_jvp
def _root(square: Array) -> Array:
    return jnp.sqrt(square)


@_root.defjvp
def _root_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Takes the derivative at 0, which is infinite, as 0. There, dy/dx is 1."""
    root = _root(*primals)
    positive = root > 0
    slope = _ratio(0.5 * tangents[0], jnp.where(positive, root, 1))
    return root, jnp.where(positive, slope, 0)
