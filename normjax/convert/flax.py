"""Weights between Flax's two APIs: linen's variables and nnx's states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from normjax import _checks
from normjax.convert._trees import Leaf, Path, Tree, check, flatten, match, nest

if TYPE_CHECKING:
    from flax import nnx


def linen_to_nnx(variables: Mapping[str, Any], model: nnx.Module) -> nnx.State:
    """Returns the state of an nnx model with the values of linen's variables.

        nnx.update(model, nj.convert.linen_to_nnx(variables, model))

    | linen | nnx |
    |---|---|
    | collections `params`, `batch_stats` and others | variables of the types `Param`, `BatchStat` and others |
    | names of modules and leaves | attributes of the same names |
    | `layers_0`, as in `self.layers = [...]` | `layers[0]` |
    | `layer_instance/kernel/scale` of WeightNorm and WeightStandardization | `scales` |
    | `layer_instance/kernel/u`, `.../sigma` of SpectralNorm | `batch_stats` |

    That holds for normjax's layers and for Flax's. If names differ, rename keys of the variables first.

    Args:
      variables: as linen's init returned them; a dict of collections. Metadata of sharding is left to the nnx model.
      model: with the variables that the state is for; `nnx.eval_shape` makes one without arrays. It is not changed.

    Returns:
      An `nnx.State` for `nnx.update`, with JAX arrays in the dtypes of the model. Keys and counts of random numbers are
      not in it, so those of the model stay.

    Raises:
      ValueError, TypeError: for variables that the model has and linen has not, or the other way, or of other shapes,
        and statistics that are not finite; each names the leaf.

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
    targets = {_linen_path(path, variable): (path, variable) for path, variable in _variables(model)}
    given = flatten(function, "variables", meta.unbox(variables))
    leaves = {path: Leaf(value, "/".join(path)) for path, value in given.items()}
    wanted = {path: variable.get_value() for path, (_, variable) in targets.items()}
    leaves = {path: _flat_where(leaf, wanted[path]) if path in wanted else leaf for path, leaf in leaves.items()}
    check(function, leaves)
    match(function, leaves, wanted, "/".join)
    return nnx.from_flat_state(
        (path, variable.replace(jnp.asarray(leaves[linen].value, wanted[linen].dtype)))
        for linen, (path, variable) in targets.items()
    )


def nnx_to_linen(model: nnx.Module | nnx.State, *, like: Mapping[str, Any] | None = None) -> dict[str, Tree]:
    """Returns linen's variables with the values of an nnx model.

    The inverse of `linen_to_nnx`, where the names are told.

    Args:
      model: an nnx model, or its state. Keys and counts of random numbers are left out.
      like: variables as linen's init returned them: the result has their structure, shapes and dtypes, or there is an
        error. Needed for a scale of several axes, which nnx keeps flat.

    Returns:
      A dict of collections, of JAX arrays.

    Raises:
      ValueError, TypeError: for leaves that do not fit `like`, and statistics that are not finite; each names the leaf.

    Example:
      >>> import normjax as nj
      >>> from flax import nnx
      >>> variables = nj.convert.nnx_to_linen(nj.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> print(variables["batch_stats"]["var"], sorted(variables["params"]))
      [1. 1.] ['bias', 'scale']
    """
    function = "nnx_to_linen"
    leaves = {
        _linen_path(path, variable): Leaf(variable.get_value(), "/".join(map(str, path)))
        for path, variable in _variables(model)
    }
    wanted: dict[Path, Any] = {}
    if like is not None:
        from flax.core import meta

        wanted = flatten(function, "like", meta.unbox(like))
        leaves = {path: _shaped(leaf, wanted[path]) if path in wanted else leaf for path, leaf in leaves.items()}
        match(function, leaves, wanted, "/".join)
    check(function, leaves)
    return nest(
        {path: jnp.asarray(leaf.value, wanted[path].dtype if wanted else None) for path, leaf in leaves.items()}
    )


def _variables(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """The variables of an nnx model, or those in a state, with their paths; none of random numbers."""
    from flax import nnx

    state = model if isinstance(model, nnx.State) else nnx.state(model)
    found = nnx.to_flat_state(state)
    for path, variable in found:
        if not isinstance(variable, nnx.Variable):
            _checks.refuse(
                "nnx_to_linen",
                f"{'/'.join(map(str, path))} has no type, which names its collection",
                expected="a state of nnx.Variable, such as nnx.state(model)",
                got=f"{type(variable).__name__}",
                fix="Pass the model, or its state before it was turned into pure arrays",
                kind=TypeError,
            )
    return [(path, variable) for path, variable in found if not isinstance(variable, nnx.RngState)]


def _linen_path(path: tuple[Any, ...], variable: Any) -> Path:
    """Where linen has the variable, its collection first."""
    from flax.nnx import variablelib

    parts: list[str] = []
    for i, part in enumerate(path):
        if isinstance(part, int):
            parts[-1:] = [f"{parts[-1]}_{part}" if parts else str(part)]
        elif isinstance(part, tuple):  # of a wrapper: ("scales", ("kernel",)), ("batch_stats", ("kernel", "u"))
            inside = (*part, "scale") if path[i - 1] == "scales" else part
            parts[-1:] = ["/".join(("layer_instance", *map(str, inside)))]
        else:
            parts.append(str(part))
    return variablelib.variable_name_from_type(type(variable)), *parts


def _shaped(leaf: Leaf, wanted: Any) -> Leaf:
    """The leaf in the shape that linen wants, where nnx has it flat."""
    value = leaf.value
    flat = np.ndim(value) == 1 and value.size == np.prod(wanted.shape)
    return Leaf(value.reshape(wanted.shape), leaf.key) if flat else leaf


def _flat_where(leaf: Leaf, wanted: Any) -> Leaf:
    """The leaf flat, where nnx wants it so."""
    value = leaf.value
    flat = wanted.shape == (np.size(value),)
    return Leaf(value.reshape(-1), leaf.key) if flat else leaf
