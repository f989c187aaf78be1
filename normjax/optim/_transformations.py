"""Checks the optimizer that a transformation wraps, and the arguments of `update`."""

from __future__ import annotations

import optax
from jaxtyping import PyTree

from normjax import _checks
from normjax._trees import check_alike


def transformation(
    function: str, inner: optax.GradientTransformation | optax.MultiSteps
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes extra arguments; raises an error for anything else."""
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        order = f"The order is {function}(mask, inner)"
        _checks.raise_error(
            function,
            "inner is not an optax transformation",
            expected="a pair of init and update, such as optax.sgd(0.1)",
            got=f"inner of type {type(inner).__name__}",
            fix=order if function == "renormalize" else "Pass inner=optax.trace(0.9)",
            kind=TypeError,
        )
    return optax.with_extra_args_support(inner)


def check_params(function: str, updates: PyTree, params: PyTree | None) -> None:
    """Raises an error if params are missing or do not fit the updates."""
    if params is None:
        _checks.raise_error(
            function,
            "params are missing, but the directions of the kernels are needed",
            expected="update(updates, state, params)",
            got="params=None",
            fix="Pass params to optimizer.update",
        )
    check_alike(function, ("updates", updates), ("params", params))
