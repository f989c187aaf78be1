"""Takes models as they come: functions, linen and nnx modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from normjax import _checks
from normjax._trees import Path, check_known
from normjax.deploy._constants import FUNCTION
from normjax.deploy._graph import Graph
from normjax.deploy._recipe import find

# Arguments of Flax modules that choose the mode, and their values at inference.
MODES = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def as_function(model: Any) -> Callable[..., Any]:
    """Returns a function of variables and inputs that does inference."""
    from flax import linen, nnx

    owner = getattr(model, "__self__", None)
    if isinstance(owner, linen.Module) and model.__name__ == "apply":
        model = owner
    if isinstance(model, linen.Module):
        taken = inspect.signature(model.__call__).parameters
        return partial(model.apply, **{name: MODES[name] for name in taken if name in MODES})
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
        definition = nnx.graphdef(model)
        return lambda state, *inputs: nnx.merge(definition, state)(*inputs)
    if callable(model):
        return model
    _checks.raise_error(
        FUNCTION,
        "model cannot be called",
        expected="a function (variables, *inputs) -> outputs, a linen or an nnx module",
        got=f"{type(model).__name__}",
        fix="The order is (model, variables, *inputs)",
        kind=TypeError,
    )


def traced(
    source: Callable[..., Any], variables: Any, inputs: tuple[Any, ...], leaves: Mapping[Path, Any]
) -> Graph:
    """Traces the model; raises an error for one that trains."""
    from flax.errors import ModifyScopeVariableError

    try:
        return find(source, variables, inputs, leaves)
    except ModifyScopeVariableError as error:
        _checks.raise_error(
            FUNCTION,
            "the model updates its statistics, as in training",
            expected="the function that does inference, such as "
            "functools.partial(model.apply, train=False)",
            got=str(error).split("(https")[0].strip().rstrip("."),
            fix="Pass train=False, use_running_average=True, or what the model calls it",
        )


def check_arrays(leaves: Mapping[Path, Any], inputs: Any) -> None:
    """Raises an error for what is traced, or is not an array."""
    named = [("/".join(path), leaf) for path, leaf in leaves.items()]
    for name, leaf in [*named, *(("an input", leaf) for leaf in jax.tree.leaves(inputs))]:
        check_known(
            FUNCTION,
            name,
            leaf,
            because="but folding needs its value",
            fix="Fold outside of jax.jit, and jit the `apply` of the result",
        )
        if isinstance(leaf, bool | str):
            _checks.raise_error(
                FUNCTION,
                f"{name} is a {type(leaf).__name__}, which chooses what the model does",
                expected="arrays",
                got=repr(leaf),
                fix="Bind it first, as in functools.partial(model.apply, train=False)",
                kind=TypeError,
            )
