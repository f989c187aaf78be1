"""Normalizes x by per-example statistics, with one derivative rule for statistics and output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from normjax._typing import Activations, DTypeLike, Mask, Params, promote
from normjax.layers.affine import inverse_deviation, scale_and_bias
from normjax.platforms.cpu import separate_operands
from normjax.platforms.plain import PLAIN, custom_jvp
from normjax.statistics.devices import ALONE, pcast_like
from normjax.statistics.elements import Input, named, real_product
from normjax.statistics.per_example import (
    ExampleSpec,
    example_moments,
    kept_moments,
    mean_square,
)
from normjax.statistics.spec import Moments, or_one


def has_one_derivative(spec: ExampleSpec, mask: Mask | None) -> bool:
    """Returns whether `normalize_by_own` applies: no mask, one device, and one statistic per row.

    If the statistics also vary along features, as in group norm, the rule of `affine` needs one
    reduction less.
    """
    features = spec.groups is not None or not set(spec.feature_axes) <= set(spec.axes)
    return not (PLAIN.value or features) and mask is None and spec.devices == ALONE


def normalize_by_own(
    spec: ExampleSpec, x: Input, params: Params, *, center: bool = True
) -> Activations:
    r"""Returns `(x - mean) / sqrt(var + epsilon) * scale + bias` with x's own mean and variance.

    Without `center`, the mean is 0, and the variance is the mean square. The derivative rule covers
    the whole function. :math:`\hat x` is the normalized x, and the bars are means over the reduced
    axes:

    .. math:: z = \frac{dx}{\sigma}, \qquad
              dy = \gamma \left( z - \overline{z} - \hat x\, \overline{\mathrm{Re}\, \hat x^* z}
              \right) + \hat x\, d\gamma + d\beta

    Its transpose, the gradient, is the same projection: it takes two sums over each row, and two
    over the examples. With separate derivatives of the parts, XLA's GPU and TPU backends would read
    x and the gradient of y once more.
    """
    dtype = promote(x.x32.dtype, *[leaf.dtype for leaf in params.values()])
    scale, bias = pcast_like(x.x32, *scale_and_bias(params, dtype))
    return _normalized(spec, center, Input(x.x, x.x32.astype(dtype)), scale, bias)


@partial(custom_jvp, nondiff_argnums=(0, 1))
def _normalized(spec: ExampleSpec, center: bool, x: Input, scale: Array, bias: Array) -> Array:
    mean, inverse = _statistics(spec, x, example_moments if center else None, scale.dtype)
    return (x.x32 - mean) * inverse * scale + bias


@_normalized.defjvp
def _normalized_jvp(
    spec: ExampleSpec, center: bool, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    x, scale, bias = primals
    mean, inverse = _statistics(spec, x, kept_moments if center else None, scale.dtype)
    mean, inverse = named(mean), named(inverse)
    y = (x.x32 - mean) * inverse * scale + bias
    return y, _derivative(spec, center, (x.x, mean, inverse, scale), *tangents)


def _statistics(
    spec: ExampleSpec, x: Input, moments: Callable[..., Moments] | None, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Returns the mean (0 without `moments`) and the inverse deviation, with the rank of x."""
    if moments is None:
        mean, (_, var) = jnp.zeros((), dtype), mean_square(spec, x, None)
    else:
        _, mean, var = moments(spec, x, None)
        mean = spec.expand(mean)
    unit = spec.unit(x.x)
    inverse = inverse_deviation(unit, spec.expand(var) + spec.epsilon * unit**2)
    return mean.astype(dtype), inverse.astype(dtype)


def _derivative(
    spec: ExampleSpec,
    center: bool,
    given: tuple[Array, ...],
    x_dot: Input,
    scale_dot: Array,
    bias_dot: Array,
) -> Array:
    """Returns dy. On CPUs, each term has its own x, mean, inverse deviation and scale.

    dx is divided by the deviation first, and the terms with only dx come last. The gradient then
    starts with the product of the scale and the gradient of y, and ends with the division, which
    XLA fuses into one GPU kernel.
    """
    one, two, three, four, five = zip(*[separate_operands(each, 5) for each in given], strict=True)
    z = x_dot.x32 * two[2]
    n = or_one(spec.count(z))
    along = spec.local_sum(real_product(_standardized(*one), z)) / -n
    mean_dot: Any = spec.local_sum(z) / -n if center else None
    dy = _standardized(*five) * scale_dot + bias_dot
    dy += _standardized(*three) * three[3] * spec.expand(along).astype(dy.dtype)
    if center:
        dy += four[3] * spec.expand(mean_dot)
    return dy + z * two[3]


def _standardized(x: Array, mean: Array, inverse: Array, _: Array) -> Array:
    return (x.astype(mean.dtype) - mean) * inverse
