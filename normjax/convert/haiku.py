"""Weights from and to Haiku."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax._trees import Path, nest
from normjax.convert._haiku_momentum import check_decay_rate
from normjax.convert._paths import (
    Others,
    Rename,
    check_others,
    raise_for_others,
    renamed,
    renamed_back,
    unique,
)
from normjax.convert._sources import Arrays, conform, to_numpy
from normjax.convert._trees import (
    Leaf,
    Leaves,
    Tree,
    Trees,
    expectation,
    flatten,
    modules_of,
    put_together,
    take_apart,
)

PARAMS = {"scale": "scale", "offset": "bias", "w": "kernel", "b": "bias", "embeddings": "embedding"}
AVERAGES = {"mean_ema": "mean", "var_ema": "var"}
DIRECTIONS = {"u0": "u", "sigma": "sigma"}
LINEAR = {"kernel": "w", "bias": "b"}
NORM = {"scale": "scale", "bias": "offset", "embedding": "embeddings"}
STATISTICS = ("mean", "var", "count", "u", "sigma")
# After this many steps nothing is left of the averages' start: decay_rate**FORGOTTEN is 0.
FORGOTTEN = 2**30


def from_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    like: tuple[Tree, Tree] | None = None,
    rename: Rename | None = None,
    others: Others = "keep",
) -> Trees:
    """Returns `params` and `batch_stats` with the weights of Haiku's params and state.

    | Haiku | normjax |
    |---|---|
    | `scale`, `offset` of Batch-, Layer-, Instance-, Group- and RMSNorm | `scale`, `bias` |
    | BatchNorm's `mean_ema/average`, `var_ema/average` | `mean`, `var` of `batch_stats` |
    | BatchNorm's `mean_ema/counter` | `count` of `batch_stats` |
    | `u0`, `sigma` of SpectralNorm | `u`, `sigma` of `batch_stats` |
    | `w`, `b` of Linear and ConvND | `kernel`, `bias` |
    | `embeddings` of Embed | `embedding` |

    Both trees have an entry for each module, by its name in Haiku (`"net/~/batch_norm"`). Arrays
    have the shape `(*features)`, without Haiku's axes of size 1.

    Haiku corrects its averages for their start at zero: it stores `hidden`, which is `average * (1
    - decay_rate**counter)`. The average becomes the running statistic. To continue training as
    Haiku would, pass the momentum of `haiku_momentum`.

    Args:
      params: Haiku's params.
      state: Haiku's state.
      like: `(params, batch_stats)` by Haiku's names of modules, each as the init function of its
        layer returned it. The result has this structure, these shapes and these dtypes, or there is
        an error. A `count` that `like` does not have is left out.
      rename: a function from the name of a leaf (`"net/~/batch_norm/scale"`) to the name to read it
        under, or a dict of names or beginnings of names: `{"net/~/batch_norm": "bn"}`.
      others: what to do with leaves that no known module has. "keep", the default, hands them
        through under their own names, since one of them would otherwise refuse a whole model;
        "refuse" raises an error that lists them.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays.

    Raises:
      ValueError, TypeError: for leaves that are refused, missing or do not fit together or `like`,
        two leaves of one name, and statistics that are not finite; each names the leaf.

    Example:
      >>> import numpy as np, normjax as nj
      >>> hk_params = {"batch_norm": {"scale": np.ones((1, 2)), "offset": np.zeros((1, 2))}}
      >>> ema = {"average": np.full((1, 2), 4.0), "hidden": np.full((1, 2), 0.4)}
      >>> ema["counter"] = np.array(1)  # after one step at decay_rate=0.9
      >>> hk_state = {"batch_norm/~/mean_ema": ema, "batch_norm/~/var_ema": ema}
      >>> params, batch_stats = nj.convert.from_haiku(hk_params, hk_state)
      >>> print(params["batch_norm"]["bias"], batch_stats["batch_norm"]["mean"])
      [0. 0.] [4. 4.]

    References:
      `hk.BatchNorm` and `hk.ExponentialMovingAverage` in Haiku's documentation. The correction:
      Kingma & Ba, "Adam" (2015), section 3.
    """
    function = "from_haiku"
    check_others(function, others)
    given = {
        "params": _named(function, "params", params),
        "batch_stats": _named(function, "state", state),
    }
    keys = dict.fromkeys(key for arrays in given.values() for key in arrays)
    names = renamed(function, keys, rename, "/")
    found: list[tuple[Path, str, Leaf]] = []
    unknown: list[Leaf] = []
    wanted = {} if like is None else expectation(function, like)
    for collection, arrays in given.items():
        for key, value in arrays.items():
            leaf = Leaf(value, key)
            path = _path_of(collection, names[key])
            if path is None:
                unknown.append(leaf)
                found.append(((collection, *names[key].rsplit("/", 1)), key, leaf))
            elif path[-1] != "hidden":  # which follows from average and counter
                found.append((path, key, _without_ones(path, leaf, wanted.get(path))))
    if unknown and others == "refuse":
        _refuse(
            function,
            unknown,
            [*PARAMS, "mean_ema/average", "mean_ema/counter", *DIRECTIONS],
            others,
        )
    leaves = unique(function, found)
    return put_together(function, _counted(function, leaves), like, _key_of)


def to_haiku(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    decay_rate: float | None = None,
    like: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    rename: Rename | None = None,
    others: Others = "keep",
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns Haiku's params and state with the values of `params` and `batch_stats`.

    It is the inverse of `from_haiku`, which has the table of names.

    Args:
      params: as `from_haiku` returns them, with an entry for each module.
      batch_stats: as `from_haiku` returns them. Without a `count`, Haiku continues as normjax does
        with `momentum=decay_rate`, as if the start of training were long forgotten.
      decay_rate: the argument of `hk.BatchNorm`, which Haiku's state depends on; needed if there
        are running statistics.
      like: `(params, state)` as Haiku's init returned them. The result has its names, shapes and
        dtypes, or there is an error. Without it, leaves have the shape `(*features)`, which suits
        all layers with the features last but BatchNorm: its arrays have the rank of x, so it needs
        `like`.
      rename: as `from_haiku` got it: it is called with the names in `like`. Without `like`, a dict
        is read backwards.
      others: "keep" hands leaves through that no known module has, under their own names; "refuse"
        raises an error that lists them. A leaf beside those of a norm is always refused.

    Returns:
      Haiku's params and state, of JAX arrays.

    Raises:
      ValueError, TypeError: for leaves that are unknown, missing or do not fit together or `like`,
        statistics that are not finite, running statistics without `decay_rate` or `like`; each
        names the leaf.

    Example:
      >>> import normjax as nj
      >>> params, _ = nj.layer_norm_init(2)
      >>> print(nj.convert.to_haiku({"layer_norm": params}, {})[0]["layer_norm"]["offset"])
      [0. 0.]
    """
    function = "to_haiku"
    check_others(function, others)
    leaves = take_apart(function, params, batch_stats)
    _refuse_unknown(function, leaves, others)
    new_params: list[tuple[str, str, Any]] = []
    new_state: list[tuple[str, str, Any]] = []
    for path, entries in modules_of(leaves).items():
        module = "/".join(path)
        if not module:
            _nameless(function, sorted(entries))
        new_params += _to_params(module, entries)
        new_state += _to_state(function, module, entries, decay_rate, like)
    found = unique(function, new_params), unique(function, new_state)
    if like is None:
        keys = dict.fromkeys(key for arrays in found for key in arrays)
        names = renamed_back(function, keys, rename, "/")
    else:
        names, found = _conformed(function, found, like, rename)
    renamed_params, renamed_state = (
        _nested({names[key]: value for key, value in arrays.items()}) for arrays in found
    )
    return renamed_params, renamed_state


