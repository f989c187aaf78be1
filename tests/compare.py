"""Comparisons that compare: no NaN against NaN, no shape against another that broadcasts to it."""

import jax
import jax.numpy as jnp
import numpy as np


def widest(x):
    """`x` as a float64 or complex128 NumPy array."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def at_once(function, *arguments):
    """`function(*arguments)` as NumPy arrays, from one program.

    XLA takes longer to compile a program for each of the operations, which they would be run by
    otherwise.
    """
    return jax.device_get(jax.jit(function)(*arguments))


def assert_close(actual, expected, *, rtol=0.0, atol=0.0, dtype=None, case=""):
    """Asserts equal shapes, and |actual - expected| <= atol + rtol * |expected|, all finite.

    A failure names the case, if one is given.
    """
    assert np.isfinite(widest(expected)).all(), (
        f"{case} the expectation itself is not finite: {expected}"
    )
    assert np.shape(actual) == np.shape(expected), (
        f"{case} shape {np.shape(actual)}, not {np.shape(expected)}"
    )
    if dtype is not None:
        assert np.asarray(actual).dtype == dtype, (
            f"{case} dtype {np.asarray(actual).dtype}, not {np.dtype(dtype)}"
        )
    np.testing.assert_allclose(
        widest(actual), widest(expected), rtol=rtol, atol=atol, err_msg=str(case)
    )


def assert_trees_close(actual, expected, *, rtol=0.0, atol=0.0):
    """`assert_close` for each leaf of trees of one structure; a failure names the leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: assert_close(
            a, b, rtol=rtol, atol=atol, case=jax.tree_util.keystr(path)
        ),
        actual,
        expected,
    )


def assert_same_kind(actual, expected):
    """Trees of one structure, whose leaves agree in shape and dtype."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(_kind, actual) == jax.tree.map(_kind, expected)


def assert_identical(actual, expected, *, case=""):
    """Trees of one structure, whose leaves agree in shape, in dtype and bit for bit.

    A failure names the case, if one is given.
    """
    assert_same_kind(actual, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(_bits(a), _bits(b), err_msg=str(case)),
        actual,
        expected,
    )


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(widest(leaf)).all(), leaf


def _kind(leaf):
    return str((leaf.shape, leaf.dtype))


def _bits(leaf):
    return np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)


def rounding(*dtypes):
    """Returns what half precision adds to a tolerance: Flax rounds more often than normjax."""
    return max(
        8 * float(jnp.finfo(dtype).eps) if jnp.dtype(dtype).itemsize == 2 else 0.0
        for dtype in dtypes
    )


def weighted_sum(y):
    """A scalar that depends on each element of y in its own way."""
    return jnp.sum(jnp.sin(1 + jnp.arange(y.size)).reshape(y.shape) * y)


def largest(tree):
    """The largest absolute value of all leaves, or 1."""
    return max(
        [1.0, *(float(np.abs(widest(leaf)).max(initial=0)) for leaf in jax.tree.leaves(tree))]
    )
