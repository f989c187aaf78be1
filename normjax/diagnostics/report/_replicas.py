"""Finds copies of variables on several devices, and layers whose copies differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax.diagnostics.findings import Finding
from normjax.diagnostics.report._layers import Layer, Leaves, of_models, to_numpy

# In deviations, or relative to the value. Sums in another order differ by less in float32.
ROUNDING = 1e-6
# Copies of a kernel have a larger cosine; for two layers, or two seeds, it is about 0.
_ALIKE = 0.5
_STATISTICS = {"mean", "var", "count", "u", "sigma"}


def count_replicas(leaves: Leaves, layers: Iterable[Layer], replicated: bool | None) -> int:
    """Returns how many copies of each leaf lie along a leading axis, as with pmap; 0 for none."""
    model = {path: leaves[path] for path in of_models(leaves)}
    sizes = {np.shape(leaf)[:1] for leaf in model.values()}
    size = sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 0
    if replicated and size < 1:
        _checks.raise_error(
            "report",
            "the variables are not replicated along a leading axis",
            expected="one size of the first axis, the number of devices, for all leaves",
            got=f"first axes {sorted(sizes | ({(size,)} if size else set()))}",
            fix="Leave replicated=True out: copies that jax.sharding makes are always compared",
        )
    if replicated is not None:
        return size if replicated else 0
    named = [(name, leaf) for layer in layers for name, leaf in layer.leaves.items()]
    if size < 2 or any(np.ndim(leaf) < 2 for name, leaf in named if name in ("mean", "scale")):
        return 0
    own = {id(leaf) for _, leaf in named}
    kernels = [leaf for leaf in model.values() if id(leaf) not in own and np.ndim(leaf) > 2]
    copies = _one_a_device(model.values()) or _are_copies(list(model.values()), kernels)
    return size if copies else 0


def replica(tree: Any, index: int = 0) -> Any:
    """Returns one of the copies of a tree."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def diverged(layer: Layer, copies: int, epsilon: float) -> Finding | None:
    """Returns the finding about a layer whose copies differ; None if they agree."""
    stacks, var = layer.values, layer.values.get("var", np.ones(()))
    if copies:
        var = _median(var)
    else:
        on_devices = {name: _on_devices(leaf) for name, leaf in layer.leaves.items()}
        stacks = {name: stack for name, stack in on_devices.items() if stack is not None}
    deviation = np.sqrt(np.maximum(var, 0) + epsilon)
    apart = {}
    for name, stack in stacks.items():
        distances = _distances(stack, deviation if name == "mean" else None)
        if distances.max() > ROUNDING:
            apart[name] = distances
    if not apart:
        return None
    if set(apart) <= _STATISTICS:
        return Finding(
            layer.path,
            "diverged-replicas",
            "warning",
            _difference(apart),
            "Call nj.sync_batch_stats before evaluation and checkpoints, or train with axis_name",
        )
    return Finding(
        layer.path,
        "diverged-replicas",
        "error",
        _difference(apart),
        "Start all devices from one replica's parameters, and average gradients over the devices "
        "(lax.pmean)",
    )


def _difference(apart: dict[str, np.ndarray]) -> str:
    """Describes the distances of the copies from their median."""
    away = np.zeros(max(map(len, apart.values())), bool)
    parts = []
    for name, distances in apart.items():
        away[: len(distances)] |= distances > ROUNDING
        unit = " deviations" if name == "mean" else ""
        parts.append(f"{name} by up to {distances.max():.2g}{unit}")
    which = ", ".join(str(i) for i in np.flatnonzero(away)[:8])
    differ = f"{away.sum()} of {away.size} replicas ({which}) differ from their median"
    return f"{differ}: {', '.join(parts)}"


def _one_a_device(leaves: Iterable[Any]) -> bool:
    """Returns whether each device has a row of each array, as with pmap."""

    def is_spread(leaf: jax.Array) -> bool:
        devices, rows = len(leaf.sharding.device_set), leaf.shape[0]
        return devices == rows > 1 and leaf.sharding.shard_shape(leaf.shape)[0] == 1

    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return bool(arrays) and all(map(is_spread, arrays))


def _are_copies(leaves: list[Any], kernels: list[Any]) -> bool:
    """Returns whether rows are copies, not layers of a scan or members of an ensemble."""
    if kernels:
        return all(_cosine(*map(to_numpy, kernel[:2])) > _ALIKE for kernel in kernels)
    stacks = [to_numpy(leaf) for leaf in leaves]
    pairs = list(combinations(range(len(stacks[0])), 2))
    if any(all(_same(stack[i], stack[j]) for stack in stacks) for i, j in pairs):
        return True
    # Leaves of one value, such as 0 or 1, prove nothing: all layers start from them.
    telling = [stack for stack in stacks if not (stack[0] == stack[0].flat[0]).all()]
    equal = [all(_same(stack[i], stack[j]) for i, j in pairs) for stack in telling]
    return bool(equal) and bool(np.mean(equal) >= 0.5)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return 1.0 if lengths == 0 or not np.isfinite(lengths) else float(abs(np.vdot(a, b)) / lengths)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=True)


def _on_devices(leaf: Any) -> np.ndarray | None:
    """Returns the copies of an array on devices, stacked; None if there is only one."""
    if not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return None
    copies: dict[int, list[Any]] = {}
    for shard in leaf.addressable_shards:
        copies.setdefault(shard.replica_id, []).append(shard)
    sizes = {i: sum(shard.data.size for shard in shards) for i, shards in copies.items()}
    whole = [shards for i, shards in copies.items() if sizes[i] == leaf.size]
    dtype = np.complex128 if jnp.iscomplexobj(leaf) else np.float64
    stack = np.zeros((len(whole), *leaf.shape), dtype)
    for copy, shards in zip(stack, whole, strict=True):
        for shard in shards:
            copy[shard.index] = to_numpy(shard.data)
    return stack if len(whole) > 1 else None


def _distances(stack: np.ndarray, unit: np.ndarray | None) -> np.ndarray:
    """Returns the largest distance of each copy from the median.

    It is in multiples of the unit; without one, relative to the largest value of the median.
    """
    middle = _median(stack)
    if unit is None:
        unit = np.nanmax(np.abs(middle), initial=0.0) or np.ones(())
    with np.errstate(invalid="ignore"):
        distance = np.abs(stack - middle) / unit
    both_nan = np.isnan(stack) == np.isnan(middle)
    distance = np.where(np.isnan(distance), np.where(both_nan, 0, np.inf), distance)
    return distance.reshape(len(stack), -1).max(1, initial=0.0)


def _median(stack: np.ndarray) -> np.ndarray:
    """Returns the median of the copies, for complex ones by real and imaginary parts.

    It is NaN only where all copies are NaN.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the median of only NaN is NaN
        real = np.nanmedian(np.real(stack), 0)
        return real + 1j * np.nanmedian(np.imag(stack), 0) if np.iscomplexobj(stack) else real
