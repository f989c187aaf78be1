"""Batch normalization as the papers state it, in float64 NumPy, with no thought of speed."""

from typing import NamedTuple

import numpy as np

from tests.compare import widest


class Moments(NamedTuple):
    count: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def moments(x, reduction_axes, mask=None):
    """Count, mean and biased variance of the elements that count; (0, 0, 0) where none does."""
    x = widest(x)
    mask = np.broadcast_to(True if mask is None else mask, x.shape)
    count = mask.sum(reduction_axes)
    n = np.maximum(count, 1)
    mean = np.where(mask, x, 0).sum(reduction_axes) / n
    deviation = np.where(mask, x - np.expand_dims(mean, reduction_axes), 0)
    return Moments(count, mean, (np.abs(deviation) ** 2).sum(reduction_axes) / n)


def update(batch_stats, batch, *, momentum=0.99, running_var="biased"):
    """One step of the running statistics towards those of a batch."""
    count, mean, var = batch
    new = dict(batch_stats)
    if "count" in batch_stats:
        new["count"] = batch_stats["count"] + int(np.any(count > 0))
    if momentum is None:
        momentum = 1 - 1 / max(int(new["count"]), 1)
    counted_for_var = count > 0
    if running_var == "unbiased":
        counted_for_var = count > 1
        var = var * count / np.maximum(count - 1, 1)
    old_mean, old_var = widest(batch_stats["mean"]), widest(batch_stats["var"])
    new["mean"] = np.where(count > 0, momentum * old_mean + (1 - momentum) * mean, old_mean)
    new["var"] = np.where(counted_for_var, momentum * old_var + (1 - momentum) * var, old_var)
    return new


def applied_statistics(
    batch_stats, x, train, *, feature_axes=-1, mask=None, virtual_batch_size=None
):
    """The mean and the variance that each element of x is normalized by, both of x's shape."""
    if train and virtual_batch_size is not None:
        mask = np.broadcast_to(True if mask is None else mask, x.shape)
        slices = [
            slice(start, start + virtual_batch_size)
            for start in range(0, x.shape[0], virtual_batch_size)
        ]
        parts = [
            applied_statistics(batch_stats, x[s], True, feature_axes=feature_axes, mask=mask[s])
            for s in slices
        ]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    reduced = _reduced(x, feature_axes)
    mean, var = widest(batch_stats["mean"]), widest(batch_stats["var"])
    if train:
        batch = moments(x, reduced, mask)
        mean = np.where(batch.count > 0, batch.mean, mean)
        var = np.where(batch.count > 0, batch.var, var)
    return tuple(np.broadcast_to(np.expand_dims(part, reduced), x.shape) for part in (mean, var))


def batch_norm(
    params,
    batch_stats,
    x,
    train,
    *,
    feature_axes=-1,
    momentum=0.99,
    epsilon=1e-5,
    running_var="biased",
    mask=None,
    virtual_batch_size=None,
):
    """Returns y and the new batch_stats."""
    mean, var = applied_statistics(
        batch_stats,
        x,
        train,
        feature_axes=feature_axes,
        mask=mask,
        virtual_batch_size=virtual_batch_size,
    )
    reduced = _reduced(x, feature_axes)
    scale, bias = (
        np.expand_dims(widest(params.get(*leaf)), _leaf_axes(params, leaf[0], reduced))
        for leaf in LEAVES
    )
    hidden = ~np.isfinite(widest(x)) & ~np.broadcast_to(True if mask is None else mask, x.shape)
    y = scale * (np.where(hidden, mean, widest(x)) - mean) / np.sqrt(var + epsilon) + bias
    if train:
        batch_stats = update(
            batch_stats, moments(x, reduced, mask), momentum=momentum, running_var=running_var
        )
    return y, batch_stats


LEAVES = (("scale", 1.0), ("bias", 0.0))


def _leaf_axes(params, leaf, reduced):
    return reduced if leaf in params else ()


def _reduced(x, feature_axes):
    kept = {axis % x.ndim for axis in np.atleast_1d(feature_axes)}
    return tuple(axis for axis in range(x.ndim) if axis not in kept)
