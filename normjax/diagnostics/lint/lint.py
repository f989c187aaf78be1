"""Finds mistakes around normalization in a network, before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import jax
from jaxtyping import PyTree

from normjax import _checks
from normjax._typing import AxisName
from normjax.diagnostics.findings import SEVERITIES, Finding, show_findings
from normjax.diagnostics.lint import _rules
from normjax.diagnostics.lint._biases import cancelled_biases
from normjax.diagnostics.lint._decay import decayed_scales
from normjax.diagnostics.lint._graph import Kind
from normjax.diagnostics.lint._layout import channels_first
from normjax.diagnostics.lint._model import FUNCTION, Model, open_model
from normjax.diagnostics.lint._network import Network
from normjax.statistics import modules

if TYPE_CHECKING:
    import optax


class Lint(tuple[Finding, ...]):
    """The result of `lint`: a tuple of findings, errors first, that prints as a list of advice.

    Without findings it says what was examined.

    Attributes:
      examined: how many normalizations were examined, and by which rules.

    Example:
      >>> import normjax as nj
      >>> print(nj.diagnostics.Lint())
      nothing found
    """

    examined: str

    def __new__(cls, findings: Iterable[Finding] = (), examined: str = "") -> Self:
        """Makes it from findings and, for `print`, what was examined."""
        found = super().__new__(cls, findings)
        found.examined = examined
        return found

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Returns the findings, as `Report.findings` does."""
        return tuple(self)

    def __repr__(self) -> str:
        return (
            show_findings(self) if self or not self.examined else f"nothing found: {self.examined}"
        )


def lint(
    apply_fn: Callable[[Any, Any], Any] | Any,
    variables: Any,
    x: PyTree | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    steps: int | None = None,
    axis_name: AxisName | None = None,
    axis_size: int | None = None,
) -> Lint:
    r"""Finds the known mistakes around normalization in a network, before it is trained.

    Call it once before training, with the model, a batch and the optimizer. The network is traced,
    not run, which takes seconds for a ResNet-50. A normalization is found by its operations, also
    inside `jit`, `remat`, `scan`, `cond`, `shard_map` and custom derivatives: it multiplies
    activations by the inverse root of their own statistic. So normjax's layers, Flax's and your own
    are found. It is a batch norm if its statistics combine several examples.

    - `cancelled-bias` (note): a bias that mean subtraction removes on every path. Only sums,
      multiples, reshapes, casts, pooling, resizes and linear layers without padding may lie
      between the two. Batch norm removes what is constant over examples and positions, instance
      norm what is constant over positions, layer and group norm also what is constant over
      features. Root mean square norms remove nothing. A normalization's own bias is not reported if
      it passes linear layers first.
    - `channels-first` (warning): a convolution or a normalization takes positions for features,
      and the channels lie along another axis. The convolution before it tells which axis; without
      one, it is axis 1 of x, if x looks like images with at most 4 channels there: square, or in
      color with sides of at least 32 pixels.
    - `decayed-scale` (warning; needs `optimizer`): the optimizer changes a scale or bias of a
      normalization although its gradient is 0, and changes a larger one by more. Scales stored as
      an offset from 1 may be decayed.
    - `dropout-before` (warning): dropout was applied to the input of a batch norm, directly or
      before the last linear layer. The variance is then larger in training than at inference, by a
      factor of about :math:`1 / \text{keep}`. Masks of whole examples (stochastic depth) and noise
      are not reported.
    - `few-values` (warning; error for 1): each statistic of a batch norm is over fewer than 16
      values. Ghost batches and devices that share statistics are taken into account; if groups of
      devices share, normjax's layers count as if all devices did. The variance of n normally
      distributed values has a relative error of about :math:`\sqrt{2 / (n - 1)}`, 37% at 16.
    - `slow-momentum` (warning; needs `steps`): :math:`\text{momentum}^\text{steps} > 0.01`. At the
      end of training, that part of the running statistics is still their initial value.
    - `torch-momentum` (warning): a momentum between 0 and 0.5. Here it is the weight of the old
      value, in PyTorch the weight of the batch: PyTorch's 0.1 is 0.9 here. A momentum that depends
      on a count of batches is not reported.
    - `unsynced` (warning; under a mapped axis): a batch norm's examples are split over the axis,
      but each device computes and stores statistics of its own.
    - `residual-scale` (note): the output of a normalization is added to a shortcut, and its scale
      is 1 everywhere, as before training. With a scale of 0, the block would start as the identity.

    Weight decay in the loss is not found, nor are normalizations inside of Pallas kernels.

    Args:
      apply_fn: `apply_fn(variables, x)` is a forward pass in training mode, as in `nj.recalibrate`.
        It returns `(y, batch_stats)`, or what linen's `apply(..., mutable=["batch_stats"])`
        returns; it may return anything for an nnx module or a model without batch statistics. Close
        over keys for dropout. Instead of a function, it may be a linen or an nnx module, or a
        `TrainState`: this is called in training mode, with an argument such as `train=True` or
        `deterministic=False` if it takes one. A linen module without variables, `lint(model, x)`,
        is initialized.
      variables: `{"params": ..., "batch_stats": ...}` (all collections of linen), the pair
        `(params, batch_stats)`, a tree of parameters, or a `flax.nnx.Module` in training mode.
        Shapes are enough for all rules but `residual-scale`. Leave it out if the first argument is
        an nnx module or a `TrainState`, which have their own variables: `lint(state, x)`.
      x: one training batch (one device's under `axis_name`): an array, or a tree of arrays, with
        examples along axis 0. Shapes are enough: `jax.ShapeDtypeStruct`.
      optimizer: the optimizer that will train the network; None for the optimizer of a
        `TrainState`, if one is passed. It is called with gradients of 0.
      steps: the number of training steps that are planned.
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap that `apply_fn` is called
        under. It is not needed for a pmap or shard_map inside of `apply_fn`, but it is for a vmap
        there. Under plain jit, statistics are over the whole sharded batch anyway.
      axis_size: the size of the axis; None for the number of devices.

    Returns:
      The findings, errors first, then in the order of the network. Nothing is changed.

    Raises:
      ValueError, TypeError: for an apply_fn that runs in inference mode or returns no statistics,
        for steps or sizes that are not positive ints, and for a wrong optimizer. NameError: for an
        unbound axis name.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, "norm": params}
      >>> def apply_fn(variables, x):
      ...     params, batch_stats = variables
      ...     x = x @ params["dense"]["kernel"] + params["dense"]["bias"]
      ...     return nj.batch_norm(params["norm"], batch_stats, x, train=True)
      >>> variables, x = (params, batch_stats), jnp.ones((32, 3))
      >>> print(nj.diagnostics.lint(apply_fn, variables, x, steps=1000))
      note: cancelled-bias
        dense: norm subtracts the mean, and so cancels 'bias' of shape (4,)
        -> leave it out (use_bias=False); the normalization has a bias of its own
      <BLANKLINE>
      1 note

    References:
      Biases: Ioffe & Szegedy, "Batch Normalization" (2015), section 3.2. Decay: He et al., "Bag of
      Tricks for Image Classification with Convolutional Neural Networks" (2019), section 3.1.
      Dropout: Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by
      Variance Shift" (2019). Small batches: Wu & He, "Group Normalization" (2018). Residual
      branches: Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 5.1.
    """
    given = (variables,) if x is None else (variables, x)
    opened = modules.open_model(FUNCTION, apply_fn, given, train=True)
    optimizer = opened.optimizer if optimizer is None else optimizer
    model = open_model(opened.function, opened.variables)
    (x,) = opened.inputs
    if steps is not None:
        _check_count("steps", steps)
    network = Network(model, x, _mapped(axis_name, axis_size))
    _check_training(network)
    found = [*cancelled_biases(network), *channels_first(network)]
    if optimizer is not None:
        found += decayed_scales(network, optimizer, _params(model))
    found += _by_rules(network, steps)
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    left_out = {
        "decayed-scale (needs optimizer)": optimizer is None,
        "slow-momentum (needs steps)": steps is None,
        "unsynced (needs axis_name)": axis_name is None,
    }
    return Lint(found, _examined(network, [rule for rule, missing in left_out.items() if missing]))