def _conformed(
    function: str, found: tuple[Arrays, Arrays], like: Any, rename: Rename | None
) -> tuple[dict[str, str], tuple[Arrays, Arrays]]:
    """Returns the arrays as in `like`, and the names there of the names that rename returns."""
    trees = zip(("like/params", "like/state"), like, strict=True)
    wanted = [_named(function, name, tree) for name, tree in trees]
    keys = dict.fromkeys(key for arrays in wanted for key in arrays)
    names = renamed(function, keys, rename, "/")
    conformed = []
    for arrays, tree in zip(found, wanted, strict=True):
        expected = {names[key]: value for key, value in tree.items()}
        conformed.append(conform(function, _with_ones(arrays, expected), expected))
    return {new: old for old, new in names.items()}, (conformed[0], conformed[1])


def _refuse_unknown(function: str, leaves: Leaves, others: Others) -> None:
    """Raises for leaves that no known module has, if they are refused or beside those of a norm."""
    known = [*NORM, *LINEAR, *STATISTICS]
    refused = [
        leaf
        for module in modules_of(leaves).values()
        for name, leaf in module.items()
        if name not in known
        and (others == "refuse" or not {"scale", "mean", "u"}.isdisjoint(module))
    ]
    if refused:
        _refuse(function, refused, known, others)


