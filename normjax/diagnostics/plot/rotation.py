"""Draws norms, effective learning rates and angular updates over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from normjax.diagnostics.instruments.equilibrium import Equilibrium
from normjax.diagnostics.instruments.rotation import Rotation
from normjax.diagnostics.plot._panels import panels, raise_single, steps_of

_POINTS = 200  # the largest number of points in a line; more steps are averaged in blocks
_PANELS = {
    "norm": "norm",
    "effective_learning_rate": "effective learning rate",
    "angle": "angular update (radians a step)",
}


def rotation(
    history: Mapping[str, Rotation],
    equilibria: Mapping[str, Equilibrium] | None = None,
    *,
    steps: Sequence[int] | None = None,
    axes: Any = None,
) -> Figure:
    """Draws the norms of kernels, their effective learning rates, and the angles of their steps.

    What to look for: without weight decay, kernels before normalization grow, and turn less and
    less. With weight decay, all of them reach the dashed line, the rotational equilibrium, whatever
    their gradients are. The axes are logarithmic.

    Args:
      history: the results of `rotation`, stacked over steps: each field is `(steps, *features)`.
        Lines are root mean squares over features, and over blocks of steps if there are more than
        200.
      equilibria: the result of `equilibrium`; its predicted angles are the dashed lines.
      steps: the steps at which the history was recorded; None for 0, 1, 2, ...
      axes: three matplotlib axes; None for a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: for a history of a single step, and for steps or axes that do not match it.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> def step(w, key):
      ...     g, new = w, {"kernel": w["kernel"] + jax.random.normal(key, (50,))}
      ...     return new, nj.diagnostics.rotation(w, g, new, learning_rate=0.1)
      >>> keys = jax.random.split(jax.random.key(0), 20)
      >>> _, history = jax.lax.scan(step, {"kernel": jnp.ones(50)}, keys)
      >>> figure = nj.diagnostics.plot.rotation(history)
      >>> print([panel.get_title() for panel in figure.axes])
      ['norm', 'effective learning rate', 'angular update (radians a step)']
    """
    figure, grid = panels("rotation", axes, len(_PANELS))
    for i, (path, rotations) in enumerate(history.items()):
        for panel, name in zip(grid, _PANELS, strict=True):
            values = np.asarray(getattr(rotations, name), np.float64)
            if values.ndim == 0:
                stack = "jax.tree.map(lambda *steps: jnp.stack(steps), *measured)"
                fix = f"Stack the Rotations of several steps: {stack}"
                raise_single("rotation", f"{name} of shape () for {path!r}", fix=fix)
            at = _blocks(steps_of("rotation", steps, len(values)))
            height = np.sqrt(_blocks(values**2))
            panel.plot(at, height, color=f"C{i}", linewidth=1.4, label=path)
    predicted = [found.angle.predicted for found in (equilibria or {}).values()]
    for height in sorted({float(np.mean(angle)) for angle in predicted}):
        grid[-1].axhline(height, color="black", linestyle="--", linewidth=1, label="predicted")
    for panel, title in zip(grid, _PANELS.values(), strict=True):
        drawn = any((np.asarray(line.get_ydata()) > 0).any() for line in panel.lines)
        panel.set(yscale="log" if drawn else "linear", xlabel="step")
        panel.set_title(title, fontsize="medium")
        panel.grid(alpha=0.3, which="both")
    if history:
        grid[-1].legend(fontsize="small")
    return figure


def _blocks(values: np.ndarray) -> np.ndarray:
    """Returns the means over features and over blocks of steps; the last block may be smaller."""
    flat = values.reshape(len(values), -1).mean(1)
    starts = np.arange(0, len(flat), max(1, -(-len(flat) // _POINTS)))
    return np.add.reduceat(flat, starts) / np.diff(np.append(starts, len(flat)))
