"""Normalization by the statistics of all elements seen so far, as in reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Never

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from normjax import _checks, _leaves
from normjax._foreign import raise_for_foreign, with_foreign_names
from normjax._typing import (
    WIDE,
    Activations,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DTypeLike,
    Mask,
    Params,
    PRNGKey,
)
from normjax.layers.affine import init_params, normalize
from normjax.layers.jit_step import jit_step
from normjax.statistics.devices import device_group
from normjax.statistics.elements import Input, read
from normjax.statistics.lifetime import LEAVES, RESTS, add_batch, init_lifetime
from normjax.statistics.reduction import batch_moments
from normjax.statistics.running import unless_nonfinite
from normjax.statistics.spec import Spec

FUNCTION = "running_norm"


@with_foreign_names
def running_norm_init(
    num_features: int | Sequence[int],
    *,
    initial_count: float = 0.0,
    key: PRNGKey | None = None,
    param_dtype: DTypeLike = jnp.float32,
    **_foreign: Never,
) -> tuple[Params, BatchStats]:
    """Returns `{}` (there are no parameters) and the statistics that `running_norm` starts from.

    Args:
      num_features: the size of the feature axis; with several feature axes, their sizes in the
        order of the axes of x. Pass `()` for scalars, such as rewards.
      initial_count: the number of elements that the initial mean 0 and variance 1 count for: 0 in
        Brax and Acme, 1e-4 in Stable-Baselines3 and Gymnasium.
      key: has no effect, since nothing is initialized at random.
      param_dtype: dtype of the statistics if it is float32 or wider. Otherwise they are float32,
        since narrower ones would stop changing.

    Returns:
      An empty dict, and `batch_stats`: a dict of `mean` (zeros) and `var` (ones), each
      `(*num_features)`, and of `count`, a scalar. Each has a companion, `mean_rest`, `var_rest` and
      `count_rest` (zeros), which holds its rounding error.

    Raises:
      ValueError: if a size is not positive, or the count is negative. TypeError: if `param_dtype`
        is an integer type.

    Example:
      >>> import normjax as nj
      >>> params, batch_stats = nj.running_norm_init(3)
      >>> print(batch_stats["mean"], batch_stats["var"], batch_stats["count"])
      [0. 0. 0.] [1. 1. 1.] 0.0
    """
    if _foreign:
        raise_for_foreign(running_norm_init, _foreign)
    function = "running_norm_init"
    params = init_params(function, num_features, {}, key, param_dtype)
    features = _checks.sizes(function, "num_features", num_features)
    count = _checks.number(function, "initial_count", initial_count, 0.0, math.inf)
    return params, init_lifetime(features, count, param_dtype)


@dataclass(frozen=True)
class RunningSpec(Spec):
    """The static arguments of a step.

    Attributes:
      center: whether the mean is subtracted.
      clip: the bound of |y|; None for no bound.
      skip_nonfinite: whether to keep the statistics unchanged if the batch is not finite.
    """

    center: bool = True
    clip: float | None = None
    skip_nonfinite: bool = False


@jax.named_scope("running_norm")
@with_foreign_names
def running_norm(
    params: Params,
    batch_stats: BatchStats,
    x: Activations,
    train: bool,
    *,
    feature_axes: Axes = -1,
    epsilon: float = 1e-8,
    center: bool = True,
    clip: float | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    skip_nonfinite: bool = False,
    dtype: DTypeLike | None = None,
    **_foreign: Never,
) -> tuple[Activations, BatchStats]:
    r"""Normalizes each feature by the mean and variance of all elements seen so far.

    .. math:: y = \mathrm{clip}\left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, -c, c\right)

    In training, the statistics are first merged with those of the batch, with equal weight for
    every element seen so far, and y uses the merged statistics. At inference, the statistics are
    used and returned unchanged. In reinforcement learning, use it for observations, and with
    `center=False` for rewards (with the statistics of the returns): see the page "Reinforcement
    learning".

    It corresponds to `VecNormalize` of Stable-Baselines3, `NormalizeObservation` of Gymnasium and
    `running_statistics` of Brax and Acme. The first two update and then normalize in one call, as
    this function does; Brax and Acme have one function for each.

    Args:
      params: `{}`; there are no parameters.
      batch_stats: as `running_norm_init` returns it.
      x: real, floating-point, such as `(batch, features)` or `(environments, steps, features)`. A
        single value per feature is enough.
      train: Python bool: whether to update the statistics.
      feature_axes: the axes along which statistics vary; `()` for a single mean and variance of all
        elements.
      epsilon: added to the variance, as in Stable-Baselines3 and Gymnasium (1e-8). Brax also adds
        its `std_eps` (0) to the variance. Brax and Acme bound the standard deviation from below by
        1e-6; to match them, choose 1e-12.
      center: whether the mean is subtracted. The variance is around the mean in both cases.
      clip: c, the bound of :math:`|y|` (10 in Stable-Baselines3; `max_abs_value` in Brax). None: no
        bound.
      mask: bool, True for elements that count; or non-negative weights, one per element (a weight
        of 2 counts as two elements). It broadcasts to x, and has size 1 along `feature_axes`, since
        all features share it. If an element that does not count is NaN or infinite, its y is 0.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) over which batches are merged in
        training. All devices then have the same statistics.
      axis_index_groups: groups of indices of that axis; each group shares statistics, as in
        `jax.lax.psum`.
      skip_nonfinite: whether to keep all statistics unchanged if the batch has a NaN or an
        infinity. By default, the statistics become NaN and stay so.
      dtype: dtype of y; None for the dtype of x.

    Returns:
      `y`, with the shape of x, and the new `batch_stats`, with the structure, shapes and dtypes of
      the old ones. Statistics and y are computed in at least float32. `count + count_rest` is the
      exact number of elements up to :math:`2^{48}`, and even the smallest batch changes mean and
      variance. Derivatives treat all statistics as constants: :math:`dy / dx = 1 / \sqrt{\sigma^2 +
      \epsilon}`.

    Raises:
      ValueError, TypeError, NameError: at trace time, for an invalid argument: wrong axes, leaves
        or dtypes, a mask with a feature axis, an axis name that is not in scope, complex x, or
        statistics narrower than float32 in training.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.running_norm_init(1)
      >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])):
      ...     y, batch_stats = nj.running_norm(params, batch_stats, x, train=True)
      >>> print(batch_stats["mean"], batch_stats["var"], batch_stats["count"])
      [3.] [5.] 4.0
      >>> print((100 * y).round().ravel())
      [ 45. 134.]

    References:
      Andrychowicz et al., "What Matters In On-Policy Reinforcement Learning?" (ICLR 2021), section
      3.3. Merging: Chan, Golub & LeVeque (1983), eq. 2.1.
    """
    if _foreign:
        raise_for_foreign(running_norm, _foreign)
    train, x = _checks.static_train(FUNCTION, train), _checks.activations(FUNCTION, x)
    _must_be_real(x)
    kept = _checks.axes(FUNCTION, "feature_axes", feature_axes, x.shape)
    others = _checks.other_axes(kept, x.ndim)
    features = _leaves.params(FUNCTION, params, x, kept, others, known=())
    _check_statistics(batch_stats, features, x, train)
    mask = _checks.mask(FUNCTION, mask, x.shape)
    _must_not_hold_features(mask, kept, x)
    spec = RunningSpec(
        axes=others,
        feature_axes=kept,
        devices=device_group(FUNCTION, axis_name, axis_index_groups),
        epsilon=_checks.number(FUNCTION, "epsilon", epsilon, 0.0, math.inf),
        dtype=_checks.output_dtype(FUNCTION, dtype, x),
        center=_checks.boolean(FUNCTION, "center", center),
        clip=None if clip is None else _checks.number(FUNCTION, "clip", clip, 0.0, math.inf),
        skip_nonfinite=_checks.boolean(FUNCTION, "skip_nonfinite", skip_nonfinite),
    )
    if train:
        return _train_step(batch_stats, x, mask, spec)
    return _infer_step(batch_stats, x, mask, spec), batch_stats


@partial(jit_step, like=("x", "batch_stats"))
def _train_step(
    batch_stats: BatchStats, x: Array, mask: Array | None, spec: RunningSpec
) -> tuple[Array, BatchStats]:
    """Merges the batch into the statistics, and normalizes it by the new statistics."""
    inputs = read(x, mask)
    constants, weights = jax.tree.map(lax.stop_gradient, (inputs, mask))
    batch = batch_moments(spec, constants, weights)
    if spec.skip_nonfinite:
        batch = unless_nonfinite(batch)
    new = add_batch(batch_stats, batch)
    return _normalized(new, inputs, spec), new


@jit_step
def _infer_step(batch_stats: BatchStats, x: Array, mask: Array | None, spec: RunningSpec) -> Array:
    return _normalized(batch_stats, read(x, mask), spec)


def _normalized(batch_stats: BatchStats, x: Input, spec: RunningSpec) -> Array:
    mean, var = (lax.stop_gradient(spec.expand(batch_stats[leaf])) for leaf in ("mean", "var"))
    y = normalize(x, mean if spec.center else None, var, {}, spec.epsilon)
    if spec.clip is not None:
        bound = jnp.full_like(y, spec.clip)  # jet's rule does not accept a scalar
        y = jnp.maximum(jnp.minimum(y, bound), -bound)
    return y.astype(spec.dtype)


def _must_be_real(x: Array) -> None:
    if jnp.iscomplexobj(x):
        _checks.raise_error(
            FUNCTION,
            "x is complex",
            expected="a real x",
            got=f"x.dtype={x.dtype} for x.shape={x.shape}",
            fix="Pass the real and imaginary parts as separate features",
            kind=TypeError,
        )


def _check_statistics(
    batch_stats: BatchStats, features: tuple[int, ...], x: Array, train: bool
) -> None:
    """Raises an error for leaves that are missing, do not fit, or are too imprecise to update."""
    known = (*LEAVES, *RESTS)
    _leaves.leaves(
        FUNCTION, "batch_stats", batch_stats, shape=features, dtype=x.dtype, required=known
    )
    for leaf in known:
        kind = jax.typeof(batch_stats[leaf]).dtype
        if train and kind not in WIDE:
            _checks.raise_error(
                FUNCTION,
                f"batch_stats[{leaf!r}] is too imprecise to train with: it would stop changing",
                expected="float32 or wider in training; any float at inference",
                got=f"dtype {kind}",
                fix="Keep batch_stats in the dtype that running_norm_init gave it",
                kind=TypeError,
            )


def _must_not_hold_features(mask: Array | None, kept: tuple[int, ...], x: Array) -> None:
    """Raises an error for a mask that differs between features, since they share one count."""
    if mask is not None and any(mask.shape[axis] != 1 for axis in kept):
        _checks.raise_error(
            FUNCTION,
            "the mask has a feature axis, but all features share one count",
            expected=f"size 1 along feature_axes={kept}",
            got=f"mask.shape={mask.shape} for x.shape={x.shape}",
            fix="Give each element one weight, as in mask[..., None], or normalize the features "
            "separately",
        )
