"""Finds the keyword arguments for which a normjax function equals a PyTorch layer."""

from __future__ import annotations

from typing import Any

from normjax import _checks
from normjax.convert._sources import TorchModule


def torch_settings(module: TorchModule) -> dict[str, Any]:
    """Returns the arguments for which a normjax function computes the same as a PyTorch layer.

    Args:
      module: a BatchNorm, SyncBatchNorm, LayerNorm, RMSNorm, GroupNorm or InstanceNorm, or a layer
        under weight_norm or spectral_norm.

    Returns:
      A dict of keyword arguments. For `batch_norm`: `feature_axes=1`, `epsilon`, `momentum`, which
      is 1 minus PyTorch's (None stays None, the mean over all batches), and
      `running_var="unbiased"`. For `layer_norm` and `rms_norm`: `reduction_axes`, `feature_axes`,
      `epsilon`. For `instance_norm`: `feature_axes=1`, `epsilon`; for `group_norm` also
      `num_groups`. For `weights.weight_norm`: `feature_axes` of the kernel in the layout of
      `from_torch`, `epsilon`; for `weights.spectral_norm` also `n_steps`. If x has its features
      last, replace `feature_axes=1` by -1.

    Raises:
      TypeError: if the module is of another kind.

    Example:
      >>> import torch, normjax as nj
      >>> print(nj.convert.torch_settings(torch.nn.BatchNorm2d(8, momentum=0.25)))
      {'feature_axes': 1, 'momentum': 0.75, 'epsilon': 1e-05, 'running_var': 'unbiased'}
    """
    settings = _of_weights(module)
    return _of_activations(module) if settings is None else settings


def _of_activations(module: Any) -> dict[str, Any]:
    """Returns the settings of a layer that normalizes activations."""
    classes = class_names(module)
    if "_BatchNorm" in classes:
        momentum = None if module.momentum is None else 1 - module.momentum
        return {
            "feature_axes": 1,
            "momentum": momentum,
            "epsilon": module.eps,
            "running_var": "unbiased",
        }
    if "_InstanceNorm" in classes:
        return {"feature_axes": 1, "epsilon": module.eps}
    if "GroupNorm" in classes:
        return {"feature_axes": 1, "num_groups": module.num_groups, "epsilon": module.eps}
    if classes & {"LayerNorm", "RMSNorm"}:
        axes = tuple(range(-len(module.normalized_shape), 0))
        # The default of torch.nn.RMSNorm is the machine epsilon of x.
        epsilon = 2.0**-23 if module.eps is None else module.eps
        return {"reduction_axes": axes, "feature_axes": axes, "epsilon": epsilon}
    _checks.raise_error(
        "torch_settings",
        "normjax has no layer for this module",
        expected="a BatchNorm, LayerNorm, RMSNorm, GroupNorm or InstanceNorm, or a layer under "
        "weight_norm or spectral_norm",
        got=f"{type(module).__name__}",
        fix="Pass the layer itself, such as network.layer1[0].bn1",
        kind=TypeError,
    )


def class_names(module: Any) -> set[str]:
    """Returns the names of a module's class and its bases.

    They identify PyTorch's classes without importing PyTorch.
    """
    return {kind.__name__ for kind in type(module).__mro__}


def weight_normalization(module: Any) -> Any:
    """Returns the parametrization or hook of weight_norm or spectral_norm, or None."""
    parametrizations = getattr(module, "parametrizations", {})
    found = [*parametrizations["weight"]] if "weight" in parametrizations else []
    found += getattr(module, "_forward_pre_hooks", {}).values()
    for each in found:
        if type(each).__name__.removeprefix("_") in ("WeightNorm", "SpectralNorm"):
            return each
    return None


def _of_weights(module: Any) -> dict[str, Any] | None:
    """Returns the settings of weight_norm or spectral_norm, if the module has one."""
    normalization = weight_normalization(module)
    if normalization is None:
        return None
    axis = _axis(normalization.dim)
    if not hasattr(normalization, "n_power_iterations"):
        return {"feature_axes": axis, "epsilon": 0.0}
    # The parametrization starts its power iteration from v, and the hook from u.
    if type(normalization).__name__ == "_SpectralNorm":
        rank = module.parametrizations["weight"].original.ndim
        axis = tuple(other for other in range(-rank, 0) if other != axis)
    return {
        "feature_axes": axis,
        "n_steps": normalization.n_power_iterations,
        "epsilon": normalization.eps,
    }


def _axis(dim: int | None) -> int | tuple[()]:
    """Returns the axis of `(*window, in, out)` that is `dim` in `(out, in, *window)`."""
    if dim is None or dim == -1:
        return ()
    return (-1, -2)[dim] if dim < 2 else dim - 2
