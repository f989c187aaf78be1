"""Checks and traces the model to fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from normjax import _checks
from normjax._trees import Path, check_known
from normjax.deploy._constants import FUNCTION
from normjax.deploy._graph import Graph
from normjax.deploy._recipe import find


def check_callable(model: Any) -> None:
    """Raises an error for a model that cannot be called."""
    if not callable(model):
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
    """Traces the model; raises an error if it is in training mode."""
    from flax.errors import ModifyScopeVariableError

    try:
        return find(source, variables, inputs, leaves)
    except ModifyScopeVariableError as error:
        _checks.raise_error(
            FUNCTION,
            "the model updates its statistics, as in training",
            expected="a function in inference mode, such as "
            "functools.partial(model.apply, train=False)",
            got=str(error).split("(https")[0].strip().rstrip("."),
            fix="Pass train=False, use_running_average=True, or the model's own argument",
        )


def check_arrays(leaves: Mapping[Path, Any], inputs: Any) -> None:
    """Raises an error for leaves that are traced or are not arrays."""
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
