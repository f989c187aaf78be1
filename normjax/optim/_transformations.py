"""What the transformations ask of the optimizer that they wrap, and of its arguments."""

from __future__ import annotations

import optax
from jaxtyping import PyTree

from normjax import _checks
from normjax._trees import check_alike


def transformation(
    function: str, inner: optax.GradientTransformation | optax.MultiSteps
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes extra arguments; refuses what is none."""
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    if not isinstance(inner, optax.GradientTransformation):
        _checks.raise_error(
            function,
            "inner is no optax transformation",
            expected="a pair of init and update, such as optax.sgd(0.1)",
            got=f"inner of type {type(inner).__name__}",
            fix=f"The order is {function}(mask, inner)"
            if function == "renormalize"
            else "Pass inner=optax.trace(0.9)",
            kind=TypeError,
        )
    return optax.with_extra_args_support(inner)


def check_params(function: str, updates: PyTree, params: PyTree | None) -> None:
    """Refuses missing params, and params that updates do not fit."""
    if params is None:
        _checks.raise_error(
            function,
            "params are missing, and a direction is that of a parameter",
            expected="update(updates, state, params)",
            got="params=None",
            fix="Pass params to optimizer.update",
        )
    check_alike(function, ("updates", updates), ("params", params))
