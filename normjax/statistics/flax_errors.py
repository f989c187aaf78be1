"""Explains errors of Flax for models that were called with wrong collections."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from normjax import _checks


def explained(caller: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with Flax's errors about collections explained.

    Args:
      caller: the name that errors begin with.
      function: a function that may call a linen module.
    """

    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        try:
            return function(*args, **settings)
        except Exception as error:
            _raise_for(caller, error)
            raise

    return call


def _raise_for(caller: str, error: Exception) -> None:
    """Raises an error about a collection that is missing or immutable."""
    errors = sys.modules.get("flax.errors")
    if errors is None:
        return
    got = str(error).split("(https")[0].strip().rstrip(".")
    if isinstance(error, errors.ModifyScopeVariableError):
        _checks.raise_error(
            caller,
            "the model updates a collection that is not mutable",
            expected="a linen module, or its apply with mutable=['batch_stats']",
            got=got,
            fix="Pass the module itself, or functools.partial(model.apply, train=True, "
            "mutable=['batch_stats'])",
        )
    if isinstance(error, errors.ScopeCollectionNotFound):
        _checks.raise_error(
            caller,
            "a collection of the model is missing",
            expected="everything that model.init returned: {'params': ..., 'batch_stats': ...}",
            got=got,
            fix="Pass all collections; a TrainState needs a field batch_stats for them",
        )
