"""Finds the keyword arguments for which a normjax function equals a Keras 3 layer."""

from __future__ import annotations

from typing import Any

from normjax import _checks
from normjax.convert._sources import KerasLayer

WITH_AXIS = {
    "BatchNormalization",
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
}

SMALLEST_DEVIATION = 1e-7  # keras.config.epsilon()


def keras_settings(layer: KerasLayer) -> dict[str, Any]:
    """Returns the arguments for which a normjax function computes the same as a Keras layer.

    Args:
      layer: a BatchNormalization, LayerNormalization, RMSNormalization, GroupNormalization,
        SpectralNormalization, or a Normalization, which equals `batch_norm` without parameters.

    Returns:
      A dict of keyword arguments. For `batch_norm`: `feature_axes`, `momentum`, `epsilon`; Keras
      stores the biased variance, as normjax does by default. For `layer_norm` and `rms_norm`:
      `reduction_axes`, `feature_axes`, `epsilon`. For `group_norm`: `feature_axes`, `num_groups`,
      `epsilon`. For `weights.spectral_norm`: `n_steps`. A Normalization bounds the standard
      deviation from below by 1e-7, while normjax adds epsilon to the variance; so `epsilon` is
      1e-14, and `momentum` is 1.

    Raises:
      TypeError: if the layer is of another kind. ValueError: if the layer computes something else
        (`renorm=True`, `rms_scaling=True`, `invert=True`).

    Example:
      >>> import os
      >>> os.environ.setdefault("KERAS_BACKEND", "jax") and None
      >>> import keras, normjax as nj
      >>> print(nj.convert.keras_settings(keras.layers.BatchNormalization(momentum=0.9)))
      {'feature_axes': -1, 'epsilon': 0.001, 'momentum': 0.9}
    """
    for option in ("renorm", "rms_scaling", "invert"):
        if getattr(layer, option, False):
            _checks.raise_error(
                "keras_settings",
                f"normjax has no equivalent of {option}=True",
                expected=f"{option}=False",
                got=f"{type(layer).__name__}({option}=True)",
                fix="Use batch_renorm or rms_norm, with settings of your own",
            )
    return _of(layer)


def _of(layer: Any) -> dict[str, Any]:
    """Returns the settings of a layer without unusual options."""
    classes = {kind.__name__ for kind in type(layer).__mro__}
    if "SpectralNormalization" in classes:
        return {"n_steps": layer.power_iterations}
    if "Normalization" in classes:
        return {"feature_axes": _axes(layer), "epsilon": SMALLEST_DEVIATION**2, "momentum": 1.0}
    if classes & WITH_AXIS:
        axis = _axes(layer)
        settings: dict[str, Any] = {"feature_axes": axis, "epsilon": layer.epsilon}
        if "BatchNormalization" in classes:
            return settings | {"momentum": layer.momentum}
        if "GroupNormalization" in classes:
            groups = {"group_size": 1} if layer.groups == -1 else {"num_groups": layer.groups}
            return settings | groups
        return settings | {"reduction_axes": axis}
    _checks.raise_error(
        "keras_settings",
        "normjax has no function for this layer",
        expected="a Batch-, Layer-, RMS-, Group- or SpectralNormalization, or a Normalization",
        got=f"{type(layer).__name__}",
        fix="Pass the layer itself, such as model.get_layer('bn')",
        kind=TypeError,
    )


def _axes(layer: Any) -> int | tuple[int, ...]:
    return layer.axis if isinstance(layer.axis, int) else tuple(layer.axis)
