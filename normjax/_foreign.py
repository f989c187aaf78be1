"""Names of other libraries for arguments, classes and functions of normjax, used in errors.

A function that knows foreign names ends its arguments with `**_foreign: Never` and begins with

    if _foreign:
        raise_for_foreign(batch_norm, _foreign)

so a call with valid arguments has no overhead. `with_foreign_names` hides the catch-all from
`inspect.signature`, `help` and run-time type checkers.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar

from normjax._checks import raise_error

Function = TypeVar("Function", bound=Callable[..., Any])

# The names in normjax, in the order of the search. "not" marks the opposite meaning.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "training": ("train", "not use_running_average"),
    "is_training": ("train", "not use_running_average"),
    "train": ("not use_running_average",),
    "use_running_average": ("not train",),
    "deterministic": ("not train", "use_running_average"),
    "inference": ("not train", "use_running_average"),
    "eps": ("epsilon",),
    "variance_epsilon": ("epsilon",),
    "decay": ("momentum",),
    "decay_rate": ("momentum",),
    "axis": ("feature_axes", "reduction_axes"),
    "axes": ("feature_axes", "reduction_axes"),
    "dim": ("feature_axes", "reduction_axes"),
    "normalized_shape": ("num_features", "feature_axes", "reduction_axes"),
    "channel_axis": ("feature_axes", "axis"),
    "data_format": ("feature_axes", "axis"),
    "feature_axes": ("axis",),
    "feature_axis": ("feature_axes", "axis"),
    "reduction_axis": ("reduction_axes",),
    "features": ("num_features",),
    "num_channels": ("num_features",),
    "groups": ("num_groups",),
    "power_iterations": ("n_steps",),
    "n_power_iterations": ("n_steps",),
    "cross_replica_axis": ("axis_name",),
    "process_group": ("axis_name",),
    "sample_weight": ("mask",),
    "input": ("x",),
    "inputs": ("x",),
    "rng": ("key", "rngs"),
    "rngs": ("key",),
    "dtype": ("param_dtype",),
    "center": ("use_bias",),
    "offset": ("use_bias",),
    "create_offset": ("use_bias",),
    "create_scale": ("use_scale",),
    "affine": ("use_scale", "use_bias"),
    "elementwise_affine": ("use_scale", "use_bias"),
}
ABSENT = {
    "track_running_stats": "Drop it: to normalize by the batch at inference too, pass train=True "
    "(use_running_average=False in Flax modules) and discard the new batch_stats",
}
MODES = ("train", "training", "is_training", "use_running_average", "deterministic", "inference")


class Nothing:
    """The default of a missing argument, so that the error names the foreign argument first."""

    def __repr__(self) -> str:
        return "nothing"


def with_foreign_names(function: Function) -> Function:
    """Makes a function accept foreign names, so that its body can raise a helpful error.

    Tools see the function without `**_foreign`. An argument that often has another name may be
    missing: for a call with `training=True` instead of `train`, Python would only report that
    `train` is missing.
    """
    shown = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(shown, function)
    delattr(shown, "__wrapped__")
    del function.__annotations__["_foreign"]
    shown.__kwdefaults__ = function.__kwdefaults__
    shown.__annotations__ = function.__annotations__
    signature = inspect.signature(function)
    parameters = [value for name, value in signature.parameters.items() if name != "_foreign"]
    setattr(shown, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    setattr(function, "__wrapped__", shown)  # noqa: B010
    required = [value.name for value in parameters if value.kind == value.POSITIONAL_OR_KEYWORD]
    if function.__defaults__ is None and required[-1] in (
        "train",
        "num_features",
        "reduction_axes",
    ):
        function.__defaults__ = (Nothing(),)
    return function


def raise_for_foreign(function: Callable[..., Any], foreign: Mapping[str, object]) -> NoReturn:
    """Raises an error for keyword arguments that the function does not have."""
    name, value = next(iter(foreign.items()))
    known = [other for other in inspect.signature(function).parameters if other != "self"]
    names = _names_here(name, known)
    expected = f"arguments among {known}"
    if names:
        problem = f"{name}= has another name here"
        expected = " or ".join(map(_described, names))
        fix = "Write " + " or ".join(_written(other, value) for other in names)
    elif (sister := _sister_with(function, name)) is not None:
        owner, names = sister
        written = " or ".join(_written(other, value) for other in names) or "it"
        problem, fix = f"{name}= is an argument of {owner}", f"Pass {written} there"
    elif name in MODES:
        problem = f"{name}= has no meaning here"
        fix = "Drop it: this layer computes the same in training and at inference"
    elif name in ABSENT:
        problem, fix = f"{name}= has no counterpart here", ABSENT[name]
    else:
        problem, fix = f"{name}= is unknown", "Check the spelling"
        if nearest := difflib.get_close_matches(name, known, n=1):
            fix = f"Did you mean {nearest[0]}={_short(value)}"
    raise_error(
        _title_of(function),
        problem,
        expected=expected,
        got=f"{name}={_short(value)}",
        fix=fix,
        kind=TypeError,
    )


def _described(name: str) -> str:
    opposite = name.removeprefix("not ")
    return f"{name}=" if name == opposite else f"{opposite}=, which means the opposite"


def _written(name: str, value: object) -> str:
    """Returns the argument as written for normjax, with its value if that is known and short."""
    inverse, name = name.startswith("not "), name.removeprefix("not ")
    if inverse:
        return f"{name}={not value}" if isinstance(value, bool) else f"{name}=..."
    return f"{name}={_short(value)}"


def _short(value: object) -> str:
    """Returns the repr of a value, or "..." for arrays and long values."""
    simple = isinstance(value, bool | int | float | str | tuple | list | None)
    text = repr(value)
    return text if simple and len(text) <= 60 and "\n" not in text else "..."


def _title_of(function: Callable[..., Any]) -> str:
    """Returns the name of a function, or the class of a constructor or a call."""
    name = function.__qualname__
    return name.removesuffix(".__init__").removesuffix(".__call__")


def _names_here(name: str, known: Collection[str]) -> list[str]:
    """Returns what a foreign name may be called among the known arguments."""
    return [other for other in ARGUMENTS.get(name, ()) if other.split()[-1] in known]


def _sister_with(function: Callable[..., Any], name: str) -> tuple[str, list[str]] | None:
    """Returns which function has the argument: the init of a layer, the layer, or a call.

    The list has the names of the argument there; it is empty if it has the same name.
    """
    module, title = sys.modules[function.__module__], _title_of(function)
    sisters = {
        title.removesuffix("_init"): getattr(module, title.removesuffix("_init"), None),
        f"{title}_init": getattr(module, f"{title}_init", None),
        f"the call of {title}": vars(getattr(module, title, object)).get("__call__"),
    }
    there = {
        text: inspect.signature(sister).parameters
        for text, sister in sisters.items()
        if inspect.isroutine(sister) or isinstance(sister, type)
    }
    for text, known in there.items():
        if name in known:
            return text, []
    for text, known in there.items():
        if names := _names_here(name, known):
            return text, names
    return None


def explain_constructor(kind: type) -> None:
    """Makes the constructor of a Flax module explain foreign names.

    The constructor is generated by dataclasses or inherited from Flax, so it cannot end with
    `**_foreign`.
    """
    construct: Callable[..., None] = kind.__init__
    known = inspect.signature(construct).parameters

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        try:
            construct(self, *args, **fields)
        except TypeError:
            foreign = {name: value for name, value in fields.items() if name not in known}
            if not foreign or any(value.kind == value.VAR_KEYWORD for value in known.values()):
                raise
            raise_for_foreign(construct, foreign)

    setattr(kind, "__init__", __init__)  # noqa: B010


# Names of other libraries for classes of normjax or its packages.
CLASSES = {
    "SyncBatchNorm": "BatchNorm",
    "BatchNormalization": "BatchNorm",
    "LayerNormalization": "LayerNorm",
    "GroupNormalization": "GroupNorm",
    "RMSNormalization": "RMSNorm",
    "SpectralNormalization": "SpectralNorm",
    "BatchNorm1d": "BatchNorm",
    "BatchNorm2d": "BatchNorm",
    "BatchNorm3d": "BatchNorm",
    "InstanceNorm1d": "InstanceNorm",
    "InstanceNorm2d": "InstanceNorm",
    "InstanceNorm3d": "InstanceNorm",
    "LocalResponseNormalization": "LocalResponseNorm",
}
FLAX = ("linen", "nnx")
PACKAGES = ("weights", "convert", "deploy", "diagnostics", "optim")


def where_is_class(name: str, package: str, here: Collection[str]) -> str:
    """Returns the message for a name that `normjax.linen` or `normjax.nnx` does not have."""
    message = f"module 'normjax.{package}' has no attribute {name!r}"
    nearest = difflib.get_close_matches(CLASSES.get(name, name), here, n=1, cutoff=0.8)
    return f"{message}. Did you mean normjax.{package}.{nearest[0]}?" if nearest else message


def where_is(name: str, load: Callable[[str], Any], here: Collection[str]) -> str:
    """Returns the error message for a name that the top level of normjax does not have.

    Args:
      name: the name.
      load: a function that returns a package of normjax by its name.
      here: the names that the top level has.
    """
    message = f"module 'normjax' has no attribute {name!r}"
    if name.startswith("_"):
        return message
    kind = CLASSES.get(name, name)
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=RMS)(?=N)", "_", kind).lower()
    places = [f"normjax.{package}.{kind}" for package in FLAX if kind in load(package).__all__]
    if places:
        function = f"weights.{snake}" if snake in load("weights").__all__ else snake
        return (
            f"{message}. The Flax modules are {' and '.join(places)}; the function is "
            f"normjax.{function}."
        )
    places = [f"normjax.{package}.{name}" for package in PACKAGES if name in load(package).__all__]
    nearest = difflib.get_close_matches(snake, here, n=1, cutoff=0.8)
    found = " or ".join(places or [f"normjax.{near}" for near in nearest])
    return f"{message}. Did you mean {found}?" if found else f"{message}."
