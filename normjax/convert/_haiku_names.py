"""The names and shapes of arrays in Haiku, normjax and Flax."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from normjax import _checks
from normjax._trees import Path
from normjax.convert._haiku_momentum import check_decay_rate
from normjax.convert._leaf import STATISTICS, Leaf
from normjax.convert._sources import Arrays, to_numpy
from normjax.convert._trees import flatten

PARAMS = {"scale": "scale", "offset": "bias", "w": "kernel", "b": "bias", "embeddings": "embedding"}
AVERAGES = {"mean_ema": "mean", "var_ema": "var"}
OF_AVERAGE = ("mean_ema/average", "mean_ema/counter")
DIRECTIONS = {"u0": "u", "sigma": "sigma"}
LINEAR = {"kernel": "w", "bias": "b"}
NORM = {"scale": "scale", "bias": "offset", "embedding": "embeddings"}
# After this many steps, the initial value of the averages has no effect, since
# decay_rate**FORGOTTEN is 0.
FORGOTTEN = 2**30


def named(function: str, name: str, tree: Any) -> Arrays:
    """Returns the arrays of a Haiku tree by module and name, such as "net/~/linear/w"."""
    found = {}
    for path, value in flatten(function, name, tree).items():
        if len(path) < 2:
            raise_for_nameless(function, [*path])
        found["/".join(path)] = to_numpy(function, "/".join(path), value)
    return found


def path_of(collection: str, name: str) -> Path | None:
    """Returns the path of a Haiku leaf; None if no known module has the leaf."""
    module, _, leaf = name.rpartition("/")
    if collection == "params":
        return ("params", module, PARAMS[leaf]) if leaf in PARAMS else None
    if leaf in DIRECTIONS:
        return "batch_stats", module, DIRECTIONS[leaf]
    module, _, average = module.rpartition("/")
    if average not in AVERAGES or leaf not in ("average", "hidden", "counter"):
        return None
    names = {"average": AVERAGES[average], "counter": f"counter of {average}", "hidden": "hidden"}
    return "batch_stats", module.removesuffix("/~"), names[leaf]


def key_of(path: Path) -> str:
    """Returns the Haiku name of a leaf, from its path."""
    names = NORM | {"kernel": "w", "count": "~/mean_ema/counter", "u": "u0"}
    names |= {new: f"~/{old}/average" for old, new in AVERAGES.items()}
    return "/".join((*path[1:-1], names.get(path[-1], path[-1])))


def to_params(module: str, leaves: dict[str, Leaf]) -> list[tuple[str, str, Any]]:
    """Returns the Haiku name, path and value of each parameter of a module."""
    is_linear = any(name == "kernel" or name.startswith("w") for name in leaves)
    names = LINEAR if is_linear else NORM
    return [
        (f"{module}/{names.get(name, name)}", leaf.key, leaf.value)
        for name, leaf in leaves.items()
        if leaf.key.startswith("params/") and name not in STATISTICS
    ]


def to_state(
    function: str, module: str, leaves: dict[str, Leaf], decay_rate: float | None, like: Any
) -> list[tuple[str, str, Any]]:
    """Returns the Haiku name, path and value of each state of a module."""
    found = [
        (f"{module}/{old}", leaves[new].key, leaves[new].value)
        for old, new in DIRECTIONS.items()
        if new in leaves
    ]
    found += [
        (f"{module}/{name}", leaf.key, leaf.value)
        for name, leaf in leaves.items()
        if leaf.key.startswith("batch_stats/") and name not in STATISTICS
    ]
    if "mean" not in leaves:
        return found
    if decay_rate is None or like is None:
        _checks.raise_error(
            function,
            f"the state for {leaves['mean'].key!r} depends on the decay rate and the rank of x",
            expected="the decay_rate of hk.BatchNorm, and like=(params, state) as Haiku's init "
            "returned them",
            got=f"decay_rate={decay_rate!r}, like={'None' if like is None else '(...)'}",
            fix="Pass both",
        )
    check_decay_rate(function, decay_rate)
    count = np.asarray(leaves["count"].value if "count" in leaves else FORGOTTEN, np.int32)
    for average, name in AVERAGES.items():
        value = leaves[name].value
        hidden = (value * (1 - decay_rate ** float(count))).astype(value.dtype)
        state = {"average": value, "hidden": hidden, "counter": count}
        where = f"{module}/~/{average}"
        found += [(f"{where}/{leaf}", leaves[name].key, array) for leaf, array in state.items()]
    return found


def without_ones(path: Path, leaf: Leaf, wanted: Any) -> Leaf:
    """Returns the leaf with shape `(*features)`, without Haiku's axes of size 1."""
    shape = np.shape(leaf.value)
    if path[-1] in ("kernel", "embedding", "u") or len(shape) < 2:
        return leaf
    features = _larger(shape) or (1,)
    if wanted is not None and _larger(wanted.shape) == _larger(shape):
        features = wanted.shape
    return Leaf(leaf.value.reshape(features), leaf.key)


def with_ones(entries: Arrays, wanted: Arrays) -> Arrays:
    """Returns the entries in the wanted shapes if they only differ in axes of size 1."""
    shaped = {}
    for key, value in entries.items():
        shape = wanted[key].shape if key in wanted else value.shape
        shaped[key] = value.reshape(shape) if _larger(shape) == _larger(value.shape) else value
    return shaped


def _larger(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def raise_for_nameless(function: str, leaves: list[str]) -> NoReturn:
    """Raises an error for leaves outside of modules."""
    _checks.raise_error(
        function,
        "some leaves are outside of any module",
        expected="an entry for each module, by its name in Haiku",
        got=f"{leaves} at the top",
        fix='Nest them: {"batch_norm": params}',
    )
