"""Folds a batch norm into the kernel and bias of the linear layer beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from normjax import _checks, _leaves
from normjax._trees import check_known, show
from normjax._typing import Axes, BatchStats, FeatureArray, Kernel, Params
from normjax.deploy._wide import narrowed, widened

FUNCTION = "fold_batch_norm"
# These do not pad, or pad with elements of x, which are normalized like all others.
EXACT = ("VALID", "CIRCULAR", "REFLECT")
Padding = str | int | Sequence[int | tuple[int, int]]
Affine = tuple[np.ndarray, np.ndarray, np.ndarray]  # multiplier, mean and bias of each feature
Folded = tuple[np.ndarray, np.ndarray]


def fold_batch_norm(
    kernel: Kernel | np.ndarray,
    bias: FeatureArray | np.ndarray | None,
    params: Params,
    batch_stats: BatchStats,
    *,
    epsilon: float = 1e-5,
    feature_axes: Axes | None = None,
    before: bool = False,
    output_axes: Axes = -1,
    feature_group_count: int = 1,
    padding: Padding | None = None,
    transposed: bool = False,
) -> tuple[Kernel | np.ndarray, FeatureArray | np.ndarray]:
    r"""Folds batch norm at inference into the kernel and bias of the linear layer beside it.

    Inference then runs one layer instead of two, and quantizers see the weights that are actually
    used. With :math:`m = \gamma / \sqrt{\sigma^2 + \epsilon}` for each feature, a batch norm after
    the layer gives

    .. math:: m (W x + b - \mu) + \beta = (m W) x + \left(m (b - \mu) + \beta\right)

    for every linear layer: dense layers, and convolutions of any rank, grouped, depthwise, strided,
    dilated, transposed or padded. A batch norm before the layer (`before=True`) scales the input of
    the kernel, and the kernel multiplies its shift :math:`s = \beta - m \mu`:

    .. math:: W (m x + s) + b = (W m) x + (W s + b)

    If a convolution pads the output of the batch norm with zeros, these zeros lack the shift `s`,
    which a bias cannot correct. This raises an error unless `s` is zero.

    Args:
      kernel: floating-point, in Flax's layout: dense `(in, out)`, convolution `(*spatial, in /
        groups, out)`. For other layouts, pass the axes below.
      bias: `(out)`, or None for a layer without bias.
      params: the batch norm's `scale` and `bias`, each `(*features)`; both are optional.
      batch_stats: the batch norm's `mean` and `var`, each `(*features)`.
      epsilon: the batch norm's epsilon.
      feature_axes: the axes of the kernel that are the features of the batch norm. None means the
        outputs, -1, or with `before` the inputs, -2.
        `flax.linen.ConvTranspose(transpose_kernel=True)` has outputs at -2 and inputs at -1;
        PyTorch's convolutions have outputs at 0 and inputs at 1.
      before: whether the batch norm comes before the layer.
      output_axes: with `before`, the axes of the kernel that are the layer's outputs.
      feature_group_count: with `before`, the number of groups of the convolution.
      padding: with `before`, the padding of the convolution, as in Flax. "VALID", "CIRCULAR",
        "REFLECT" and 0 are exact. It is not needed if the kernel has size 1 along each spatial
        axis.
      transposed: with `before`, whether the convolution is transposed, and so inserts zeros between
        the elements of x.

    Returns:
      The kernel and bias in the dtype of the kernel, as NumPy arrays if the kernel is one,
      otherwise as JAX arrays. They are computed in float64 by NumPy, independent of JAX's x64 mode,
      and rounded once.

    Raises:
      TypeError: under `jax.jit` and other transformations; fold outside of them. ValueError: if
        leaves are missing, do not fit or are not finite; if a variance is negative; if folding with
        `before` would not be exact.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> kernel, bias = jnp.array([[1.0, 2.0]]), jnp.array([0.0, 1.0])
      >>> params = {"scale": jnp.array([1.0, 3.0]), "bias": jnp.array([0.5, 0.5])}
      >>> batch_stats = {"mean": jnp.array([1.0, 1.0]), "var": jnp.array([4.0, 9.0])}
      >>> kernel, bias = nj.fold_batch_norm(kernel, bias, params, batch_stats, epsilon=0.0)
      >>> print(kernel, bias)
      [[0.5 2. ]] [0.  0.5]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference" (CVPR 2018), section 3.2, eq. 14.
    """
    _check_not_traced(
        {"kernel": kernel, "bias": bias, "params": params, "batch_stats": batch_stats}
    )
    _checks.activations(FUNCTION, kernel, "kernel")
    wide = widened(FUNCTION, "kernel", kernel)
    given = (-2 if before else -1) if feature_axes is None else feature_axes
    axes = _checks.axes(FUNCTION, "feature_axes", given, wide.shape)
    norm = partial(_affine, params, batch_stats, epsilon, wide.dtype)
    if before:
        _check_padding(
            params, batch_stats, epsilon, wide, padding, len(axes) + np.size(output_axes)
        )
        layer = _layer(wide.shape, axes, output_axes, feature_group_count)
        check_borders = partial(_check_borders, wide.shape, layer, padding, transposed)
        folded = _fold_before(wide, bias, norm, layer, check_borders)
    else:
        folded = _fold_after(wide, bias, norm, axes)
    new_kernel, new_bias = folded
    new_kernel = narrowed(FUNCTION, "kernel", new_kernel, kernel)
    return new_kernel, narrowed(FUNCTION, "bias", new_bias, kernel)


class _Layer(NamedTuple):
    """The input and output axes of a kernel, non-negative and ascending, and its groups."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int


def _fold_after(
    wide: np.ndarray, bias: Any, norm: Callable[..., Affine], axes: tuple[int, ...]
) -> Folded:
    features = _sizes(wide, axes)
    multiplier, mean, shift = norm(features)
    kernel = wide * np.expand_dims(multiplier, _checks.other_axes(axes, wide.ndim))
    return kernel, multiplier * (_bias(bias, features) - mean) + shift


def _fold_before(
    wide: np.ndarray,
    bias: Any,
    norm: Callable[..., Affine],
    layer: _Layer,
    check_borders: Callable[[], None],
) -> Folded:
    first, *others = _sizes(wide, layer.inputs)
    multiplier, mean, shift = norm((first * layer.groups, *others))
    shift = shift - multiplier * mean
    if shift.any():
        check_borders()
    sums = (wide * _per_input(shift, wide, layer)).sum(_checks.other_axes(layer.outputs, wide.ndim))
    return wide * _per_input(multiplier, wide, layer), sums + _bias(bias, sums.shape)


def _affine(
    params: Params, batch_stats: BatchStats, epsilon: float, dtype: Any, features: tuple[int, ...]
) -> Affine:
    """Checks the leaves of a batch norm, and returns its multiplier, mean and bias."""
    check = partial(_leaves.leaves, FUNCTION, shape=features, dtype=dtype)
    check("params", params, optional=("scale", "bias"))
    check("batch_stats", batch_stats, required=("mean", "var"), optional=("count",))
    epsilon = _checks.number(FUNCTION, "epsilon", epsilon, 0.0, math.inf)
    mean = widened(FUNCTION, "batch_stats['mean']", batch_stats["mean"])
    var = widened(FUNCTION, "batch_stats['var']", batch_stats["var"])
    scale = widened(FUNCTION, "params['scale']", params.get("scale", 1.0))
    bias = widened(FUNCTION, "params['bias']", params.get("bias", 0.0))
    worst = (var + epsilon).min(initial=math.inf)
    if worst <= 0:
        _checks.raise_error(
            FUNCTION,
            "batch_stats['var'] is negative or too small to divide by its square root",
            expected="var + epsilon above 0 for each feature",
            got=f"{worst:.6g} at feature {int(var.argmin())} with epsilon={epsilon!r}",
            fix="Check where the statistics come from, and epsilon",
        )
    return scale / np.sqrt(var + epsilon) * np.ones(features), mean, bias


def _bias(bias: Any, features: tuple[int, ...]) -> np.ndarray:
    """Returns the bias of the linear layer, zeros if it has none."""
    if bias is None:
        return np.zeros(features)
    if np.shape(bias) != features:
        _checks.raise_error(
            FUNCTION,
            "bias does not fit the outputs of the kernel",
            expected=f"shape {features}, or None",
            got=f"shape {np.shape(bias)}",
            fix="Pass the bias of the same layer, and check feature_axes and output_axes",
        )
    return widened(FUNCTION, "bias", bias)


def _layer(
    shape: tuple[int, ...], inputs: tuple[int, ...], output_axes: Axes, groups: int
) -> _Layer:
    outputs = _checks.axes(FUNCTION, "output_axes", output_axes, shape)
    if set(inputs) & set(outputs):
        _checks.raise_error(
            FUNCTION,
            "an axis of the kernel is both input and output",
            expected="with before=True, feature_axes of the inputs and output_axes of the outputs",
            got=f"feature_axes={inputs} and output_axes={outputs} for kernel.shape={shape}",
            fix="A dense kernel (in, out) has feature_axes=-2 and output_axes=-1",
        )
    count = _checks.positive_int(groups)
    single = len(inputs) == len(outputs) == 1
    if count is None or (count > 1 and not (single and shape[outputs[0]] % count == 0)):
        _checks.raise_error(
            FUNCTION,
            "feature_group_count does not divide the outputs",
            expected="a positive int that divides the size of the one output axis",
            got=f"feature_group_count={groups!r} for kernel.shape={shape}, output_axes={outputs}",
            fix="Pass the feature_group_count of the convolution",
        )
    return _Layer(inputs, outputs, count)


def _per_input(values: np.ndarray, kernel: np.ndarray, layer: _Layer) -> np.ndarray:
    """Broadcasts a value per input feature to the kernel; each group reads its own features."""
    if layer.groups == 1:
        return np.expand_dims(values, _checks.other_axes(layer.inputs, kernel.ndim))
    (given,), (made,) = layer.inputs, layer.outputs
    by_output = values.reshape(layer.groups, -1).repeat(kernel.shape[made] // layer.groups, axis=0)
    by_output = by_output.T if given < made else by_output
    return np.expand_dims(by_output, _checks.other_axes((given, made), kernel.ndim))


def _check_padding(
    params: Params,
    batch_stats: BatchStats,
    epsilon: float,
    kernel: np.ndarray,
    padding: Any,
    channel_axes: int,
) -> None:
    """Raises an error for zero padding that no axes make foldable, before axes are checked."""
    spatial = sum(size > 1 for size in kernel.shape) > channel_axes
    exact = padding is None or (
        padding in EXACT if isinstance(padding, str) else not np.any(padding)
    )
    if exact or not spatial or not isinstance(batch_stats, dict) or "mean" not in batch_stats:
        return
    features = np.shape(batch_stats["mean"])
    multiplier, mean, bias = _affine(params, batch_stats, epsilon, kernel.dtype, features)
    if np.any(bias - multiplier * mean):
        _raise_for_borders(kernel.shape, padding, transposed=False)


def _check_borders(
    shape: tuple[int, ...], layer: _Layer, padding: Padding | None, transposed: bool
) -> None:
    """Raises an error if the convolution adds zeros, which lack the shift of the batch norm."""
    spatial = _checks.other_axes((*layer.inputs, *layer.outputs), len(shape))
    pointwise = all(shape[axis] == 1 for axis in spatial)
    if isinstance(padding, str):
        exact = padding in EXACT or (padding == "SAME" and pointwise)
    else:
        exact = pointwise if padding is None else not np.any(padding)
    if not exact or transposed:
        _raise_for_borders(shape, padding, transposed=transposed)


def _raise_for_borders(
    shape: tuple[int, ...], padding: Padding | None, *, transposed: bool
) -> NoReturn:
    _checks.raise_error(
        FUNCTION,
        "the zeros that the convolution adds to x lack the batch norm's shift",
        expected="with before=True, no zero padding and no transposed convolution, "
        "or bias - mean * multiplier = 0",
        got=f"padding={padding!r}, transposed={transposed} for kernel.shape={shape}",
        fix="Pass padding='VALID' if the convolution has it, or keep this batch norm",
    )


def _sizes(kernel: np.ndarray, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(kernel.shape[axis] for axis in axes)


def _check_not_traced(arguments: dict[str, Any]) -> None:
    for name, argument in arguments.items():
        for path, leaf in jax.tree.leaves_with_path(argument):
            check_known(
                FUNCTION,
                show(name, path),
                leaf,
                because="but folding is done once, in float64 with NumPy",
                fix="Fold outside of jax.jit, jax.grad and jax.vmap, and pass the result in",
            )
