"""Compares how kernels turn with the equilibrium of learning rate and weight decay."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import ArrayLike, Float

from normjax import _checks
from normjax.diagnostics.instruments.rotation import Rotation
from normjax.optim import rotational_equilibrium
from normjax.optim.effective import OPTIMIZERS, Optimizer

FUNCTION = "equilibrium"


class Compared(NamedTuple):
    """A quantity as predicted and as observed, in float64 and the shape of the kernel's features.

    Attributes:
      predicted: the prediction from learning rate and weight decay.
      observed: the mean over the history.
      ratio: observed / predicted; infinite if the prediction is 0, as without gradients.
    """

    predicted: Float[np.ndarray, "..."]
    observed: Float[np.ndarray, "..."]
    ratio: Float[np.ndarray, "..."]


class Equilibrium(NamedTuple):
    """Whether a kernel is in rotational equilibrium: both ratios are near 1.

    Attributes:
      angle: the root mean square angle of a step, in radians.
      norm: the norm of the kernel: the fourth root of its mean fourth power for SGD, the root mean
        square for Adam.
      time_constant: the number of steps in which the distance from the equilibrium, measured by the
        4th power of the norm for SGD and by its square for Adam, falls to 1/e. A history should
        start a few time constants after a change of learning rate or weight decay.
    """

    angle: Compared
    norm: Compared
    time_constant: float


def equilibrium(
    history: Mapping[str, Rotation],
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.0,
    optimizer: Optimizer = "sgd",
) -> dict[str, Equilibrium]:
    r"""Compares how kernels turned with the equilibrium of learning rate and weight decay.

    .. math:: \hat\eta_{\mathrm{sgd}} = \sqrt{\frac{2 \eta \lambda}{1 + \alpha}}, \quad
              \lVert w \rVert^4_{\mathrm{sgd}} = \frac{\eta \, E[\lVert w \rVert^2 \lVert g
              \rVert^2]}
                                                      {2 \lambda (1 - \alpha)}, \qquad
              \hat\eta_{\mathrm{adam}} = \sqrt{2 \eta \lambda \frac{1 - \beta_1}{1 + \beta_1}},
              \quad \lVert w \rVert^2_{\mathrm{adam}} = \frac{\eta \dim w}{2 \lambda}

    Gradients are orthogonal to the kernel, so they lengthen it, and they turn it less the longer it
    is. Weight decay shortens it. In equilibrium the angle depends on neither the gradients nor the
    architecture, and only the product :math:`\eta \lambda` acts as a learning rate. Distances from
    the equilibrium decay as exp(-t / tau), with tau = (1 - alpha) / (4 eta lambda) for SGD and
    1 / (2 eta lambda) for AdamW.

    If a ratio is far from 1 after several tau, there are three possible reasons: the kernel is not
    invariant to its scale (see `scale_invariance`); gradients shrink or grow within tau; or, with
    momentum, gradients of successive steps are similar. The prediction assumes that they are
    independent; similar ones add up to longer steps and longer kernels.

    Args:
      history: the results of `rotation`, stacked over steps with one learning rate: each field
        is `(steps, *features)`, as from `lax.scan`. Leave out the first steps: `jax.tree.map(lambda
        field: field[1000:], history)`.
      learning_rate: eta.
      weight_decay: lambda. For "sgd", lambda times the kernel is added to the gradient; for "adam",
        the decay is decoupled (AdamW, where the learning rate multiplies it).
      momentum: alpha of SGD as in `optax.sgd`, or beta1 of Adam.
      optimizer: "sgd" or "adam".

    Returns:
      An `Equilibrium` for each kernel of the history.

    Raises:
      ValueError: for a history without steps, and for a weight decay or learning rate of 0, which
        has no equilibrium.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> lr, wd = 0.1, 0.05
      >>> def loss(w, key):  # a random loss that only depends on the direction of w
      ...     return jnp.vdot(jax.random.normal(key, w.shape), w) / jnp.linalg.norm(w)
      >>> def step(w, key):
      ...     g = jax.grad(loss)(w, key)
      ...     new = w - lr * (g + wd * w)
      ...     return new, nj.diagnostics.rotation(w, g, new, learning_rate=lr)
      >>> _, history = jax.lax.scan(step, jnp.ones(50), jax.random.split(jax.random.key(0), 3000))
      >>> late = jax.tree.map(lambda field: field[1000:], history)
      >>> (found,) = nj.diagnostics.equilibrium(late, learning_rate=lr, weight_decay=wd).values()
      >>> print(f"{found.angle.predicted:.3f} {found.angle.observed:.3f} {found.norm.ratio:.2f}")
      0.100 0.100 1.00

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017).
      Li, Lyu & Arora, "Reconciling Modern Deep Learning with Traditional Optimization Analyses: The
      Intrinsic Learning Rate" (NeurIPS 2020): eta lambda, and equilibrium after some 1 / (eta
      lambda) steps. Kosson, Messmer & Jaggi, "Rotational Equilibrium: How Weight Decay Balances
      Learning Across Neural Networks" (ICML 2024), Table 1.
    """
    _checks.choice(FUNCTION, "optimizer", optimizer, OPTIMIZERS)
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        _checks.between(FUNCTION, name, value, sys.float_info.min, math.inf)
    _checks.between(FUNCTION, "momentum", momentum, 0.0, 1 - sys.float_info.epsilon)
    if isinstance(history, Rotation):
        _raise_single()
    compare = _sgd if optimizer == "sgd" else _adam
    settings = (learning_rate, weight_decay, momentum)
    recorded = {path: _recorded(path, rotations) for path, rotations in history.items()}
    return {path: compare(rotations, *settings) for path, rotations in recorded.items()}


def _sgd(history: Any, rate: float, decay: float, momentum: float) -> Equilibrium:
    squares = np.mean(history.norm**2 * history.gradient_norm**2, 0)
    norm = (rate * squares / (2 * decay * (1 - momentum))) ** 0.25
    angle = rotational_equilibrium(rate, decay, momentum=momentum, optimizer="sgd")
    return Equilibrium(
        angle=_compared(angle, _mean(history.angle, 2)),
        norm=_compared(norm, _mean(history.norm, 4)),
        time_constant=(1 - momentum) / (4 * rate * decay),
    )


def _adam(history: Any, rate: float, decay: float, momentum: float) -> Equilibrium:
    norm = np.sqrt(rate / (2 * decay)) / history.chance[0]
    angle = rotational_equilibrium(rate, decay, momentum=momentum, optimizer="adam")
    return Equilibrium(
        angle=_compared(angle, _mean(history.angle, 2)),
        norm=_compared(norm, _mean(history.norm, 2)),
        time_constant=1 / (2 * rate * decay),
    )


def _mean(values: np.ndarray, power: int) -> np.ndarray:
    """Returns the root of the mean power over steps, such as the root mean square for 2."""
    return np.asarray(np.mean(values**power, 0) ** (1 / power))


def _compared(predicted: ArrayLike, observed: np.ndarray) -> Compared:
    predicted = np.full_like(observed, predicted)
    # A kernel without gradients is predicted to vanish.
    ratio = np.divide(observed, predicted, out=np.full_like(observed, np.inf), where=predicted != 0)
    return Compared(predicted, observed, ratio)


def _recorded(path: str, rotations: Rotation) -> Any:
    """Returns the history of a kernel in float64; raises an error if it has no steps."""
    fields: Any = [np.asarray(field, np.float64) for field in rotations]
    history: Any = Rotation(*fields)
    if history.norm.ndim == 0 or len(history.norm) == 0:
        _checks.raise_error(
            FUNCTION,
            "history has no steps",
            expected="fields whose first axis is the steps",
            got=f"norm of shape {history.norm.shape} for {path!r}",
            fix="Stack the Rotations: jax.tree.map(lambda *steps: jnp.stack(steps), *measured)",
        )
    return history


def _raise_single() -> NoReturn:
    _checks.raise_error(
        FUNCTION,
        "history is a single kernel's",
        expected="a dict of Rotations by path, as rotation returns",
        got="a Rotation",
        fix="Give it a name: {'kernel': history}",
        kind=TypeError,
    )
