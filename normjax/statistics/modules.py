"""Converts Flax modules and training states to functions of variables and inputs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from normjax import _checks
from normjax._trees import is_nnx
from normjax.statistics.flax_errors import explained

# Arguments that tell a module's call whether it is in training or at inference.
TRAIN = ("train", "training", "is_training", "is_train")
INFER = ("deterministic", "use_running_average", "inference", "evaluate", "eval")


class Opened(NamedTuple):
    """A model that can be called.

    Attributes:
      function: `(variables, *inputs) -> outputs`; for a linen module in training, it returns
        `(outputs, new)`.
      variables: its variables; for an nnx module in training, the module.
      inputs: its inputs.
      optimizer: the optimizer of a training state, or None.
    """

    function: Callable[..., Any]
    variables: Any
    inputs: tuple[Any, ...]
    optimizer: Any = None


def open_model(caller: str, model: Any, given: tuple[Any, ...], *, train: bool) -> Opened:
    """Returns a model as a function, with its variables and inputs; functions are not changed.

    Args:
      caller: the name that errors begin with.
      model: a function, a linen module or its `apply`, an nnx module, or a `TrainState`.
      given: the variables and the inputs. A state, an nnx module and a bound linen module hold the
        variables themselves, so only the inputs are given. In training, a linen module without
        variables is initialized.
      train: whether to call the model as in training instead of as at inference.
    """
    first, *others = given if given else (None,)
    if is_state(model):
        own = is_state(first) or _are_collections(first)
        arguments = (first if own else model, *(others if own else given))
        opened = open_model(caller, model.apply_fn, arguments, train=train)
        return opened._replace(optimizer=model.tx, variables=collections_of(opened.variables))
    if is_nnx(model):
        return _open_nnx(caller, model, given, train)
    module = linen_module(model)
    if module is not None and len(given) == 1:
        given = _with_variables(module, given, train)
        first, *others = given
    if len(given) < 2:
        _raise_incomplete(caller, model, given)
    if module is None:
        function = explained(caller, model) if train and callable(model) else model
        return Opened(function, _as_taken(model, first, others), tuple(others))
    function = explained(caller, partial(_call_linen, module, train))
    return Opened(function, collections_of(first), tuple(others))


def _as_taken(function: Callable[..., Any], variables: Any, inputs: list[Any]) -> Any:
    """Returns a training state, or its collections if the function expects those."""
    collections = collections_of(variables)
    if collections is variables or _runs(function, variables, inputs):
        return variables
    return collections if _runs(function, collections, inputs) else variables


def _runs(function: Callable[..., Any], variables: Any, inputs: list[Any]) -> bool:
    try:
        jax.eval_shape(function, variables, *inputs)
    except Exception:  # the function can fail in any way on a state that it does not expect
        return False
    return True


def is_state(value: Any) -> bool:
    """Returns whether a value is a training state, such as Flax's `TrainState`."""
    parts = ("apply_fn", "params", "tx", "opt_state")
    return not isinstance(value, type) and all(hasattr(value, part) for part in parts)


def collections_of(variables: Any) -> Any:
    """Returns the collections of a training state; other variables unchanged."""
    if not is_state(variables):
        return variables
    params = variables.params
    if _are_collections(params):
        return params
    batch_stats = getattr(variables, "batch_stats", None)
    return {"params": params} | ({} if batch_stats is None else {"batch_stats": batch_stats})


def _are_collections(value: Any) -> bool:
    return isinstance(value, Mapping) and "params" in value


def linen_module(model: Any) -> Any:
    """Returns the linen module, given the module or its bound `apply`; None for other functions."""
    linen = sys.modules.get("flax.linen")
    if linen is None:
        return None
    owner = getattr(model, "__self__", None)
    is_apply = isinstance(owner, linen.Module) and getattr(model, "__name__", "") == "apply"
    module = owner if is_apply else model
    return module if isinstance(module, linen.Module) else None


def _with_variables(module: Any, given: tuple[Any, ...], train: bool) -> tuple[Any, ...]:
    """Returns the variables and the inputs, given only the inputs."""
    if isinstance(given[0], Mapping) or is_state(given[0]):
        return given
    if module.scope is not None:
        return module.variables, *given
    if not train:
        return given
    initialize = jax.jit(partial(module.init, **mode_of(module, train)))
    return initialize(_keys(), *given), *given


def _keys() -> dict[str, jax.Array]:
    return dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))


def as_training(model: Any) -> Callable[..., Any]:
    """Returns a linen module or its `apply` as `(variables, *inputs) -> (outputs, new)`."""
    module = linen_module(model)
    return model if module is None else partial(_call_linen, module, True)


def _call_linen(module: Any, train: bool, variables: Any, *inputs: Any) -> Any:
    mode = mode_of(module, train)
    if not train:
        return module.apply(variables, *inputs, **mode)
    mutable = [name for name in variables if name != "params"]
    return module.apply(variables, *inputs, rngs=_keys(), mutable=mutable or False, **mode)


def _open_nnx(caller: str, model: Any, given: tuple[Any, ...], train: bool) -> Opened:
    from flax import nnx

    own = [each for each in given[:1] if is_nnx(each) or is_nnx(each, "State")]
    if len(own) == len(given):
        _raise_incomplete(caller, model, given)
    inputs = given[len(own) :]
    module = nnx.clone(own[0] if own and is_nnx(own[0]) else model)
    if own and is_nnx(own[0], "State"):
        nnx.update(module, own[0])
    (module.train if train else module.eval)()
    mode = mode_of(module, train)
    if train:
        return Opened(lambda module, *inputs: module(*inputs, **mode), module, inputs)
    definition, state = nnx.split(module)
    return Opened(
        lambda state, *inputs: nnx.merge(definition, state)(*inputs, **mode), state, inputs
    )


def mode_of(module: Any, train: bool) -> dict[str, bool]:
    """Returns the arguments that tell a module's call whether it is in training."""
    parameters = inspect.signature(type(module).__call__).parameters
    known = dict.fromkeys(TRAIN, train) | dict.fromkeys(INFER, not train)
    # A module whose constructor has set the mode raises an error if the call sets it again.
    return {
        name: value
        for name, value in known.items()
        if name in parameters and getattr(module, name, None) is None
    }


def _raise_incomplete(caller: str, model: Any, given: tuple[Any, ...]) -> None:
    _checks.raise_error(
        caller,
        "the variables or the inputs are missing",
        expected="a TrainState, an nnx module or a bound linen module and inputs, or a function or "
        "linen module with its variables and inputs",
        got=f"{type(model).__name__} and {len(given)} more: "
        f"{[type(each).__name__ for each in given]}",
        fix=f"Call {caller}(model, variables, x), or {caller}(state, x)",
        kind=TypeError,
    )
