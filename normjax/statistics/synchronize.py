"""Merges the running statistics of replicas that trained separately."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from normjax import _checks
from normjax._trees import KeyPath, Path, path_names, show
from normjax._typing import AxisIndexGroups, AxisName, promote
from normjax.statistics.devices import DeviceGroup, device_group
from normjax.statistics.elements import abs2


def sync_batch_stats(
    batch_stats: PyTree[Array],
    axis_name: AxisName,
    *,
    axis_index_groups: AxisIndexGroups | None = None,
    momentum: float | None = None,
) -> PyTree[Array]:
    r"""Merges the running statistics of all devices; every device gets the same result.

    .. math:: \mu = \frac1D \sum_d \mu_d, \qquad
              \sigma^2 = \frac1D \sum_d \left(\sigma_d^2 + |\mu_d - \mu|^2\right)

    If you train without `axis_name`, each device has its own running statistics. Call this function
    before you evaluate or save a checkpoint. Averaging only the variances would leave out the
    variance between the devices' means. All devices have the same weight.

    If you share statistics within groups of devices, but need them replicated, call it after each
    step with the `momentum` m of that step. Means that were equal before the step have moved by a
    fraction `1 - m` towards the batch means. With :math:`|\mu_d - \mu|^2 / (1 - m)`
    in the formula, the result equals that of one step on the whole batch.

    Args:
      batch_stats: running statistics of one layer or of a whole model: nested dicts, as in Flax's
        `batch_stats` collection.
      axis_name: mapped axis or axes (pmap, shard_map, vmap) to merge over.
      axis_index_groups: groups of indices of that axis; each group merges, as in `jax.lax.psum`.
      momentum: None, or the momentum of the single step since the devices had equal statistics: at
        least 0 and below 1.

    Returns:
      A tree with the same structure, shapes and dtypes. Leaves other than `mean` and `var`, such as
      `count`, are averaged over the devices, and rounded if they are ints. There are two
      collectives for any number of layers.

    Raises:
      NameError: if an axis is not in scope. ValueError: if there is a `var` without a `mean` beside
        it, or if the momentum is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> batch_stats = {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.ones((2, 1))}  # of 2 devices
      >>> sync = lambda own: nj.sync_batch_stats(own, "data")
      >>> merged = jax.vmap(sync, axis_name="data")(batch_stats)
      >>> print(merged["mean"][0], merged["var"][0])
      [1.] [2.]

    References:
      Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1.
    """
    devices = device_group("sync_batch_stats", axis_name, axis_index_groups)
    step = 1.0 if momentum is None else 1.0 - _below_one(momentum)
    leaves, structure = jax.tree.flatten_with_path(jax.tree.map(jnp.asarray, batch_stats))
    own = dict(leaves)
    beside = means_beside("sync_batch_stats", list(own))
    merged = _averaged(own, devices)
    spreads = {path: abs2(_wide(own[mean]) - _wide(merged[mean])) for path, mean in beside.items()}
    for path, spread in _averaged(spreads, devices).items():
        merged[path] = (_wide(merged[path]) + spread / step).astype(own[path].dtype)
    return jax.tree.unflatten(structure, list(merged.values()))


def _below_one(momentum: float) -> float:
    _checks.between("sync_batch_stats", "momentum", momentum, 0.0, 1.0)
    if momentum == 1:
        _checks.raise_error(
            "sync_batch_stats",
            "a momentum of 1 leaves the statistics unchanged",
            expected="a momentum below 1",
            got=f"momentum={momentum!r}",
            fix="Do not call it: with momentum 1 there is nothing to merge",
        )
    return momentum


def _averaged(leaves: dict[Any, Array], devices: DeviceGroup) -> dict[Any, Array]:
    """Returns the mean of each leaf over the devices, in its dtype, by one collective."""
    if not leaves:  # without statistics, there is nothing to send
        return {}
    means = (total / devices.size for total in devices.sum(*map(_wide, leaves.values())))
    return {
        path: (jnp.round(mean) if jnp.issubdtype(leaf.dtype, jnp.integer) else mean).astype(
            leaf.dtype
        )
        for (path, leaf), mean in zip(leaves.items(), means, strict=True)
    }


def means_beside(function: str, paths: list[KeyPath]) -> dict[KeyPath, KeyPath]:
    """Returns, for each variance, the path of the mean beside it."""
    named = {path_names(path): path for path in paths}
    variances = {names: path for names, path in named.items() if names[-1:] == ("var",)}
    return {path: _mean_beside(function, names, named) for names, path in variances.items()}


def _mean_beside(function: str, names: Path, named: dict[Path, KeyPath]) -> KeyPath:
    mean = named.get((*names[:-1], "mean"))
    if mean is not None:
        return mean
    _checks.raise_error(
        function,
        "there is a variance without a mean",
        expected="'mean' beside each 'var'",
        got=f"{show('batch_stats', named[names])} and no mean beside it",
        fix="Pass the dicts of whole layers",
    )


def _wide(leaf: Array) -> Array:
    return leaf.astype(promote(leaf.dtype, jnp.float32))
