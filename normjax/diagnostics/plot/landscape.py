"""Draws the loss and its gradient along the direction of each step, over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normjax.diagnostics.instruments.landscape import Landscape
from normjax.diagnostics.plot._panels import panels, raise_single, steps_of

_TITLES = ("loss", "distance of gradients", "effective smoothness")


class _Look(NamedTuple):
    color: str
    name: str


def landscape(
    histories: Landscape | Mapping[str, Landscape],
    steps: Sequence[int] | None = None,
    *,
    axes: Any = None,
) -> Figure:
    """Draws the ranges of loss and gradient distance, and the smoothness, over steps of training.

    What to look for: if the bands are narrow and low, the gradient predicts the effect of a step.
    The axes are logarithmic.

    Args:
      histories: the `landscape` of each step, stacked; or several such histories by name, to
        compare them.
      steps: the steps at which they were recorded; None for 0, 1, 2, ...
      axes: three matplotlib axes; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for a history of a single step, and for steps or axes that do not match it.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> loss = lambda params: jnp.sum(params ** 4)
      >>> walk = lambda w: nj.diagnostics.landscape(loss, jnp.full(3, w), step_sizes=(0.01, 0.1))
      >>> history = jax.tree.map(lambda *x: jnp.stack(x), walk(1.0), walk(0.5), walk(0.25))
      >>> figure = nj.diagnostics.plot.landscape({"quartic": history}, steps=(0, 100, 200))
      >>> print([panel.get_title() for panel in figure.axes])
      ['loss', 'distance of gradients', 'effective smoothness']
    """
    named = {"": histories} if isinstance(histories, Landscape) else histories
    figure, grid = panels("landscape", axes, 3)
    for i, (name, history) in enumerate(named.items()):
        if np.ndim(history.loss) != 1:
            got = f"loss of shape {np.shape(history.loss)}"
            stack = "jax.tree.map(lambda *x: jnp.stack(x), *history)"
            raise_single("landscape", got, fix=f"Stack the landscapes of several steps: {stack}")
        at, look = steps_of("landscape", steps, len(history.loss)), _Look(f"C{i}", name)
        _band(grid[0], at, history.loss_range, look)
        _band(grid[1], at, history.gradient_range, look)
        smoothness = np.asarray(history.smoothness)
        grid[2].plot(at, smoothness, linewidth=1.4, color=look.color, label=look.name)
    for panel, title in zip(grid, _TITLES, strict=True):
        panel.set(yscale="log", xlabel="step")
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3)
    if any(named):
        grid[0].legend(fontsize="small")
    return figure


def _band(panel: Axes, steps: np.ndarray, bounds: tuple[Any, Any], look: _Look) -> None:
    low, high = map(np.asarray, bounds)
    panel.fill_between(steps, low, high, alpha=0.3, linewidth=0, color=look.color, label=look.name)
    panel.plot(steps, low, color=look.color, linewidth=0.6)
    panel.plot(steps, high, color=look.color, linewidth=0.6)