def _named(function: str, name: str, tree: Any) -> Arrays:
    """Returns the arrays of a Haiku tree by module and name, "net/~/linear/w"."""
    found = {}
    for path, value in flatten(function, name, tree).items():
        if len(path) < 2:
            _nameless(function, [*path])
        found["/".join(path)] = to_numpy(function, "/".join(path), value)
    return found


def _path_of(collection: str, name: str) -> Path | None:
    """Returns where a leaf of Haiku goes; None if no known module has it."""
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


def _refuse(function: str, leaves: list[Leaf], known: list[str], others: Others) -> NoReturn:
    refused = [(leaf.key, np.shape(leaf.value)) for leaf in leaves]
    raise_for_others(function, refused, known, others)


def _counted(function: str, leaves: Leaves) -> Leaves:
    """Returns the leaves with one count in place of the counters of both averages."""
    counted = {path: leaf for path, leaf in leaves.items() if not path[-1].startswith("counter of")}
    for path, leaf in leaves.items():
        if path not in counted:
            first = counted.setdefault((*path[:-1], "count"), leaf)
            if first.value != leaf.value:
                _checks.raise_error(
                    function,
                    f"{leaf.key!r} differs from the counter of the mean",
                    expected=f"{first.value}, as in {first.key!r}",
                    got=f"{leaf.value}",
                    fix="Pass the state as Haiku's apply returned it",
                )
    return counted


def _without_ones(path: Path, leaf: Leaf, wanted: Any) -> Leaf:
    """Returns the leaf in the shape `(*features)`, without Haiku's axes of size 1."""
    shape = np.shape(leaf.value)
    if path[-1] in ("kernel", "embedding", "u") or len(shape) < 2:
        return leaf
    features = _larger(shape) or (1,)
    if wanted is not None and _larger(wanted.shape) == _larger(shape):
        features = wanted.shape
    return Leaf(leaf.value.reshape(features), leaf.key)


def _with_ones(entries: Arrays, wanted: Arrays) -> Arrays:
    """Returns the entries in the wanted shapes, if only axes of size 1 differ."""
    shaped = {}
    for key, value in entries.items():
        shape = wanted[key].shape if key in wanted else value.shape
        shaped[key] = value.reshape(shape) if _larger(shape) == _larger(value.shape) else value
    return shaped


def _larger(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _to_params(module: str, leaves: dict[str, Leaf]) -> list[tuple[str, str, Any]]:
    """Returns Haiku's name, the path and the value of each parameter of a module."""
    is_linear = any(name == "kernel" or name.startswith("w") for name in leaves)
    names = LINEAR if is_linear else NORM
    return [
        (f"{module}/{names.get(name, name)}", leaf.key, leaf.value)
        for name, leaf in leaves.items()
        if leaf.key.startswith("params/") and name not in STATISTICS
    ]


def _to_state(
    function: str, module: str, leaves: dict[str, Leaf], decay_rate: float | None, like: Any
) -> list[tuple[str, str, Any]]:
    """Returns Haiku's name, the path and the value of each state of a module."""
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


def _nested(entries: Arrays) -> dict[str, dict[str, Any]]:
    return nest({tuple(key.rsplit("/", 1)): jnp.asarray(value) for key, value in entries.items()})


def _key_of(path: Path) -> str:
    names = NORM | {"kernel": "w", "count": "~/mean_ema/counter", "u": "u0"}
    names |= {new: f"~/{old}/average" for old, new in AVERAGES.items()}
    return "/".join((*path[1:-1], names.get(path[-1], path[-1])))


def _nameless(function: str, leaves: list[str]) -> NoReturn:
    _checks.raise_error(
        function,
        "some leaves are outside of any module",
        expected="an entry for each module, by its name in Haiku",
        got=f"{leaves} at the top",
        fix='Nest them: {"batch_norm": params}',
    )
