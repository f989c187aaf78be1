"""Finds the normalization layers in variables of any kind, by the names of their leaves."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from normjax import _checks
from normjax._trees import Path, is_nnx, path_names, plain

Leaves = dict[Path, Any]
Values = dict[str, np.ndarray]

COLLECTIONS = {"params", "batch_stats"}
_COPY = re.compile(r"(\w+)_(?:params|batch_stats)")  # such as ema_params
# Their moments have the names of parameters, but belong to no layer.
_OPTIMIZERS = {"opt_state", "optimizer", "optimizer_state"}
_ALIASES = {
    **dict.fromkeys(("gamma", "gain"), "scale"),
    **dict.fromkeys(("beta", "offset"), "bias"),
    **dict.fromkeys(("running_mean", "moving_mean"), "mean"),
    **dict.fromkeys(("running_var", "moving_variance"), "var"),
    "num_batches_tracked": "count",
}
_KNOWN = ("mean", "var", "count", "scale", "bias", "threshold", "epsilon", "alpha", "u", "sigma")
# The names by which layers are found, as an error message lists them.
NAMES = (
    "'mean' beside 'var' (also running_mean, moving_mean, running_var, moving_variance), 'scale' "
    "(gamma, gain), 'threshold', 'u' beside 'sigma', or 'weight', 'bias' or 'alpha' of a layer "
    "whose name says its kind, such as 'bn1' or 'LayerNorm_0'"
)
_NAMED = {
    "batch renorm": r"batch_?re_?norm",
    "batch norm": r"batch_?norm|(^|_)bn(_|\d|$)",
    "layer norm": r"layer_?norm|(^|_)ln(_|\d|$)",
    "RMS norm": r"rms_?norm",
    "group norm": r"group_?norm|(^|_)gn(_|\d|$)",
    "instance norm": r"instance_?norm",
    "filter response norm": r"filter_?response|(^|_)frn(_|\d|$)",
    "local response norm": r"local_?response|(^|_)lrn(_|\d|$)",
    "dynamic tanh": r"dynamic_?tanh|(^|_)dyt(_|\d|$)",
    "weight standardization": r"weight_?standard",
    "weight norm": r"weight_?norm",
    "spectral norm": r"spectral_?norm",
    "norm": r"norm",
}


class Layer(NamedTuple):
    """A normalization layer: its path, its kind, and its leaves by Flax's names."""

    path: str
    kind: str
    leaves: dict[str, Any]

    @property
    def values(self) -> Values:
        """Returns the leaves as NumPy arrays, in float64 (or complex128)."""
        return {name: to_numpy(leaf) for name, leaf in self.leaves.items()}


def leaves_of(variables: Any) -> Leaves:
    """Returns the arrays of variables by path, without the boxes of nnx and linen around them."""
    if is_nnx(variables):
        from flax import nnx

        variables = nnx.state(variables)
    if type(variables) is tuple and len(variables) == 2:
        variables = {"params": variables[0], "batch_stats": variables[1]}
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(plain(variables)):
        if hasattr(leaf, "detach"):  # a tensor of PyTorch
            leaf = leaf.numpy(force=True)
        names = _single(path_names(path))
        if isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
            _raise_without_values(names, leaf)
        if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            leaves[names] = leaf
    return leaves


def _raise_without_values(names: Path, leaf: Any) -> NoReturn:
    _checks.raise_error(
        "report",
        "a leaf has no values",
        expected="arrays, outside of jax.jit and other transformations",
        got=f"{'/'.join(names)} of type {type(leaf).__name__}",
        fix="Pass the variables themselves",
        kind=TypeError,
    )


def find_layers(leaves: Leaves, classes: Mapping[Path, str] | None = None) -> list[Layer]:
    """Returns the normalization layers in natural order.

    Args:
      leaves: the arrays by path.
      classes: the class names of modules by path, as far as they are known.
    """
    nodes: dict[Path, dict[str, Any]] = {}
    for path in of_models(leaves):
        above, name = _place(path)
        nodes.setdefault(above, {})[name] = leaves[path]
    layers = []
    for path in sorted(nodes, key=_natural):
        labels = _labels(path, classes or {})
        node = _as_in_flax(nodes[path], labels)
        if kind := _kind(path, node, labels):
            known = {name: node[name] for name in _KNOWN if name in node}
            layers.append(Layer("/".join(path) or "/", kind, known))
    return layers


