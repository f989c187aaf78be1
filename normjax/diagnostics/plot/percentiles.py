"""Draws how the distributions of layers' inputs change over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normjax import _checks
from normjax._trees import path_names
from normjax.diagnostics.instruments.percentiles import Percentiles
from normjax.diagnostics.plot._panels import panels, raise_single, steps_of


def percentiles(
    history: Percentiles,
    steps: Sequence[int] | None = None,
    *,
    feature: int | None = None,
    axes: Any = None,
) -> Figure:
    """Draws percentiles over the steps of training, as lines and a band in a panel for each layer.

    What to look for: if a band moves, widens or narrows, the layer has to follow its input.

    Args:
      history: the `percentiles` of each step, stacked: values are `(steps, q, *features)`.
      steps: the steps at which they were recorded; None for 0, 1, 2, ...
      feature: the number of the feature, counted over all feature axes; None for a typical one,
        whose middle percentile moves by the median amount.
      axes: matplotlib axes, one for each layer; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for a history of a single step, and for a feature, steps or axes that do not match
        it.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> x = jax.random.normal(jax.random.key(0), (20, 64, 3))  # the inputs at 20 steps
      >>> measure = lambda x: nj.diagnostics.percentiles({"Dense_0": x}, feature_axes=-1)
      >>> figure = nj.diagnostics.plot.percentiles(jax.vmap(measure)(x))
      >>> print(figure.axes[0].get_title())
      Dense_0, feature 0 of 3
    """
    layers = jax.tree_util.tree_leaves_with_path(history.values)
    q = np.asarray(history.q)
    if q.ndim != 2:
        stack = "jax.tree.map(lambda *x: jnp.stack(x), *history)"
        fix = f"Stack the percentiles of several steps: {stack}"
        raise_single("percentiles", f"q of shape {q.shape}", fix=fix)
    at = steps_of("percentiles", steps, len(q))
    figure, grid = panels("percentiles", axes, len(layers))
    for panel, (path, values) in zip(grid, layers, strict=True):
        flat = np.asarray(values).reshape(*q.shape, -1)
        index = _typical(flat) if feature is None else _feature(feature, flat.shape[-1])
        _draw(panel, at, q[0], flat[:, :, index])
        of = f", feature {index} of {flat.shape[-1]}" if values.ndim > 2 else ""
        panel.set_title("/".join(path_names(path)) + of, fontsize="medium")
    return figure


def _feature(feature: int, count: int) -> int:
    """Returns the feature, or 0 for a layer with one distribution; raises an error out of range."""
    if count == 1:
        return 0
    if not -count <= feature < count:
        _checks.raise_error(
            "plot.percentiles",
            "feature is out of range",
            expected=f"from 0 to {count - 1}",
            got=f"feature={feature}",
            fix="Choose one of them, or None for a typical one",
        )
    return feature


def _typical(values: np.ndarray) -> int:
    """Returns the feature whose middle percentile moves by the median amount."""
    middle = values[:, values.shape[1] // 2]
    order = np.argsort(np.ptp(middle, axis=0), kind="stable")
    return int(order[(len(order) - 1) // 2])


def _draw(panel: Axes, steps: np.ndarray, q: np.ndarray, values: np.ndarray) -> None:
    """Draws the percentiles `(steps, q)` of one feature."""
    (first,) = panel.plot(steps, values[:, 0], linewidth=0.8, label=f"{q[0]:g}%")
    color = first.get_color()  # the next color of the axes
    panel.fill_between(steps, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)
    for i, percentile in enumerate(q[1:], 1):
        middle = i == len(q) // 2
        width = 1.8 if middle else 0.8
        panel.plot(steps, values[:, i], color=color, linewidth=width, label=f"{percentile:g}%")
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
