"""Tests how a function depends on the norms of its parameters."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from normjax import _checks
from normjax._trees import check_arrays, check_finite, open_module, plain
from normjax._typing import Axes, DTypeLike, promote
from normjax.optim.directions import inner, norm, unit

_DRAWS = 3  # the number of random output gradients
_NOISE = 0.3  # added to each leaf for the test, relative to its root mean square
_NO_INFLUENCE = 1e-6  # a smaller derivative, relative to the largest one, counts as 0


class Settings(NamedTuple):
    """The arguments of the public functions that use the test."""

    feature_axes: Axes
    scales: Sequence[float]
    tolerance: float
    dtype: DTypeLike | None


@contextlib.contextmanager
def invariance_test(
    name: str, params: PyTree, function: Callable[[Any], PyTree], settings: Settings
) -> Iterator[InvarianceTest]:
    """Yields the test, for use within the context; errors begin with `name`."""
    for c in settings.scales:
        _checks.between(name, "scales", c, sys.float_info.min, math.inf)
    _checks.between(name, "tolerance", settings.tolerance, 0.0, 1.0)
    _checks.must_be_callable(
        name,
        "function",
        function,
        expected="a function of params alone",
        fix=f"The order is {name}(params, function)",
    )
    params, function = open_module(params, function)
    arrays = plain(params)
    check_arrays(name, "params", arrays)
    check_finite(name, "params", arrays)
    with _precision(settings.dtype):
        yield InvarianceTest(name, params, function, settings)


class InvarianceTest:
    """A function at a point near the parameters, and how it depends on the norm of each leaf.

    Leaves are identified by their index. Only leaves in `tested` have a norm that can vary:
    integers and leaves with a single number per feature are excluded.
    """

    def __init__(
        self, name: str, params: PyTree, function: Callable[[Any], PyTree], settings: Settings
    ):
        leaves, structure = jax.tree.flatten(params)
        self._settings = settings
        self._random = np.random.default_rng(0)
        reduced = {i: _reduced(leaf, settings.feature_axes) for i, leaf in enumerate(leaves)}
        self._axes = {i: axes for i, axes in reduced.items() if axes}
        self._point = [self._near(leaf, settings.dtype) for leaf in leaves]

        @jax.jit
        def evaluate(leaves: list[Array]) -> tuple[Array, PyTree]:
            outputs = function(jax.tree.unflatten(structure, leaves))
            check_arrays(name, "function(params)", outputs)
            return _real_vector(name, outputs), outputs

        self._evaluate = evaluate
        self._base, outputs = evaluate(self._point)
        check_finite(name, "function(params)", outputs)
        self._slopes = self._differentiate()
        self._largest = max((slope.by_chance.max() for slope in self._slopes.values()), default=0.0)

    @property
    def tested(self) -> list[int]:
        """Returns the leaves that are tested."""
        return list(self._axes)

    def finds(self, i: int) -> bool:
        """Returns whether the function depends on the i-th leaf only through its direction."""
        if i not in self._axes:
            return False
        ratios = itertools.chain([self.radial(i)], self.changes(i))
        return self.passes(i, ratios)

    def passes(self, i: int, ratios: Iterable[float]) -> bool:
        """Returns whether the i-th leaf has an influence and all of its ratios are small.

        It stops at the first large ratio.
        """
        if self.influence(i) <= _NO_INFLUENCE:
            return False
        return all(ratio <= self._settings.tolerance for ratio in ratios)

    def influence(self, i: int) -> float:
        """Returns the derivative along random steps that are as long as the i-th leaf.

        The result is relative to the largest one of all leaves.
        """
        return float(self._slopes[i].by_chance.max() / (self._largest or 1.0))

    def radial(self, i: int) -> float:
        """Returns the derivative along the i-th leaf, relative to the one along random steps.

        The result is the maximum over features.
        """
        along, by_chance = self._slopes[i]
        counts = by_chance > _NO_INFLUENCE * self._largest
        return float((along[counts] / by_chance[counts]).max(initial=0.0))

    def cosine(self, i: int) -> float:
        """Returns the cosine between the i-th leaf and its gradient."""
        return self.radial(i) * self.chance(i)

    def chance(self, i: int) -> float:
        """Returns the root mean square cosine between the i-th leaf and random directions.

        At this cosine `radial` is 1.
        """
        sizes = [self._point[i].shape[axis] for axis in self._axes[i]]
        return 1 / math.sqrt(math.prod(sizes))

    def changes(self, i: int) -> Iterator[float]:
        """Yields, for each scale, how much the outputs change if the i-th leaf is scaled.

        The change is relative to that of a random change of the leaf of the same size.
        """
        w, axes = self._point[i], self._axes[i]
        features = tuple(1 if axis in axes else size for axis, size in enumerate(w.shape))
        for first in range(len(self._settings.scales)):
            c = np.resize(np.roll(self._settings.scales, -first), features)
            other = norm(w, axes) * unit(self._noise(w), axes)
            yield _ratio(self._change(i, w * c), self._change(i, w + np.abs(c - 1) * other))

    def _change(self, i: int, w: Array) -> float:
        """Returns how much the outputs change if w replaces the i-th leaf."""
        point = list(self._point)
        point[i] = w.astype(point[i].dtype)
        outputs, _ = self._evaluate(point)
        return float(jnp.linalg.norm(outputs - self._base))

    def _differentiate(self) -> dict[int, _Slope]:
        def combined(tested: dict[int, Array], weights: Array) -> Array:
            outputs, _ = self._evaluate([tested.get(i, leaf) for i, leaf in enumerate(self._point)])
            return jnp.vdot(weights, outputs)

        tested = {i: self._point[i] for i in self._axes}
        gradient = jax.jit(jax.grad(combined))
        draws = [gradient(tested, self._noise(self._base)) for _ in range(_DRAWS)]
        slopes = {}
        for i, w in tested.items():
            gradients = [jnp.conj(draw[i]) for draw in draws]
            slopes[i] = _slope(w, gradients, self._axes[i])
        return slopes

    def _near(self, leaf: Array, dtype: DTypeLike | None) -> Array:
        """Returns the leaf with noise, in the dtype of the test; integers and keys unchanged."""
        if not _inexact(leaf):
            return leaf
        leaf = jnp.asarray(leaf, leaf.dtype if dtype is None else promote(dtype, leaf.dtype))
        size = float(jnp.sqrt(jnp.mean(jnp.abs(leaf) ** 2))) or 1.0
        return leaf + (_NOISE * size * self._noise(leaf)).astype(leaf.dtype)

    def _noise(self, like: Array) -> Array:
        return jnp.asarray(self._random.standard_normal(like.shape), like.dtype)


class _Slope(NamedTuple):
    """Derivatives along a leaf, and along random steps of the same norm.

    They are root mean squares over the draws, for each feature.
    """

    along: np.ndarray
    by_chance: np.ndarray


def _slope(w: Array, gradients: list[Array], axes: tuple[int, ...]) -> _Slope:
    along = sum(np.asarray(inner(w, g, axes)) ** 2 for g in gradients)
    steepest = sum(np.asarray(norm(w, axes) * norm(g, axes)) ** 2 for g in gradients)
    return _Slope(np.sqrt(along), np.sqrt(steepest / math.prod(w.shape[axis] for axis in axes)))


def _ratio(change: float, other: float) -> float:
    """Returns the quotient, or 0 if nothing changes at all."""
    if other:
        return change / other
    return math.inf if change else 0.0


def _reduced(leaf: Any, feature_axes: Axes) -> tuple[int, ...] | None:
    """Returns the axes over which weights share one scale; None if each weight has its own."""
    features = tuple(feature_axes) if isinstance(feature_axes, Sequence) else (feature_axes,)
    if not _inexact(leaf) or any(not -leaf.ndim <= axis < leaf.ndim for axis in features):
        return None
    axes = _checks.other_axes([axis % leaf.ndim for axis in features], leaf.ndim)
    return axes if math.prod(leaf.shape[axis] for axis in axes) > 1 else None


def _inexact(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _real_vector(name: str, outputs: PyTree) -> Array:
    """Returns all floating-point outputs as one real vector."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if _inexact(leaf)]
    if not leaves:
        _checks.raise_error(
            name,
            "the function returns no floating-point output",
            expected="floating-point outputs or a loss",
            got=f"{jax.tree.map(jnp.result_type, outputs)}",
            fix="Return the outputs that should be invariant",
        )
    parts = []
    for leaf in leaves:
        parts += [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]
    return jnp.concatenate([jnp.ravel(part) for part in parts])


@contextlib.contextmanager
def _precision(dtype: DTypeLike | None) -> Iterator[None]:
    """Enables float64, and dtype promotion for functions with constants of lower precision."""
    wide = contextlib.nullcontext() if dtype is None else jax.enable_x64(True)
    with wide, jax.numpy_dtype_promotion("standard"):
        yield
