"""Weights from and to Haiku."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from normjax import _checks
from normjax._trees import Path, nest
from normjax.convert._haiku_names import (
    DIRECTIONS,
    LINEAR,
    NORM,
    OF_AVERAGE,
    PARAMS,
    key_of,
    named,
    path_of,
    raise_for_nameless,
    to_params,
    to_state,
    with_ones,
    without_ones,
)
from normjax.convert._leaf import STATISTICS, Leaf, Leaves, modules_of
from normjax.convert._match import conform
from normjax.convert._names import unique
from normjax.convert._others import Others, check_others, refuse
from normjax.convert._rename import Rename, renamed, renamed_back
from normjax.convert._sources import Arrays
from normjax.convert._trees import Tree, Trees, expectation, put_together, take_apart


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
        "params": named(function, "params", params),
        "batch_stats": named(function, "state", state),
    }
    keys = dict.fromkeys(key for arrays in given.values() for key in arrays)
    names = renamed(function, keys, rename, "/")
    found: list[tuple[Path, str, Leaf]] = []
    unknown: list[Leaf] = []
    wanted = {} if like is None else expectation(function, like)
    for collection, arrays in given.items():
        for key, value in arrays.items():
            leaf = Leaf(value, key)
            path = path_of(collection, names[key])
            if path is None:
                unknown.append(leaf)
                found.append(((collection, *names[key].rsplit("/", 1)), key, leaf))
            elif path[-1] != "hidden":  # which follows from average and counter
                found.append((path, key, without_ones(path, leaf, wanted.get(path))))
    if unknown and others == "refuse":
        refuse(function, unknown, [*PARAMS, *OF_AVERAGE, *DIRECTIONS], others)
    leaves = unique(function, found)
    return put_together(function, _counted(function, leaves), like, key_of)


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
            raise_for_nameless(function, sorted(entries))
        new_params += to_params(module, entries)
        new_state += to_state(function, module, entries, decay_rate, like)
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
    wanted = [named(function, name, tree) for name, tree in trees]
    keys = dict.fromkeys(key for arrays in wanted for key in arrays)
    names = renamed(function, keys, rename, "/")
    conformed = []
    for arrays, tree in zip(found, wanted, strict=True):
        expected = {names[key]: value for key, value in tree.items()}
        conformed.append(conform(function, with_ones(arrays, expected), expected))
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
        refuse(function, refused, known, others)


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


def _nested(entries: Arrays) -> dict[str, dict[str, Any]]:
    return nest({tuple(key.rsplit("/", 1)): jnp.asarray(value) for key, value in entries.items()})
