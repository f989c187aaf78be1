"""The layers besides batch norm by their papers' formulas, in float64 NumPy; each returns y."""

import numpy as np

from tests import reference
from tests.compare import widest

# Where nothing counts: mean 0, variance (or mean square) 1.
NOTHING = (0.0, 1.0)


def axes_of(axes, ndim):
    """Axes as a sorted list of ints of 0 to ndim - 1."""
    return sorted(axis % ndim for axis in ([axes] if np.ndim(axes) == 0 else axes))


def others(axes, ndim):
    return tuple(axis for axis in range(ndim) if axis not in axes_of(axes, ndim))


def placed(leaf, ndim, feature_axes):
    """Returns a leaf laid out on the feature axes, its leading sizes on the first others."""
    leaf, features = widest(leaf), axes_of(feature_axes, ndim)
    homes = [*others(features, ndim)[: leaf.ndim - len(features)], *features]
    homes += [axis for axis in range(ndim) if axis not in homes]
    return np.moveaxis(leaf.reshape(leaf.shape + (1,) * (ndim - leaf.ndim)), range(ndim), homes)


def affine(params, y, feature_axes, scale_offset=0.0):
    """(scale_offset + scale) * y + bias, with what is there."""
    if "scale" in params:
        y = (scale_offset + placed(params["scale"], y.ndim, feature_axes)) * y
    return y + placed(params["bias"], y.ndim, feature_axes) if "bias" in params else y


def cleaned(x, mask, value=0.0):
    """x in double precision, with `value` for what the mask hides and is not finite."""
    x = widest(x)
    hidden = ~np.isfinite(x) & ~np.broadcast_to(True if mask is None else mask, x.shape)
    return np.where(hidden, value, x)


def moments(x, reduction_axes, mask=None):
    """Returns mean and variance of what counts, broadcastable to x; `NOTHING` if nothing counts."""
    axes = tuple(axes_of(reduction_axes, np.ndim(x)))
    parts = reference.moments(x, axes, mask)
    count, mean, var = (np.expand_dims(part, axes) for part in parts)
    return np.where(count > 0, mean, NOTHING[0]), np.where(count > 0, var, NOTHING[1])


def mean_square(x, reduction_axes, mask=None):
    axes = tuple(axes_of(reduction_axes, np.ndim(x)))
    counts = np.broadcast_to(True if mask is None else mask, np.shape(x))
    count = counts.sum(axes, keepdims=True)
    total = (np.abs(np.where(counts, widest(x), 0)) ** 2).sum(axes, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), NOTHING[1])


def layer_norm(
    params, x, *, reduction_axes=-1, feature_axes=-1, epsilon=1e-5, mask=None, scale_offset=0.0
):
    mean, var = moments(x, reduction_axes, mask)
    y = (cleaned(x, mask, mean) - mean) / np.sqrt(var + epsilon)
    return affine(params, y, feature_axes, scale_offset)


def rms_norm(
    params, x, *, reduction_axes=-1, feature_axes=-1, epsilon=1e-5, mask=None, scale_offset=0.0
):
    y = cleaned(x, mask) / np.sqrt(mean_square(x, reduction_axes, mask) + epsilon)
    return affine(params, y, feature_axes, scale_offset)


def group_moments(
    x, *, num_groups=None, group_size=None, reduction_axes=None, feature_axes=-1, mask=None
):
    """Mean and variance of each element's group, of x's shape: one group after another."""
    ndim, (feature,) = np.ndim(x), axes_of(feature_axes, np.ndim(x))
    axes = list(range(1, ndim)) if reduction_axes is None else axes_of(reduction_axes, ndim)
    channels = np.shape(x)[feature]
    size = group_size or channels // (num_groups or 32)
    mask = np.broadcast_to(True if mask is None else mask, np.shape(x))
    mean, var = np.empty(np.shape(x), widest(x).dtype), np.empty(np.shape(x))
    for start in range(0, channels, size):
        group = (slice(None),) * feature + (slice(start, start + size),)
        mean[group], var[group] = moments(np.asarray(x)[group], axes, mask[group])
    return mean, var


def group_norm(params, x, *, feature_axes=-1, epsilon=1e-5, mask=None, **groups):
    mean, var = group_moments(x, feature_axes=feature_axes, mask=mask, **groups)
    return affine(params, (cleaned(x, mask, mean) - mean) / np.sqrt(var + epsilon), feature_axes)


def space(ndim, feature_axes):
    """All axes but 0 and the features."""
    return tuple(axis for axis in others(feature_axes, ndim) if axis != 0)


def instance_norm(params, x, *, reduction_axes=None, feature_axes=-1, epsilon=1e-5, mask=None):
    axes = space(np.ndim(x), feature_axes) if reduction_axes is None else reduction_axes
    return layer_norm(
        params, x, reduction_axes=axes, feature_axes=feature_axes, epsilon=epsilon, mask=mask
    )


def filter_response_norm(
    params, x, *, reduction_axes=None, feature_axes=-1, epsilon=1e-6, mask=None
):
    axes = space(np.ndim(x), feature_axes) if reduction_axes is None else reduction_axes
    if "epsilon" in params:
        epsilon = epsilon + np.abs(placed(params["epsilon"], np.ndim(x), feature_axes))
    y = affine(
        params, cleaned(x, mask) / np.sqrt(mean_square(x, axes, mask) + epsilon), feature_axes
    )
    return (
        np.maximum(y, placed(params["threshold"], y.ndim, feature_axes))
        if "threshold" in params
        else y
    )


