"""The layers of the library, each described once for the tests that hold for all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normjax as nj

FEATURES, SHAPE = 4, (6, 3, 4)


class Layer(NamedTuple):
    """What the generic tests need to know of a layer.

    Attributes:
      name: as in `nj.<name>`.
      init: from the number of features to `(params, batch_stats)`.
      apply: `(params, batch_stats, x, train, **settings) -> (y, batch_stats)`.
      settings: keyword arguments to run every test with, by the name of the variant.
      axes: axis arguments whose defaults fit only x with its features last.
      has_statistics: whether there are batch statistics to update.
      takes_mask: whether there is a `mask` argument.
      safe_far_from_zero: whether y of `N(1e4, 1)` is that of `N(0, 1)`.
      true_derivative: False where the paper holds something constant that is not.
      activation: what comes after scale and bias.
      initial_scale: what the scale is at first; None if there is no scale.
    """

    name: str
    init: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    apply: Callable[..., tuple[Any, dict[str, Any]]]
    settings: dict[str, dict[str, Any]]
    axes: dict[str, Any] = {}
    has_statistics: bool = False
    takes_mask: bool = True
    safe_far_from_zero: bool = True
    true_derivative: bool = True
    activation: Callable[..., Any] = lambda y: y
    initial_scale: float | None = 1.0


MASK = np.array([True, True, False, True, True, True])[:, None, None]
SCATTERED = np.arange(72).reshape(SHAPE) % 5 > 0


def schedule(count):
    return jnp.clip(1.0 + count / 10, 1.0, 1.5)


BATCH = {
    "plain": {},
    "masked": {"mask": MASK},
    "ghosts": {"virtual_batch_size": 3},
    "cumulative": {"momentum": None, "running_var": "unbiased"},
}
LAYERS = [
    Layer("batch_norm", nj.batch_norm_init, nj.batch_norm, BATCH, has_statistics=True),
    Layer(
        "batch_renorm",
        nj.batch_renorm_init,
        nj.batch_renorm,
        {"plain": {}, "scheduled": {"r_max": schedule, "d_max": 0.5, "mask": MASK}},
        has_statistics=True,
        safe_far_from_zero=False,  # y says how far the batch is from the population
        true_derivative=False,  # of r and d
    ),
    Layer(
        "activated_batch_norm",
        nj.activated_batch_norm_init,
        nj.activated_batch_norm,
        {"plain": {}, "ghosts": {"virtual_batch_size": 3}},
        has_statistics=True,
        takes_mask=False,
        activation=jax.nn.leaky_relu,
    ),
    Layer(
        "layer_norm",
        nj.layer_norm_init,
        nj.layer_norm,
        {
            "plain": {},
            "masked": {"mask": SCATTERED, "reduction_axes": (1, 2)},
            "offset": {"scale_offset": 1.0},
        },
        axes={"reduction_axes": -1},
    ),
    Layer(
        "rms_norm",
        nj.rms_norm_init,
        nj.rms_norm,
        {"plain": {}, "masked": {"mask": SCATTERED, "scale_offset": 1.0}},
        axes={"reduction_axes": -1},
        safe_far_from_zero=False,
    ),
    Layer(
        "group_norm",
        nj.group_norm_init,
        nj.group_norm,
        {
            "plain": {"num_groups": 2},
            "masked": {"mask": SCATTERED, "group_size": 2},
            "causal": {"num_groups": 2, "cumulative_axis": 1},
            "causal-masked": {"num_groups": 1, "cumulative_axis": 1, "mask": SCATTERED},
        },
    ),
    Layer(
        "instance_norm",
        nj.instance_norm_init,
        nj.instance_norm,
        {"plain": {}, "masked": {"mask": SCATTERED}},
    ),
    Layer(
        "filter_response_norm",
        lambda *args, **kwargs: nj.filter_response_norm_init(*args, learn_epsilon=True, **kwargs),
        nj.filter_response_norm,
        {"plain": {}, "masked": {"mask": SCATTERED}},
        safe_far_from_zero=False,
    ),
    Layer(
        "global_response_norm",
        nj.global_response_norm_init,
        nj.global_response_norm,
        {"plain": {}, "masked": {"mask": SCATTERED}},
        safe_far_from_zero=False,
        initial_scale=0.0,
    ),
    Layer(
        "running_norm",
        nj.running_norm_init,
        nj.running_norm,
        {"plain": {}, "clipped": {"clip": 0.5, "center": False}},
        has_statistics=True,
        takes_mask=False,  # one that differs from feature to feature
        safe_far_from_zero=False,  # y says how far the batch is from all that was seen
        true_derivative=False,  # of the statistics
        initial_scale=None,
    ),
    Layer(
        "local_response_norm",
        lambda *args, **kwargs: nj.local_response_norm_init(*args, use_scale=True, **kwargs),
        nj.local_response_norm,
        {"plain": {"size": 3, "alpha": 1.0}},
        takes_mask=False,
        safe_far_from_zero=False,
    ),
    Layer(
        "dynamic_tanh",
        nj.dynamic_tanh_init,
        nj.dynamic_tanh,
        {"plain": {}},
        takes_mask=False,
        safe_far_from_zero=False,
    ),
    # Normalizations of kernels keep the same contract, with a kernel for x.
    Layer(
        "weight_norm",
        lambda features, **kwargs: nj.weights.weight_norm_init(jnp.ones((3, features)), **kwargs),
        nj.weights.weight_norm,
        {"plain": {}},
        takes_mask=False,
        safe_far_from_zero=False,
    ),
    Layer(
        "weight_standardization",
        nj.weights.weight_standardization_init,
        nj.weights.weight_standardization,
        {
            "plain": {},
            "scaled": {"scaled": True},
            "deviation": {"scaled": True, "epsilon": 0.1, "epsilon_to": "deviation"},
        },
        takes_mask=False,
    ),
    Layer(
        "spectral_norm",
        lambda features, param_dtype=jnp.float32: nj.weights.spectral_norm_init(
            jnp.ones((3, features), param_dtype), key=jax.random.key(0)
        ),
        nj.weights.spectral_norm,
        {"plain": {}, "steps": {"n_steps": 3}},
        has_statistics=True,
        takes_mask=False,
        safe_far_from_zero=False,
        true_derivative=False,  # of u and v
    ),
]


def arguments(layer, settings, rng, dtype=jnp.float32):
    """Parameters and statistics away from their start, and x of `SHAPE`, all of the dtype."""
    count = {"count": True} if settings.get("momentum", 0) is None else {}
    params, batch_stats = layer.init(FEATURES, param_dtype=dtype, **count)
    params = {
        leaf: value + jnp.asarray(rng.normal(size=value.shape), dtype)
        for leaf, value in params.items()
    }
    for leaf, value in batch_stats.items():
        # What was lost to rounding is small beside what is left.
        if jnp.issubdtype(value.dtype, jnp.inexact) and not leaf.endswith("_rest"):
            batch_stats[leaf] = value + jnp.asarray(rng.random(value.shape), value.dtype)
    return params, batch_stats, jnp.asarray(rng.normal(2, 1.5, SHAPE), dtype)
