"""Random arguments for `batch_norm`, and the rounding that it is allowed on them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import normjax as nj
from tests import reference
from tests.compare import assert_close, assert_same_kind, widest

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64, jnp.complex64)
# The one-pass variance is used up to a mean of 8 standard deviations: (1 + 8^2) roundings, and a
# few for the sums.
ROUNDINGS = 100


class Case(NamedTuple):
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    x: Any
    train: bool
    settings: dict[str, Any]


def draw_normal(rng, shape, dtype, mean=0.0, std=1.0):
    """A normal array; complex where the dtype is."""
    x = rng.normal(mean, std, shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(mean, std, shape)
    return x.astype(dtype)


@st.composite
def cases(draw, dtype):
    """Any rank, feature axes in any order and sign, masks that broadcast, and every option."""
    dtype = jnp.dtype(dtype)
    wide = np.result_type(np.float32, dtype if dtype.itemsize > 2 else np.float32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(1, 5))
    axes = draw(
        st.lists(
            st.sampled_from(range(rank)), unique=True, min_size=rank > 1, max_size=max(rank - 1, 1)
        )
    )
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    reduced = [axis for axis in range(rank) if axis not in axes]
    train = bool(reduced) and draw(st.booleans())
    ghosts = draw(st.sampled_from((None, 2, 3))) if train and 0 in reduced else None
    if train:
        shape[reduced[0]] = 6
    features = tuple(shape[axis] for axis in sorted(axes))
    settings = {
        "feature_axes": tuple(axis - draw(st.sampled_from((0, rank))) for axis in axes),
        "momentum": draw(st.sampled_from((0.0, 0.5, 0.9, 1.0, None))),
        "epsilon": draw(st.sampled_from((1e-5, 1e-3, 0.5))),
        "running_var": draw(st.sampled_from(("biased", "unbiased"))),
        "mask": None,
        "virtual_batch_size": ghosts,
    }
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from((1, size))) for size in shape][draw(st.integers(0, rank)) :]
        settings["mask"] = rng.random(sizes) < draw(st.sampled_from((0.3, 0.8)))
    leaves = draw(st.sets(st.sampled_from(("scale", "bias"))))
    params = {leaf: draw_normal(rng, features, wide, 1.0) for leaf in sorted(leaves)}
    batch_stats = {
        "mean": draw_normal(rng, features, wide, draw(st.sampled_from((0.0, 50.0)))),
        "var": rng.gamma(2.0, size=features).astype(np.finfo(wide).dtype),
        "count": np.array(draw(st.integers(0, 9)), np.int32),
    }
    x = draw_normal(
        rng, shape, dtype, draw(st.sampled_from((0.0, 3.0))), draw(st.sampled_from((0.1, 1.0)))
    )
    return Case(params, batch_stats, x, train, settings)


def check_against_reference(on_platform, case):
    """Runs the layer and compares y and the statistics with float64, to their rounding errors."""
    params, batch_stats, x, train, settings = case
    layer = partial(nj.batch_norm, train=train, **settings)
    actual, new = on_platform(layer, *jax.tree.map(jnp.asarray, (params, batch_stats, x)))
    expected, expected_new = reference.batch_norm(params, batch_stats, x, train, **settings)
    assert_same_kind(new, batch_stats)
    eps = float(jnp.finfo(batch_stats["mean"].dtype).eps)
    mean, var = reference.applied_statistics(batch_stats, x, train, **_subset(settings))
    scale = np.abs(widest(params.get("scale", 1.0))).max()
    gain = scale / np.sqrt(var + settings["epsilon"])
    # x and the mean are rounded before they are subtracted, the rest is relative; y is rounded once
    # to its dtype.
    rounded = eps * (gain * (np.abs(widest(x)) + np.abs(mean)).max() + np.abs(expected).max()).max()
    output = float(jnp.finfo(x.dtype).eps) if jnp.dtype(x.dtype).itemsize == 2 else 0.0
    assert_close(actual, expected, rtol=output, atol=ROUNDINGS * rounded, dtype=x.dtype)
    size = np.abs(widest(x)).max() + np.abs(mean).max()
    assert_close(new["mean"], expected_new["mean"], rtol=4 * eps, atol=ROUNDINGS * eps * size)
    # Errors far below epsilon are of no consequence to y; the unbiased estimate is at most twice
    # the biased one.
    precision = ROUNDINGS * eps
    assert_close(
        new["var"],
        expected_new["var"],
        rtol=precision,
        atol=2 * precision * (var.max() + settings["epsilon"]),
    )
    assert new["count"] == expected_new["count"]


def _subset(settings):
    return {name: settings[name] for name in ("feature_axes", "mask", "virtual_batch_size")}


def small(rng, shape=(8, 3), mean=2.0, std=1.5, dtype=np.float32):
    """Parameters, running statistics and x of the last axis's size, none of them at its start."""
    features = shape[-1]
    params = {
        "scale": draw_normal(rng, features, dtype, 1.0),
        "bias": draw_normal(rng, features, dtype),
    }
    batch_stats = {
        "mean": draw_normal(rng, features, dtype),
        "var": rng.gamma(2.0, size=features).astype(dtype),
    }
    return jax.tree.map(
        jnp.asarray, (params, batch_stats, draw_normal(rng, shape, dtype, mean, std))
    )