def _labels(path: Path, classes: Mapping[Path, str]) -> list[str]:
    """Returns the names of a module and of the modules around it, the innermost first."""
    labels = [classes.get((), "")]
    labels += [classes.get(path[: i + 1], name) for i, name in enumerate(path)]
    return [label for label in reversed(labels) if re.search("[a-zA-Z]", label)]


def to_numpy(leaf: Any) -> np.ndarray:
    """Returns an array in float64 or complex128; of an array on several hosts, this host's part."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)
    return np.asarray(leaf).astype(np.complex128 if jnp.iscomplexobj(leaf) else np.float64)


def classes_of(variables: Any) -> dict[Path, str]:
    """Returns the class names in an nnx module by path; an empty dict for other variables."""
    if not is_nnx(variables):
        return {}
    from flax import nnx

    return {
        tuple(map(str, path)): type(module).__name__ for path, module in nnx.iter_modules(variables)
    }


def of_models(leaves: Iterable[Path]) -> list[Path]:
    """Returns the paths that belong to models, not to optimizers.

    In a training state, these are in collections such as `params` and in copies of them.
    """
    paths = [path for path in leaves if set(path) - COLLECTIONS]
    paths = [path for path in paths if not set(_outside(path)) & _OPTIMIZERS]
    if any("params" in path for path in paths):
        return [path for path in paths if set(path) & COLLECTIONS or _COPY.fullmatch(path[0])]
    return paths


def _outside(path: Path) -> Path:
    """Returns the part of a path above a collection, since names below it are the model's."""
    return tuple(itertools.takewhile(lambda name: name not in COLLECTIONS, path))


def _place(path: Path) -> tuple[Path, str]:
    """Returns the path of the layer, without the names of collections, and the leaf's name."""
    if copy := _COPY.fullmatch(path[0]):
        path = (copy[1], *path[1:])  # "ema_params" becomes "ema", so copies stay apart
    # nnx.WeightNorm has a dict of scales by kernel.
    if "scales" in path[:-1] and path[-1] not in (*_KNOWN, *_ALIASES):
        path = (*(part for part in path if part != "scales"), "scale")
    *above, name = (part for part in path if part not in COLLECTIONS)
    return tuple(above), _ALIASES.get(name, name)


def _as_in_flax(node: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    """Returns the node, with PyTorch's `weight` of a normalization renamed to `scale`.

    The `weight` of other layers has several axes, or a bias of another shape.
    """
    if "weight" in node and np.ndim(node["weight"]) == 1:
        beside = node.get("mean", node.get("bias", np.ones(())))
        if np.shape(beside) == np.shape(node["weight"]) or _said(labels[:1]):
            node["scale"] = node.pop("weight")
    return node


def _kind(path: Path, node: Mapping[str, Any], labels: list[str]) -> str | None:
    """Returns the kind of layer by its leaves, then its names; None if it does not normalize."""
    said = _said(labels[:1])
    if {"mean", "var"} <= set(node):
        return "batch renorm" if said == "batch renorm" else "batch norm"
    if {"u", "sigma"} <= set(node):
        return "spectral norm"
    if "threshold" in node:
        return "filter response norm"
    if "alpha" in node and np.ndim(node["alpha"]) == 0 and (said or {"scale", "bias"} & set(node)):
        return "dynamic tanh"
    if "scale" in node and ("kernel" in node or path[-1:] == ("kernel",)):
        standardized = "weight standardization" in [_said([label]) for label in labels]
        return "weight standardization" if standardized else "weight norm"
    if "scale" in node or (set(node) == {"bias"} and said):
        return said or "norm"
    return None


def _said(labels: list[str]) -> str | None:
    """Returns the kind of layer after the first name that tells one; None without any."""
    for label in labels:
        for kind, name in _NAMED.items():
            if re.search(name, label.lower()):
                return kind
    return None


def _single(names: Iterable[str]) -> Path:
    """Returns the names of a path one by one, without the "value" that a box of Flax adds.

    Orbax stores tuples as strings, and PyTorch joins names with dots; both are split.
    """
    parts: list[str] = []
    for name in names:
        is_tuple = name.startswith("('") and name.endswith(")")
        parts += map(str, ast.literal_eval(name)) if is_tuple else [name]
    parts += parts.pop().split(".") if parts else []
    return tuple(parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts)


def _natural(path: Path) -> list[Any]:
    """Returns a key that sorts BatchNorm_2 before BatchNorm_10."""

    def key(part: str) -> tuple[bool, int | str]:
        return (False, int(part)) if part.isdigit() else (True, part)

    return [[key(part) for part in re.split(r"(\d+)", name)] for name in path]
