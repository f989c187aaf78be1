"""Converts the arrays of one PyTorch layer to leaves of Flax and normjax."""

from __future__ import annotations

import numpy as np

from normjax import _checks
from normjax.convert._leaf import Leaf, Leaves
from normjax.convert._sources import Arrays
from normjax.convert._torch_groups import (
    CONV1D,
    EMBEDDING,
    KERNEL,
    PARAMETRIZATIONS,
    RENAMED,
    SCALE,
    SLOPE,
    WEIGHT,
    Entries,
    looks_like_a_kernel,
)
from normjax.convert._torch_kernels import (
    from_kernel,
    norms,
    power_iteration,
    singular_vectors,
    to_kernel,
)

# The leaves of layers; all others are passed through under their own names.
LEAVES = (SCALE, KERNEL, EMBEDDING, SLOPE, WEIGHT, "u", "sigma", *RENAMED.values())
IN_BATCH_STATS = ("mean", "var", "count", "u", "sigma")


def decode(function: str, entries: Entries, kind: str | None, size: int | None) -> Leaves:
    """Returns the leaves of one layer by collection and name.

    Args:
      function: the name that errors begin with.
      entries: the arrays.
      kind: the leaf that the layer's `weight` becomes; None to infer it from the shape.
      size: the number of elements that `u` should have; None if it is unknown.
    """
    leaves = {new: entries[old] for old, new in RENAMED.items() if old in entries}
    if "weight_orig" in entries:
        kernel, u, v = _together(function, entries, "weight_orig", "weight_u", "weight_v")
        vector, sigma = power_iteration(function, kernel.value, u, v, size)
        is_u = np.array_equal(vector.reshape(-1), u.value.reshape(-1), equal_nan=True)
        leaves["kernel"] = Leaf(to_kernel(kernel.value), kernel.key)
        leaves["u"] = Leaf(vector, u.key if is_u else v.key)
        leaves["sigma"] = Leaf(sigma, v.key)
    elif "weight_g" in entries or "weight_v" in entries:
        scale, kernel = _together(function, entries, "weight_g", "weight_v")
        leaves["kernel"] = Leaf(to_kernel(kernel.value), kernel.key)
        flat = scale.value.reshape(-1) if scale.value.ndim else scale.value
        leaves["scale"] = Leaf(flat, scale.key)
    elif "weight" in entries:
        guess = KERNEL if looks_like_a_kernel(entries) else SCALE
        name, leaf = _weight(entries["weight"], kind or guess)
        leaves[name] = leaf
    return {
        ("batch_stats" if name in IN_BATCH_STATS else "params", name): leaf
        for name, leaf in leaves.items()
    }


def _weight(leaf: Leaf, kind: str) -> tuple[str, Leaf]:
    value = leaf.value
    if kind == CONV1D:
        return KERNEL, leaf
    if kind == KERNEL:
        value = to_kernel(value)
    if kind == SLOPE and value.size == 1:
        value = value.reshape(())
    return kind, Leaf(value, leaf.key)


def _together(function: str, entries: Entries, *names: str) -> list[Leaf]:
    for name in names:
        if name not in entries:
            _checks.raise_error(
                function,
                f"{name} is missing",
                expected=f"{' and '.join(names)} together, or the same as parametrizations",
                got=f"{sorted(leaf.key for leaf in entries.values())}",
                fix="Pass the whole state_dict of the module",
            )
    return [entries[name] for name in names]


def encode(
    function: str,
    leaves: dict[str, Leaf],
    expected: dict[str, np.ndarray] | None,
    kind: str | None,
    dim: int | None,
) -> Arrays:
    """Returns the entries of one layer, in PyTorch's order.

    Args:
      function: the name that errors begin with.
      leaves: the leaves by name.
      expected: the arrays of the layer in `like` by name; None without `like`.
      kind: `CONV1D` if the kernel is not transposed; any other value otherwise.
      dim: the row axis of spectral_norm; None if it is unknown.
    """
    wanted = expected or {}
    state = _encode_weight(function, leaves, wanted.get(WEIGHT), kind, dim)
    if len(state) > 1 and not {"weight_g", "weight_orig"} & {*wanted}:
        v = "0._v" if "weight_orig" in state else "original1"
        names = {old: new for new, old in PARAMETRIZATIONS.items()}
        names["weight_v"] = f"parametrizations.weight.{v}"
        state = {names[name]: value for name, value in state.items()}
    state |= {old: leaves[new].value for old, new in RENAMED.items() if new in leaves}
    if "mean" in leaves:
        count = leaves["count"].value if "count" in leaves else 0
        state["num_batches_tracked"] = np.asarray(count, np.int64)
    bias = wanted.get("bias")
    if bias is not None and "bias" in state and state["bias"].size == bias.size:
        # The bias of DenseGeneral has several axes.
        state["bias"] = state["bias"].reshape(bias.shape)
    return state


def _encode_weight(
    function: str,
    leaves: dict[str, Leaf],
    wanted: np.ndarray | None,
    kind: str | None,
    dim: int | None,
) -> Arrays:
    if "kernel" not in leaves:
        name = next((name for name in (SCALE, EMBEDDING, SLOPE, WEIGHT) if name in leaves), None)
        if name is None:
            return {}
        value = leaves[name].value
        return {"weight": value.reshape(1) if name == SLOPE and not value.ndim else value}
    kernel = leaves["kernel"].value
    if kind == CONV1D:
        return {"weight": kernel}
    if wanted is not None and wanted.ndim == 2 < kernel.ndim and wanted.size == kernel.size:
        kernel = kernel.reshape(wanted.shape[::-1])
    weight = from_kernel(kernel)
    if "scale" in leaves:
        return {"weight_g": norms(function, weight, leaves["scale"]), "weight_v": weight}
    if "u" in leaves:
        u, v = singular_vectors(function, weight, leaves["u"], dim)
        return {"weight_orig": weight, "weight_u": u, "weight_v": v}
    return {"weight": weight}


def split_axes(leaf: Leaf, shape: tuple[int, ...]) -> Leaf:
    """Splits an axis of a matrix or vector, as in the kernels of Flax's DenseGeneral.

    Other leaves, and leaves that cannot be split so, are returned unchanged.
    """
    value = leaf.value
    if value.ndim not in (1, 2) or len(shape) <= value.ndim or value.size != np.prod(shape):
        return leaf
    if value.ndim == 2 and shape[0] != value.shape[0] and shape[-1] != value.shape[1]:
        return leaf
    return Leaf(value.reshape(shape), leaf.key)