def global_response_norm(
    params, x, *, reduction_axes=None, feature_axes=-1, epsilon=1e-6, mask=None, scale_offset=0.0
):
    ndim = np.ndim(x)
    axes = space(ndim, feature_axes) if reduction_axes is None else axes_of(reduction_axes, ndim)
    counts = np.broadcast_to(True if mask is None else mask, np.shape(x))
    squares = np.abs(np.where(counts, cleaned(x, mask), 0)) ** 2
    norms = np.sqrt(squares.sum(tuple(axes), keepdims=True))
    channels = tuple(axes_of(feature_axes, ndim))
    number = counts.any(tuple(axes), keepdims=True).sum(channels, keepdims=True)
    mean = norms.sum(channels, keepdims=True) / np.maximum(number, 1)
    response = cleaned(x, mask) * norms / (mean + epsilon)
    return cleaned(x, mask) + affine(params, response, feature_axes, scale_offset)


def cumulative_moments(x, axis, **groups):
    """What `group_moments` gives of all positions up to each one, for that one."""
    mask = np.broadcast_to(groups.pop("mask", True), np.shape(x))
    mean, var = np.empty(np.shape(x), widest(x).dtype), np.empty(np.shape(x))
    for t in range(np.shape(x)[axis]):
        until, at = ((slice(None),) * axis + (part,) for part in (slice(t + 1), slice(t, t + 1)))
        last = (slice(None),) * axis + (slice(-1, None),)
        so_far = group_moments(np.asarray(x)[until], mask=mask[until], **groups)
        mean[at], var[at] = (part[last] for part in so_far)
    return mean, var


def local_response_norm(params, x, *, size=5, alpha=5e-4, beta=0.75, k=2.0, feature_axes=-1):
    (feature,) = axes_of(feature_axes, np.ndim(x))
    x = np.moveaxis(widest(x), feature, 0)
    y = np.empty_like(x)
    for c in range(len(x)):
        window = x[max(c - size // 2, 0) : c + (size - 1) // 2 + 1]
        y[c] = x[c] / (k + alpha / size * (np.abs(window) ** 2).sum(0)) ** beta
    return affine(params, np.moveaxis(y, 0, feature), feature_axes)


def dynamic_tanh(params, x, *, feature_axes=-1):
    return affine(params, np.tanh(widest(params["alpha"]) * widest(x)), feature_axes)


def batch_renorm(
    params,
    batch_stats,
    x,
    train,
    *,
    r_max=3.0,
    d_max=5.0,
    feature_axes=-1,
    momentum=0.99,
    epsilon=1e-5,
    running_var="biased",
    mask=None,
    virtual_batch_size=None,
):
    """Returns y and the new batch_stats (Ioffe 2017, algorithm 1)."""
    ghosts = {"mask": mask, "virtual_batch_size": virtual_batch_size}
    mean, var = reference.applied_statistics(
        batch_stats, x, train, feature_axes=feature_axes, **ghosts
    )
    old_mean, old_var = reference.applied_statistics(
        batch_stats, x, False, feature_axes=feature_axes
    )
    r_max, d_max = (
        float(limit(batch_stats["count"]) if callable(limit) else limit) for limit in (r_max, d_max)
    )
    std, old_std = np.sqrt(var + epsilon), np.sqrt(old_var + epsilon)
    r = np.clip(std / old_std, 1 / r_max, r_max) if train else 1.0
    d = np.clip((mean - old_mean) / old_std, -d_max, d_max) if train else 0.0
    y = affine(params, (cleaned(x, mask, mean) - mean) / std * r + d, feature_axes)
    if train:
        batch = reference.moments(x, others(feature_axes, np.ndim(x)), mask)
        batch_stats = reference.update(
            batch_stats, batch, momentum=momentum, running_var=running_var
        )
    return y, batch_stats


def weight_norm(params, kernel, *, feature_axes=-1, epsilon=1e-12):
    axes = others(feature_axes, np.ndim(kernel))
    total = (np.abs(widest(kernel)) ** 2).sum(axes, keepdims=True)
    return affine(params, widest(kernel) / np.sqrt(total + epsilon), feature_axes)


def weight_standardization(
    params, kernel, *, feature_axes=-1, scaled=False, epsilon=1e-5, epsilon_to="variance"
):
    axes = others(feature_axes, np.ndim(kernel))
    mean, var = moments(kernel, axes)
    fan_in = np.prod([np.shape(kernel)[axis] for axis in axes]) if scaled else 1
    if epsilon_to == "deviation":
        divisor = np.sqrt(fan_in * var) + epsilon
    else:
        divisor = np.sqrt(fan_in * var + epsilon)
    return affine(params, (widest(kernel) - mean) / divisor, feature_axes)


def spectral_norm(batch_stats, kernel, *, feature_axes=-1, n_steps=1):
    """Returns the kernel over its estimated sigma, and new batch_stats (Miyato et al. 2018)."""
    kernel, u = widest(kernel), widest(batch_stats["u"])
    features = axes_of(feature_axes, kernel.ndim)
    columns = int(np.prod([kernel.shape[axis] for axis in features]))
    w = kernel.transpose(*others(features, kernel.ndim), *features).reshape(-1, columns)
    v = np.zeros((1, w.shape[0]))
    for _ in range(n_steps):
        v = u @ w.conj().T / np.linalg.norm(u @ w.conj().T)
        u = v @ w / np.linalg.norm(v @ w)
    sigma = (v @ w @ u.conj().T).real.item()
    return kernel / sigma, {"u": u, "sigma": np.float64(sigma)}
