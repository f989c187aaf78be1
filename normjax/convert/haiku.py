"""Converts weights from and to Haiku."""

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
    """Converts Haiku's params and state to `params` and `batch_stats`.

    | Haiku | normjax |
    |---|---|
    | `scale`, `offset` of Batch-, Layer-, Instance-, Group- and RMSNorm | `scale`, `bias` |
    | BatchNorm's `mean_ema/average`, `var_ema/average` | `mean`, `var` of `batch_stats` |
    | BatchNorm's `mean_ema/counter` | `count` of `batch_stats` |
    | `u0`, `sigma` of SpectralNorm | `u`, `sigma` of `batch_stats` |
    | `w`, `b` of Linear and ConvND | `kernel`, `bias` |
    | `embeddings` of Embed | `embedding` |

    Both trees have an entry for each module under its Haiku name (`"net/~/batch_norm"`). Arrays
    have the shape `(*features)`, without Haiku's axes of size 1.

    Haiku starts its moving averages at zero and corrects this bias: it stores `hidden`, which is
    `average * (1 - decay_rate**counter)`. The corrected average becomes the running statistic. To
    continue training exactly as Haiku would, use the momentum that `haiku_momentum` returns.

    Args:
      params: Haiku's params.
      state: Haiku's state.
      like: `(params, batch_stats)` with an entry for each Haiku module, as returned by the init
        function of the layer. The result has this structure, and these shapes and dtypes; otherwise
        there is an error. A `count` that `like` does not have is left out.
      rename: new names for leaves such as `"net/~/batch_norm/scale"`: a function from name to name,
        or a dict of names or first parts of names: `{"net/~/batch_norm": "bn"}`.
      others: what to do with leaves that do not belong to a known module. "keep", the default,
        passes them through under their own names; "refuse" raises an error that lists them.

    Returns:
      `params` and `batch_stats`, nested dicts of JAX arrays.

    Raises:
      ValueError, TypeError: if leaves are refused or missing, or do not fit each other or `like`;
        if two leaves have the same name; if statistics are not finite. The error names the leaf.

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
            elif path[-1] != "hidden":  # it follows from average and counter
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
    """Converts `params` and `batch_stats` to Haiku's params and state.

    It is the inverse of `from_haiku`, whose docstring has the table of names.

    Args:
      params: as `from_haiku` returns them, with an entry for each module.
      batch_stats: as `from_haiku` returns them. Without a `count`, Haiku continues like normjax
        with `momentum=decay_rate`, without bias correction.
      decay_rate: the argument of `hk.BatchNorm`, on which Haiku's state depends. It is required if
        there are running statistics.
      like: `(params, state)` as returned by Haiku's init. The result has the same names, shapes and
        dtypes; otherwise there is an error. Without `like`, leaves have the shape `(*features)`,
        which is right for all layers with features last except BatchNorm. The arrays of BatchNorm
        have the rank of x, so it requires `like`.
      rename: the `rename` that was passed to `from_haiku`. It is called with the names in `like`.
        Without `like`, a dict is inverted.
      others: "keep" passes leaves that do not belong to a known module through under their own
        names, "refuse" raises an error that lists them. An unknown leaf in a known norm always
        raises an error.

    Returns:
      Haiku's params and state, of JAX arrays.

    Raises:
      ValueError, TypeError: if leaves are unknown or missing, or do not fit each other or `like`;
        if statistics are not finite; for running statistics without `decay_rate` or `like`. The
        error names the leaf.

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
    """Returns the arrays as in `like`, and the names in `like` for the names from `rename`."""
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
    """Raises an error for unknown leaves that are refused or that are in a known norm."""
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
    """Returns the leaves with one count instead of the counters of both averages."""
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
