"""The variance holds on data that are hard for it."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, widest
from tests.reference import moments


def hard(rng, shape):
    """Data whose mean is far from zero, from its first elements, or from most of its elements."""
    normal = rng.normal(size=shape)
    outlier, half = normal.copy(), normal.copy()
    outlier[0] = 1e4
    half[: shape[0] // 2] += 1e3
    return {
        "offset": normal + 1e4,
        "outlier": outlier,
        "half": half,
        "constant": normal * 0 + 3,
        "plain": normal,
    }


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1000, 3), (64, 20, 3), (7, 3), (33, 5, 5, 3), (1, 2, 3)])
def test_the_variance_is_right_to_float32(on_platform, rng, shape):
    axes = tuple(range(len(shape) - 1))
    run = on_platform.compiled(partial(nj.moments, reduction_axes=axes), jnp.zeros(shape))
    for data in hard(rng, shape).values():
        x = jnp.asarray(data, jnp.float32)
        seen, expected = run(x), moments(x, axes)
        # A mean is right to a rounding error of its own, or of the deviation.
        assert_close(
            seen.mean, expected.mean, rtol=1e-6, atol=1e-6 * max(1, np.sqrt(expected.var.max()))
        )
        # Rounding errors of 6e-8, random over a sum of up to 1,280 terms.
        assert_close(seen.var, expected.var, rtol=4e-6, atol=1e-12)


@pytest.mark.parametrize("deviations", [0.0, 5.0, 7.9, 9.0, 1e3])
def test_the_variance_of_many_elements_keeps_the_promise(on_platform, rng, deviations):
    """The promise of `batch_norm`, where one pass around zero is at its worst."""
    x = np.asarray(rng.normal(deviations, 1, (50_000, 16)), np.float32)
    moments = on_platform(partial(nj.moments, reduction_axes=0), x)
    assert_close(moments.var, widest(x).var(0), rtol=5e-5)
