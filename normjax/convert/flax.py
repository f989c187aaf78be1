"""Converts weights between Flax's two APIs: linen variables and nnx states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax._trees import Path, nest, plain
from normjax.convert._leaf import Leaf, Leaves, check
from normjax.convert._match import match
from normjax.convert._names import unique
from normjax.convert._rename import Rename, renamed, renamed_back
from normjax.convert._trees import Tree, flatten

if TYPE_CHECKING:
    from flax import nnx


def linen_to_nnx(
    variables: Mapping[str, Any], model: nnx.Module, *, rename: Rename | None = None
) -> nnx.State:
    """Converts linen variables to the state of an nnx model.

        nnx.update(model, nj.convert.linen_to_nnx(variables, model))

    | linen | nnx |
    |---|---|
    | collections such as `params`, `batch_stats` | variables such as `Param`, `BatchStat` |
    | names of modules and leaves | attributes of the same names |
    | `layers_0`, as in `self.layers = [...]` | `layers[0]` |
    | `layer_instance/kernel/scale` of WeightNorm and WeightStandardization | `scales` |
    | `layer_instance/kernel/u`, `.../sigma` of SpectralNorm | `batch_stats` |

    In linen, a layer that is wrapped in a compact method is stored beside its wrapper (`Dense_0`,
    and `Dense_0/kernel/u`); in nnx it is stored inside the wrapper. The conversion moves it. Layers
    of normjax and of Flax are converted alike. If names differ, pass `rename`.

    Args:
      variables: a dict of collections, as returned by linen's init. Sharding metadata is taken from
        the nnx model instead.
      model: the nnx model that the state is for; `nnx.eval_shape` creates one without arrays. It is
        not changed.
      rename: new paths for variables within their collections, such as `"Dense_0/kernel"`: a
        function from path to path, or a dict of paths or first parts of paths: `{"Dense_0":
        "head"}`.

    Returns:
      An `nnx.State` for `nnx.update`, with JAX arrays in the dtypes of the model. It does not
      contain RNG keys and counts, so the model keeps its own.

    Raises:
      ValueError, TypeError: if only one side has a variable, or shapes differ; if two variables
        have the same path; if statistics are not finite. The error names the leaf.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> from flax import nnx
      >>> norm = nj.linen.BatchNorm(use_running_average=True)
      >>> variables = norm.init(jax.random.key(0), jnp.ones((1, 3)))
      >>> variables["batch_stats"]["mean"] += 5
      >>> model = nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> nnx.update(model, nj.convert.linen_to_nnx(variables, model))
      >>> print(model.mean[...])
      [5. 5. 5.]
    """
    from flax import nnx
    from flax.core import meta

    function = "linen_to_nnx"
    targets = _variables(function, model)
    given = flatten(function, "variables", meta.unbox(variables))
    names = _renamed(function, given, rename)
    adopted = _adopted(names.values())
    leaves = unique(
        function,
        (
            (adopted[names[path]], "/".join(path), Leaf(value, "/".join(path)))
            for path, value in given.items()
        ),
    )
    wanted = {path: plain(variable) for path, (_, variable) in targets.items()}
    leaves = _as_flat_as(leaves, wanted)
    check(function, leaves)
    match(function, leaves, wanted, whose="the model")
    state: list[tuple[Any, Any]] = []
    for linen, (path, variable) in targets.items():
        value = jnp.asarray(leaves[linen].value, wanted[linen].dtype)
        is_variable = isinstance(variable, nnx.Variable)
        state.append((path, variable.replace(value) if is_variable else value))
    return nnx.from_flat_state(state)


def nnx_to_linen(
    model: nnx.Module | nnx.State,
    *,
    like: Mapping[str, Any] | None = None,
    rename: Rename | None = None,
) -> dict[str, Tree]:
    """Converts an nnx model to linen variables.

    It is the inverse of `linen_to_nnx`, whose docstring has the table of names.

    Args:
      model: an nnx model, or its state. RNG keys and counts are left out.
      like: variables as returned by linen's init. The result has the same structure, shapes and
        dtypes; otherwise there is an error. `like` is required for a scale of several axes, which
        is flat in nnx, and for layers that are wrapped in compact methods.
      rename: the `rename` that was passed to `linen_to_nnx`. It is called with the paths in `like`.
        Without `like`, a dict is inverted.

    Returns:
      A dict of collections with JAX arrays.

    Raises:
      ValueError, TypeError: if leaves do not fit `like`; if two leaves have the same path (as
        `norm_0` and `norm[0]`); if statistics are not finite. The error names the leaf.

    Example:
      >>> import normjax as nj
      >>> from flax import nnx
      >>> variables = nj.convert.nnx_to_linen(nj.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> print(variables["batch_stats"]["var"], sorted(variables["params"]))
      [1. 1.] ['bias', 'scale']
    """
    function = "nnx_to_linen"
    leaves: Leaves = {
        linen: Leaf(plain(variable), "/".join(map(str, path)))
        for linen, (path, variable) in _variables(function, model).items()
    }
    wanted: dict[Path, Any] = {}
    if like is None:
        back = _renamed(function, leaves, rename, renamed_back)
    else:
        from flax.core import meta

        given = flatten(function, "like", meta.unbox(like))
        names = _renamed(function, given, rename)
        back = {new: old for old, new in names.items()}
        wanted = {names[path]: value for path, value in given.items()}
        elsewhere = {inside: path for path, inside in _adopted(wanted).items()}
        moved = ((elsewhere.get(path, path), leaf.key, leaf) for path, leaf in leaves.items())
        leaves = _as_flat_as(unique(function, moved), wanted)
        match(function, leaves, wanted, backwards=True)
    check(function, leaves)
    dtypes = {path: value.dtype for path, value in wanted.items()}
    return nest(
        {back[path]: jnp.asarray(leaf.value, dtypes.get(path)) for path, leaf in leaves.items()}
    )


def _variables(function: str, model: Any) -> dict[Path, tuple[tuple[Any, ...], Any]]:
    """Returns the variables of an nnx model or state with their nnx paths, by linen path.

    RNG variables are left out.
    """
    from flax import nnx

    found = nnx.to_flat_state(model if isinstance(model, nnx.State) else nnx.state(model))
    variables = ((path, value) for path, value in found if not isinstance(value, nnx.RngState))
    return unique(
        function,
        (
            ((_collection(function, path, value), *_linen_path(path)), _shown(path), (path, value))
            for path, value in variables
        ),
    )


def _shown(path: tuple[Any, ...]) -> str:
    """Returns an nnx path as a Python expression, such as "norms[0].scale"."""
    parts = (f"[{part!r}]" if isinstance(part, int | tuple) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def _renamed(
    function: str,
    paths: Iterable[Path],
    rename: Rename | None,
    by: Callable[..., dict[str, str]] = renamed,
) -> dict[Path, Path]:
    """Returns the new paths, renamed within their collections."""
    paths = list(paths)
    if rename is None:
        return {path: path for path in paths}
    keys = dict.fromkeys("/".join(path[1:]) for path in paths)
    names = by(function, keys, rename, "/")
    # A key such as 'Dense_0/kernel/u' contains slashes; unless it is renamed, it stays one key.
    return {path: _new_path(path, names["/".join(path[1:])]) for path in paths}


def _new_path(path: Path, name: str) -> Path:
    old = "/".join(path[1:])
    if name == old:
        return path
    leaf = path[-1]
    if name.endswith(f"/{leaf}"):
        return (path[0], *name.removesuffix(f"/{leaf}").split("/"), leaf)
    return (path[0], *name.split("/"))


def _collection(function: str, path: tuple[Any, ...], variable: Any) -> str:
    from flax import nnx
    from flax.nnx import variablelib

    if isinstance(variable, nnx.Variable):
        return variablelib.variable_name_from_type(type(variable))
    # Flax's WeightNorm stores its scales as plain arrays (google/flax#5577).
    if "scales" not in path:
        _checks.raise_error(
            function,
            f"{'/'.join(map(str, path))} has no type, which names its collection",
            expected="a state of nnx.Variable, such as nnx.state(model)",
            got=f"{type(variable).__name__}",
            fix="Pass the model, or its state before it was turned into pure arrays",
            kind=TypeError,
        )
    return "params"


def _linen_path(path: tuple[Any, ...]) -> Path:
    parts: list[str] = []
    for i, part in enumerate(path):
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}_{part}" if parts else str(part)]
        elif isinstance(part, tuple):
            # A wrapper has ("scales", ("kernel",)) and ("batch_stats", ("kernel", "u")).
            inside = (*part, "scale") if path[i - 1] == "scales" else part
            parts[-1:] = ["/".join(("layer_instance", *map(str, inside)))]
        else:
            parts.append(str(part))
    return tuple(parts)


def _adopted(paths: Iterable[Path]) -> dict[Path, Path]:
    """Returns the path of each linen variable with wrapped layers inside their wrappers.

    If `setup` creates the layer, it is inside, as `layer_instance`. If a compact method creates it,
    it is beside its wrapper under its own name: "Dense_0" beside "WeightNorm_0", which has the leaf
    "Dense_0/kernel/scale".
    """
    paths = list(paths)
    owners: dict[Path, Path] = {
        (*path[1:-2], path[-1].split("/")[0]): path[1:-1] for path in paths if "/" in path[-1]
    }

    def inside(path: Path) -> Path:
        if "/" in path[-1]:
            return (*path[:-1], "/".join(("layer_instance", *path[-1].split("/")[1:])))
        for length in range(2, len(path)):
            if path[1:length] in owners:
                return (path[0], *owners[path[1:length]], "layer_instance", *path[length:])
        return path

    return {path: inside(path) for path in paths}


def _as_flat_as(leaves: Leaves, wanted: Mapping[Path, Any]) -> Leaves:
    """Returns the leaves in the wanted shapes, since nnx stores a scale of several axes flat."""

    def fits(value: Any, shape: tuple[int, ...]) -> bool:
        return np.size(value) == math.prod(shape) and 1 in (np.ndim(value), len(shape))

    shaped = dict(leaves)
    for path, leaf in leaves.items():
        if path in wanted and fits(leaf.value, wanted[path].shape):
            shaped[path] = Leaf(leaf.value.reshape(wanted[path].shape), leaf.key)
    return shaped
