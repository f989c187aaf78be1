"""Which kernels a network is invariant to the scale of, found by numbers."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from normjax import _checks
from normjax._typing import Axes, DTypeLike, promote
from normjax.optim._directions import inner, norm, unit
from normjax.optim._trees import check_arrays, check_finite, plain

_DRAWS = 3  # of output gradients
_NOISE = 0.3  # in the point of the test, relative to a leaf's root mean square
_NO_INFLUENCE = 1e-6  # of a leaf's derivative, relative to the largest


def scale_invariant(
    params: PyTree,
    function: Callable[[Any], PyTree],
    *,
    feature_axes: Axes = (),
    scales: Sequence[float] = (0.5, 2.0),
    tolerance: float = 1e-2,
    dtype: DTypeLike | None = jnp.float64,
) -> PyTree[bool]:
    r"""Finds the parameters that a network is invariant to the scale of, such as kernels before normalization.

    .. math:: f(c w) = f(w) \text{ for all } c > 0 \quad\Longrightarrow\quad
              \langle w, \nabla_w f \rangle = 0, \qquad \nabla f(c w) = \frac1c \nabla f(w)

    Each leaf is tested by itself, in two ways, both of which compare a change of length with a random change of the
    same size, v with the norm of w:

    .. math:: \frac{|\langle w, g \rangle|}{\lVert w \rVert \lVert g \rVert / \sqrt{\dim w}} \le \text{tolerance},
              \qquad
              \frac{\lVert f(c w) - f(w) \rVert}{\lVert f(w + |c - 1| v) - f(w) \rVert} \le \text{tolerance}

    with gradients g of random combinations of the outputs (root mean squares over them), and every c of `scales`. Both
    ratios are near 1, or larger, for other parameters, in whatever width and depth. The point of the test is `params`
    with noise: at the start of training, where biases are zeros, more is invariant than stays so.

    The epsilon of a normalization makes invariance approximate: the ratios are about `epsilon / variance` of what is
    normalized (3 times that for c = 0.5), some 1e-5 usually. Is the variance below 1e3 epsilon, the kernel is none.

    A leaf that the function does not depend on, such as a bias that batch norm cancels, is not among those that are
    found: it has no direction to learn. Nor is one of integers, or with single numbers along `feature_axes`.

    Args:
      params: any tree of arrays, or an nnx module: its `nnx.Param`s.
      function: from parameters (or the module) to what should be invariant: a loss or outputs, any tree of arrays, on a
        few examples of the usual scale, in *training* mode. With running statistics, nothing is invariant; new
        statistics, which do depend on the scale, are to be left out. It is compiled.
      feature_axes: the axes along which each feature has a scale of its own, such as -1 for the output channels before
        batch norm; `()` for one scale of the whole kernel, which is all that layer norm allows.
      scales: c. Along `feature_axes` each feature has another one of them.
      tolerance: largest ratio.
      dtype: to compute in; None for that of `params`, where the function cannot do otherwise. If it rounds to bfloat16
        inside, the ratios are some 0.01, and want a `tolerance` of 0.1.

    Returns:
      Python bools in a tree of the structure of `params` (nnx's variables opened): a mask for
      `project_scale_invariant` and `renormalize`.

    Raises:
      ValueError: for parameters or outputs that are not finite, by their path; scales that are not positive.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> keys = jax.random.split(jax.random.key(1))
      >>> params = {"in": jax.random.normal(keys[0], (8, 4)), "out": jax.random.normal(keys[1], (4, 2))}
      >>> def function(params):
      ...     h, _ = nj.batch_norm(*nj.batch_norm_init(4), x @ params["in"], train=True)
      ...     return jax.nn.relu(h) @ params["out"]
      >>> print(nj.optim.scale_invariant(params, function))
      {'in': True, 'out': False}

    References:
      Li & Arora, "An Exponential Learning Rate Schedule for Deep Learning" (ICLR 2020), Lemma 1.3.
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
    """
    for c in scales:
        _checks.between("scale_invariant", "scales", c, sys.float_info.min, math.inf)
    _checks.between("scale_invariant", "tolerance", tolerance, 0.0, 1.0)
    if not callable(function):
        _checks.refuse(
            "scale_invariant",
            "function cannot be called",
            expected="a function of params alone",
            got=f"function of type {type(function).__name__}",
            fix="The order is scale_invariant(params, function)",
            kind=TypeError,
        )
    params, function = _opened(params, function)
    arrays = plain(params)
    check_arrays("scale_invariant", "params", arrays)
    check_finite("scale_invariant", "params", arrays)
    structure = jax.tree.structure(arrays)
    with _precision(dtype):
        test = _Test(params, function, feature_axes, dtype)
        found = [test.finds(i, scales, tolerance) for i in range(structure.num_leaves)]
    return jax.tree.unflatten(structure, found)


def _opened(params: Any, function: Callable[[Any], PyTree]) -> tuple[PyTree, Callable[[Any], PyTree]]:
    """Of an nnx module, the state of its parameters, and the function of that state."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return params, function
    graphdef, state, others = nnx.split(params, nnx.Param, ...)
    return state, lambda state: function(nnx.merge(graphdef, state, others, copy=True))


@contextlib.contextmanager
def _precision(dtype: DTypeLike | None) -> Iterator[None]:
    """Allows for float64, and for constants of the function that are of less."""
    wide = contextlib.nullcontext() if dtype is None else jax.enable_x64(True)
    with wide, jax.numpy_dtype_promotion("standard"):
        yield


class _Slope(NamedTuple):
    """Derivatives along a leaf, and along random steps of its length: root mean squares, for each feature."""

    along: np.ndarray
    by_chance: np.ndarray


class _Test:
    """A function at a point near the parameters, and its derivatives there."""

    def __init__(self, params: PyTree, function: Callable[[Any], PyTree], feature_axes: Axes, dtype: DTypeLike | None):
        leaves, structure = jax.tree.flatten(params)
        self._random = np.random.default_rng(0)
        self._axes = {i: axes for i, leaf in enumerate(leaves) if (axes := _reduced(leaf, feature_axes))}
        self._point = [self._near(leaf, dtype) for leaf in leaves]

        @jax.jit
        def evaluate(leaves: list[Array]) -> tuple[Array, PyTree]:
            outputs = function(jax.tree.unflatten(structure, leaves))
            check_arrays("scale_invariant", "function(params)", outputs)
            return _real_vector(outputs), outputs

        self._evaluate = evaluate
        self._base, outputs = evaluate(self._point)
        check_finite("scale_invariant", "function(params)", outputs)
        self._slopes = self._differentiate()
        self._largest = max((slope.by_chance.max() for slope in self._slopes.values()), default=0.0)

    def finds(self, i: int, scales: Sequence[float], tolerance: float) -> bool:
        """Whether the i-th leaf passes both tests."""
        return i in self._axes and self._by_gradients(i, tolerance) and self._by_values(i, scales, tolerance)

    def _by_gradients(self, i: int, tolerance: float) -> bool:
        along, by_chance = self._slopes[i]
        counts = by_chance > _NO_INFLUENCE * self._largest
        return bool(counts.any() and (along <= tolerance * by_chance)[counts].all())

    def _by_values(self, i: int, scales: Sequence[float], tolerance: float) -> bool:
        w, axes = self._point[i], self._axes[i]
        features = tuple(1 if axis in axes else size for axis, size in enumerate(w.shape))
        for first in range(len(scales)):
            c = np.resize(np.roll(scales, -first), features)
            other = norm(w, axes) * unit(self._noise(w), axes)
            if not self._change(i, w * c) <= tolerance * self._change(i, w + np.abs(c - 1) * other):
                return False
        return True

    def _change(self, i: int, w: Array) -> float:
        """How far the outputs move with another i-th leaf."""
        w = w.astype(self._point[i].dtype)
        return float(jnp.linalg.norm(self._evaluate([*self._point[:i], w, *self._point[i + 1 :]])[0] - self._base))

    def _differentiate(self) -> dict[int, _Slope]:
        def combined(tested: dict[int, Array], weights: Array) -> Array:
            outputs, _ = self._evaluate([tested.get(i, leaf) for i, leaf in enumerate(self._point)])
            return jnp.vdot(weights, outputs)

        tested = {i: self._point[i] for i in self._axes}
        gradient = jax.jit(jax.grad(combined))
        draws = [gradient(tested, self._noise(self._base)) for _ in range(_DRAWS)]
        return {i: _slope(w, [jnp.conj(draw[i]) for draw in draws], self._axes[i]) for i, w in tested.items()}

    def _near(self, leaf: Array, dtype: DTypeLike | None) -> Array:
        """The leaf with noise, in the precision of the test; integers and keys as they are."""
        if not _inexact(leaf):
            return leaf
        leaf = jnp.asarray(leaf, leaf.dtype if dtype is None else promote(dtype, leaf.dtype))
        size = float(jnp.sqrt(jnp.mean(jnp.abs(leaf) ** 2))) or 1.0
        return leaf + (_NOISE * size * self._noise(leaf)).astype(leaf.dtype)

    def _noise(self, like: Array) -> Array:
        return jnp.asarray(self._random.standard_normal(like.shape), like.dtype)


def _slope(w: Array, gradients: list[Array], axes: tuple[int, ...]) -> _Slope:
    along = sum(np.asarray(inner(w, g, axes)) ** 2 for g in gradients)
    steepest = sum(np.asarray(norm(w, axes) * norm(g, axes)) ** 2 for g in gradients)
    return _Slope(np.sqrt(along), np.sqrt(steepest / math.prod(w.shape[axis] for axis in axes)))


def _reduced(leaf: Any, feature_axes: Axes) -> tuple[int, ...] | None:
    """The axes over which weights have one scale; None without such axes, or with a single weight along them."""
    kept = tuple(feature_axes) if isinstance(feature_axes, Sequence) else (feature_axes,)
    if not _inexact(leaf) or any(not -leaf.ndim <= axis < leaf.ndim for axis in kept):
        return None
    axes = _checks.other_axes([axis % leaf.ndim for axis in kept], leaf.ndim)
    return axes if math.prod(leaf.shape[axis] for axis in axes) > 1 else None


def _inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _real_vector(outputs: PyTree) -> Array:
    """All floating-point outputs as one real vector."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if _inexact(leaf)]
    if not leaves:
        _checks.refuse(
            "scale_invariant",
            "the function returns nothing that could change",
            expected="floating-point outputs, or a loss",
            got=f"{jax.tree.map(jnp.result_type, outputs)}",
            fix="Return what should be invariant",
        )
    return jnp.concatenate(
        [jnp.ravel(part) for leaf in leaves for part in ((leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,))]
    )