def _by_rules(network: Network, steps: int | None) -> Iterator[Finding]:
    """Yields what the rules about single normalizations find."""
    yield from _rules.dropout_before(network)
    yield from _rules.few_values(network)
    if steps is not None:
        yield from _rules.slow_momentum(network, steps)
    yield from _rules.torch_momentum(network)
    yield from _rules.unsynced(network)
    yield from _rules.residual_scales(network)


def _examined(network: Network, left_out: list[str]) -> str:
    """Describes how many normalizations passed, or that there are none, and what was left out."""
    count = len(network.norms)
    leaves = f"{len(network.leaves)} {'leaf' if len(network.leaves) == 1 else 'leaves'}"
    if not count:
        return (
            f"there is no normalization among {len(network.graph.nodes)} values made from "
            f"{leaves}. A normalization multiplies activations by the inverse root (rsqrt, sqrt or "
            "pow) of their own statistic; it is not seen inside of a Pallas kernel or at inference"
        )
    passed = f"{count} normalization{'s' * (count > 1)} of a network with {leaves} passed"
    return passed + (f"; not applied: {', '.join(left_out)}" if left_out else "")


def _mapped(axis_name: AxisName | None, axis_size: int | None) -> dict[Hashable, int]:
    """Returns the mapped axes with their sizes."""
    if axis_size is not None:
        _check_count("axis_size", axis_size)
    if axis_name is None and axis_size is not None:
        _checks.raise_error(
            FUNCTION,
            "axis_size is given without an axis",
            expected="axis_name and axis_size together",
            got=f"axis_size={axis_size}, axis_name=None",
            fix="Name the axis that apply_fn is mapped over",
        )
    if axis_name is None:
        return {}
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    return dict.fromkeys(names, axis_size or jax.device_count())


def _check_count(name: str, given: Any) -> None:
    if _checks.positive_int(given) is None:
        _checks.raise_error(
            FUNCTION,
            f"{name} is not a count",
            expected="a positive int",
            got=f"{name}={given!r}",
            fix=f"Pass {name} as an int of 1 or more",
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


def _check_training(network: Network) -> None:
    """Raises an error if the network updates none of its running statistics."""
    kinds = {leaf: network.graph.nodes[number].kind for leaf, number in network.updates.items()}
    unchanged = [leaf for leaf, kind in kinds.items() if kind < Kind.MASK]
    if unchanged and len(unchanged) == len(network.updates):
        first = unchanged[0]
        _checks.raise_error(
            FUNCTION,
            "apply_fn runs in inference mode",
            expected="a forward pass in training mode, which updates running statistics",
            got=f"{len(unchanged)} running statistics that do not change, such as "
            f"{first.path}/{first.name}",
            fix="Pass train=True or use_running_average=False; for an nnx module, call train()",
        )
