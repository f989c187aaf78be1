"""Copies of the variables on several devices: where they are kept, and which layers' have come apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax.diagnostics._findings import Finding
from normjax.diagnostics._layers import Layer, Leaves, of_models, to_numpy

# in deviations, or parts of the value: what float32 loses in sums of another order, no more
ROUNDING = 1e-6
_ALIKE = 0.5  # cosine of two copies' kernels: 0 for those of two layers, or two seeds
_STATISTICS = {"mean", "var", "count", "u", "sigma"}


def count_replicas(leaves: Leaves, layers: Iterable[Layer], replicated: bool | None) -> int:
    """Returns how many copies the leaves hold along a leading axis, as pmap keeps them; 0 where they are no copies."""
    model = {path: leaves[path] for path in of_models(leaves)}
    sizes = {np.shape(leaf)[:1] for leaf in model.values()}
    size = sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 0
    if replicated and size < 1:
        _checks.raise_error(
            "report",
            "the variables are not replicated along a leading axis",
            expected="one size of the first axis, the number of devices, for all leaves",
            got=f"first axes {sorted(sizes | ({(size,)} if size else set()))}",
            fix="Drop replicated=True: copies on devices that JAX lays out itself are found as they are",
        )
    if replicated is not None:
        return size if replicated else 0
    own = {id(leaf) for layer in layers for leaf in layer.leaves.values()}
    wide = all(
        np.ndim(leaf) > 1
        for layer in layers
        for name, leaf in layer.leaves.items()
        if name in ("mean", "scale")
    )
    if size < 2 or not wide:
        return 0
    others = [leaf for leaf in model.values() if id(leaf) not in own and np.ndim(leaf) > 2]
    return size if _one_a_device(model.values()) or _are_copies(list(model.values()), others) else 0


def replica(tree: Any, index: int = 0) -> Any:
    """Returns one copy of them all."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def diverged(layer: Layer, copies: int, epsilon: float) -> Finding | None:
    """Returns what there is to say about the copies of a layer, on the leading axis or on devices."""
    stacks, var = layer.values, layer.values.get("var", np.ones(()))
    if copies:
        var = _median(var)
    else:
        stacks = {
            name: stack
            for name, leaf in layer.leaves.items()
            if (stack := _on_devices(leaf)) is not None
        }
    deviation = np.sqrt(np.maximum(var, 0) + epsilon)
    apart = {
        name: _distances(stack, deviation if name == "mean" else None)
        for name, stack in stacks.items()
    }
    apart = {name: distances for name, distances in apart.items() if distances.max() > ROUNDING}
    if not apart:
        return None
    away = sorted(
        {int(i) for distances in apart.values() for i in np.flatnonzero(distances > ROUNDING)}
    )
    size = max(map(len, apart.values()))
    seen = ", ".join(
        f"{name} by up to {d.max():.2g}{' deviations' * (name == 'mean')}"
        for name, d in apart.items()
    )
    message = f"{len(away)} of {size} replicas ({', '.join(map(str, away[:8]))}) differ from their median: {seen}"
    if set(apart) <= _STATISTICS:
        advice = (
            "Call nj.sync_batch_stats before evaluation and checkpoints, or train with axis_name"
        )
        return Finding(layer.path, "diverged-replicas", "warning", message, advice)
    advice = "Average gradients over the devices (lax.pmean) from equal starts; go on from one replica's parameters"
    return Finding(layer.path, "diverged-replicas", "error", message, advice)


def _one_a_device(leaves: Iterable[Any]) -> bool:
    """Whether arrays lie as pmap leaves them: a row on each device."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return bool(arrays) and all(
        len(leaf.sharding.device_set) == leaf.shape[0] > 1
        and leaf.sharding.shard_shape(leaf.shape)[0] == 1
        for leaf in arrays
    )


def _are_copies(leaves: list[Any], kernels: list[Any]) -> bool:
    """Whether rows are copies of one another, rather than the layers of a scan or the members of an ensemble."""
    if kernels:
        return all(_cosine(*map(to_numpy, kernel[:2])) > _ALIKE for kernel in kernels)
    stacks = [to_numpy(leaf) for leaf in leaves]
    pairs = list(combinations(range(len(stacks[0])), 2))
    if any(all(_same(stack[i], stack[j]) for stack in stacks) for i, j in pairs):
        return True
    # zeros and ones may be anyone's
    telling = [stack for stack in stacks if not (stack[0] == stack[0].flat[0]).all()]
    return bool(
        telling
        and np.mean([all(_same(stack[i], stack[j]) for i, j in pairs) for stack in telling]) >= 0.5
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 if lengths == 0 or not np.isfinite(lengths) else float(abs(np.vdot(a, b)) / lengths)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=True)


def _on_devices(leaf: Any) -> np.ndarray | None:
    """Returns the copies of an array that devices hold, stacked; None where there is a single one."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return None
    copies: dict[int, list[Any]] = {}
    for shard in leaf.addressable_shards:
        copies.setdefault(shard.replica_id, []).append(shard)
    whole = [
        shards
        for shards in copies.values()
        if sum(shard.data.size for shard in shards) == leaf.size
    ]
    stack = np.zeros(
        (len(whole), *leaf.shape), np.complex128 if jnp.iscomplexobj(leaf) else np.float64
    )
    for copy, shards in zip(stack, whole, strict=True):
        for shard in shards:
            copy[shard.index] = to_numpy(shard.data)
    return stack if len(whole) > 1 else None


def _distances(stack: np.ndarray, unit: np.ndarray | None) -> np.ndarray:
    """How far each copy is from the median, at most, in this unit; None: in parts of the median's largest value."""
    middle = _median(stack)
    if unit is None:
        unit = np.nanmax(np.abs(middle), initial=0.0) or np.ones(())
    with np.errstate(invalid="ignore"):
        distance = np.abs(stack - middle) / unit
    distance = np.where(
        np.isnan(distance), np.where(np.isnan(stack) == np.isnan(middle), 0, np.inf), distance
    )
    return distance.reshape(len(stack), -1).max(1, initial=0.0)


def _median(stack: np.ndarray) -> np.ndarray:
    """The median of the copies, of real and imaginary parts alone; NaN where all are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of medians of nothing but NaN
        real = np.nanmedian(np.real(stack), 0)
        return real + 1j * np.nanmedian(np.imag(stack), 0) if np.iscomplexobj(stack) else real
