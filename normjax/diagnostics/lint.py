"""What is wrong with a network, before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import PyTree

from normjax import _checks
from normjax._typing import AxisName
from normjax.diagnostics._findings import SEVERITIES, Finding, show_findings
from normjax.diagnostics._lint import biases, decay, rules
from normjax.diagnostics._lint.graph import Kind
from normjax.diagnostics._lint.model import FUNCTION, Model, open_model
from normjax.diagnostics._lint.network import Network

if TYPE_CHECKING:
    import optax


class Lint(tuple[Finding, ...]):
    """What `lint` found, errors first: a tuple of findings that prints as a list of advice.

    Example:
      >>> import normjax as nj
      >>> print(nj.diagnostics.Lint())
      nothing found
    """

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All of them, as those of a `Report`."""
        return tuple(self)

    def __repr__(self) -> str:
        return show_findings(self)


def lint(
    apply_fn: Callable[[Any, Any], Any],
    variables: Any,
    x: PyTree,
    *,
    optimizer: optax.GradientTransformation | None = None,
    steps: int | None = None,
    axis_name: AxisName | None = None,
    axis_size: int | None = None,
) -> Lint:
    r"""Finds the known mistakes around normalization in a network, before it is trained.

    Call it once, with the model, the batch and the optimizer that training is about to start with.
    The network is traced, not run, which takes seconds for a ResNet-50. What it normalizes is read
    from its operations, through `jit`, `remat`, `scan`, `cond`, `shard_map` and derivatives of its
    own, be the layers normjax's, Flax's or your own: wherever activations are multiplied by the
    inverse root of a statistic of themselves. Of batch norms, whose statistics are of several
    examples, and of the others:

    - `cancelled-bias` (note): a bias whose every way leads into means that are subtracted, with
      nothing between but sums, multiples, reshapes, casts and pooling. Batch norm cancels what is
      constant over examples and positions, instance norm what is constant over positions, layer and
      group norm what is constant over features, too; root mean square norms cancel nothing.
    - `decayed-scale` (warning; asks for `optimizer`): a scale or bias of a normalization changes
      without a gradient, and the more, the larger it is. Scales that are stored as what they differ
      from 1 by may decay.
    - `dropout-before` (warning): the input of a batch norm was dropped out, directly or before the
      last linear layer. In training, the variance is larger by :math:`1 / \text{keep}` or so than
      at inference. Masks of whole examples, as of stochastic depth, and noise do not count.
    - `few-values` (warning; error for 1): a batch norm's statistics are over fewer than 16 values,
      ghost batches and devices that share considered (where groups of devices do, normjax's layers
      count as if all did). Of n normal values the variance is off by :math:`\sqrt{2 / (n - 1)}`,
      37% at 16.
    - `slow-momentum` (warning; asks for `steps`): :math:`\text{momentum}^\text{steps} > 0.01`, the
      part of the running statistics that is still their initial value at the end.
    - `unsynced` (warning; under a mapped axis): a batch norm's examples are split over the axis,
      and its statistics are each device's own, the new running ones included.
    - `residual-scale` (note): what comes out of a normalization is added to a shortcut, and its
      scale is 1 everywhere, as it is before training; at 0, blocks would start as the identity.

    Weight decay as a part of the loss is not seen, nor are normalizations inside of Pallas kernels.

    Args:
      apply_fn: `apply_fn(variables, x)` does a forward pass in training mode, as in
        `nj.recalibrate`: it returns `(y, batch_stats)`, or what linen's `apply(...,
          mutable=["batch_stats"])` returns; of an nnx module, or of a
        model without batch statistics, whatever it likes. Keys for dropout are closed over.
      variables: `{"params": ..., "batch_stats": ...}` (all collections of linen), the pair
        `(params, batch_stats)`, a tree of parameters, or a `flax.nnx.Module` in training mode.
        Shapes alone are enough but for `residual-scale`.
      x: one training batch, that of a device under `axis_name`: an array, or a tree of them,
        examples along axis 0.
        Shapes are enough: `jax.ShapeDtypeStruct`.
      optimizer: that of training. It is asked for updates without gradients.
      steps: how many are planned.
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap that `apply_fn` is called
        under. A pmap or shard_map inside of it is seen without, a vmap is not. Plain jit over
        sharded batches shares by itself.
      axis_size: its size; None for the number of devices that there are.

    Returns:
      The findings, errors first, and in the order of the network. Nothing is changed.

    Raises:
      ValueError, TypeError: for an apply_fn that runs in inference mode, or returns no statistics;
        for steps or sizes that are no positive ints; for what is no optimizer. NameError: for an
        axis that is not named.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, "norm": params}
      >>> def apply_fn(variables, x):
      ...     params, batch_stats = variables
      ...     x = x @ params["dense"]["kernel"] + params["dense"]["bias"]
      ...     return nj.batch_norm(params["norm"], batch_stats, x, train=True)
      >>> print(nj.diagnostics.lint(apply_fn, (params, batch_stats), jnp.ones((32, 3)), steps=1000))
      note: cancelled-bias
        dense: norm subtracts the mean, and so cancels 'bias' of shape (4,)
        -> leave it out (use_bias=False); the normalization has a bias of its own
      <BLANKLINE>
      1 note

    References:
      Biases: Ioffe & Szegedy, "Batch Normalization" (2015), section 3.2. Decay: He et al., "Bag of
        Tricks for Image
      Classification with Convolutional Neural Networks" (2019), section 3.1. Dropout: Li et al.,
      "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift"
      (2019). Small batches: Wu & He, "Group Normalization" (2018). Residual branches: Goyal et al.,
      "Accurate, Large Minibatch SGD" (2017), section 5.1.
    """
    model = open_model(apply_fn, variables)
    if steps is not None:
        _check_count("steps", steps)
    network = Network(model, x, _mapped(axis_name, axis_size))
    _refuse_inference(network)
    found = [*biases.cancelled_biases(network)]
    if optimizer is not None:
        found += decay.decayed_scales(network, optimizer, _params(model))
    found += [*rules.dropout_before(network), *rules.few_values(network)]
    if steps is not None:
        found += rules.slow_momentum(network, steps)
    found += [*rules.unsynced(network), *rules.residual_scales(network)]
    return Lint(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _mapped(axis_name: AxisName | None, axis_size: int | None) -> dict[Hashable, int]:
    """Returns the mapped axes with their sizes."""
    if axis_size is not None:
        _check_count("axis_size", axis_size)
    if axis_name is None and axis_size is not None:
        _checks.raise_error(
            FUNCTION,
            "axis_size is that of no axis",
            expected="axis_name beside it",
            got=f"axis_size={axis_size}, axis_name=None",
            fix="Name the axis that apply_fn is mapped over",
        )
    names = (
        ()
        if axis_name is None
        else axis_name
        if isinstance(axis_name, (tuple, list))
        else (axis_name,)
    )
    return dict.fromkeys(names, axis_size or jax.device_count())


def _check_count(name: str, given: Any) -> None:
    if _checks.positive_int(given) is None:
        _checks.raise_error(
            FUNCTION,
            f"{name} is no count",
            expected="a positive int",
            got=f"{name}={given!r}",
            fix="Pass one",
        )


def _params(model: Model) -> PyTree:
    if "params" not in model.variables:
        _checks.raise_error(
            FUNCTION,
            "there are no parameters for the optimizer",
            expected="(params, batch_stats), or a dict with both",
            got=f"variables with {sorted(model.variables)}",
            fix="Pass all variables of the model",
        )
    return model.variables["params"]


def _refuse_inference(network: Network) -> None:
    """Refuses a network that leaves all of its running statistics alone."""
    kept = [
        layer
        for layer, number in network.updates.items()
        if network.graph.nodes[number].kind < Kind.MASK
    ]
    if kept and len(kept) == len(network.updates):
        _checks.raise_error(
            FUNCTION,
            "apply_fn runs in inference mode",
            expected="a forward pass of training, which moves running statistics",
            got=f"{len(kept)} running statistics that come back as they were, {kept[0].path}/{kept[0].name} among them",
            fix="Pass train=True, or use_running_average=False; of an nnx module, call train() first",
        )
