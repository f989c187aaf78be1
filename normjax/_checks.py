"""Checks the arguments of layers at trace time, from static shapes and dtypes.

Every error has the form `{function}: {problem}. Expected {expected}; got {what was given}. {One
concrete fix}.`
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from normjax._typing import Axes

Shape = tuple[int, ...]

HOST = jax.memory.Space.Host


def raise_error(
    function: str,
    problem: str,
    *,
    expected: str,
    got: str,
    fix: str,
    kind: Callable[[str], Exception] = ValueError,
) -> NoReturn:
    """Raises an error in the form that all errors of normjax have."""
    raise kind(f"{function}: {problem}. Expected {expected}; got {got}. {fix}.")


def must_be_callable(function: str, name: str, given: object, *, expected: str, fix: str) -> None:
    """Raises an error for an argument that should be a function but is not."""
    if not callable(given):
        raise_error(
            function,
            f"{name} cannot be called",
            expected=expected,
            got=f"{name} of type {type(given).__name__}",
            fix=fix,
            kind=TypeError,
        )


def static_train(function: str, train: object) -> bool:
    """Returns `train` as a bool; raises an error if it is traced or not a bool."""
    if isinstance(train, Tracer):
        raise_error(
            function,
            "`train` is traced, but it selects the program to compile",
            expected="a Python bool",
            got=f"train={train}",
            fix="Make it static: jax.jit(..., static_argnames='train'), or close over it",
            kind=TypeError,
        )
    if not isinstance(train, bool) and getattr(train, "dtype", None) != jnp.bool_:
        raise_error(
            function,
            "`train` is not a bool",
            expected="True or False",
            got=f"train={train!r}",
            fix="The order is (params, batch_stats, x, train)",
            kind=TypeError,
        )
    return bool(train)


def boolean(function: str, name: str, given: object) -> bool:
    """Returns a bool option; raises an error for anything else."""
    if not isinstance(given, bool | np.bool_):
        raise_error(
            function,
            f"{name} is not a bool",
            expected="True or False",
            got=f"{name}={given!r}",
            fix="Make it static: close over it instead of passing it through jax.jit",
            kind=TypeError,
        )
    return bool(given)


def array(function: str, x: Any, name: str = "x") -> jax.Array:
    """Returns `x` as an array; raises an error if it cannot be converted, such as None."""
    is_batch = isinstance(x, tuple | list) and any([hasattr(part, "shape") for part in x])
    try:
        if not is_batch:
            return jnp.asarray(x)
    except (TypeError, ValueError):
        pass
    if is_batch or isinstance(x, Mapping):
        raise_error(
            function,
            f"{name} is not an array",
            expected=f"an array of numbers for {name}",
            got=f"{name} of type {type(x).__name__} with {len(x)} arrays",
            fix="Pass one of them, such as the images of (images, labels)"
            if is_batch
            else f"The order is (params, batch_stats, {name}, train)",
            kind=TypeError,
        )
    raise_error(
        function,
        f"{name} is not an array",
        expected=f"an array of numbers for {name}",
        got=f"{name} of type {type(x).__name__}",
        fix=f"Check how {name} was computed: a function without return gives None",
        kind=TypeError,
    )


def activations(function: str, x: Any, name: str = "x") -> jax.Array:
    """Returns `x` as an array; raises an error for integers, booleans and scalars."""
    if not isinstance(x, jax.Array):
        x = array(function, x, name)
    if jax.typeof(x).memory_space is HOST:
        raise_for_host(function, name, x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise_error(
            function,
            f"{name} is not floating-point",
            expected=f"a floating-point or complex {name}",
            got=f"{name}.dtype={x.dtype} for {name}.shape={x.shape}",
            fix=f"Convert it first: {name}.astype(jnp.float32)",
            kind=TypeError,
        )
    if x.ndim == 0:
        raise_error(
            function,
            f"{name} is a scalar",
            expected="rank 1 or more",
            got=f"{name}.ndim=0 for {name}.shape={x.shape}",
            fix=f"Give {name} a feature axis: {name}[None]",
        )
    return x


def raise_for_host(function: str, name: str, value: Any) -> NoReturn:
    """Raises an error for an array in host memory."""
    raise_error(
        function,
        f"{name} is in host memory, but layers compute in device memory",
        expected=f"{name} in device memory",
        got=f"{name} of type {value.aval.str_short()}",
        fix=f"Move it to the device: jax.device_put({name}, jax.memory.Space.Device)",
    )


def axes(function: str, name: str, given: Axes, shape: Shape) -> tuple[int, ...]:
    """Returns axes as ascending, non-negative ints; raises an error for invalid axes."""
    entries = tuple(given) if isinstance(given, Sequence) else (given,)
    rank = len(shape)
    got = f"{name}={given!r} for x.shape={shape}"
    canonical = []
    for entry in entries:
        try:
            axis = operator.index(entry)
        except TypeError:
            raise_error(
                function,
                f"{name} is not made of ints",
                expected="an int or a tuple of ints",
                got=got,
                fix="Pass positions of axes, such as -1 or (1, 2)",
                kind=TypeError,
            )
        if not -rank <= axis < rank:
            raise_error(
                function,
                f"axis {axis} of {name} is out of range",
                expected=f"axes from {-rank} to {rank - 1}",
                got=got,
                fix="Check the rank of x",
            )
        canonical.append(axis % rank)
    if len(set(canonical)) < len(canonical):
        raise_error(
            function,
            f"{name} contains an axis twice",
            expected="each axis once",
            got=got,
            fix=f"Pass each axis once:  {tuple(dict.fromkeys(sorted(canonical)))}",
        )
    return tuple(sorted(canonical))


def other_axes(axes: Collection[int], rank: int) -> tuple[int, ...]:
    """Returns the axes of x that are not among `axes`, ascending."""
    return tuple(sorted(set(range(rank)).difference(axes)))


def mask(function: str, given: Any, shape: Shape) -> jax.Array | None:
    """Returns the mask with x's rank; raises an error for integers and wrong shapes.

    The values of weights are checked only in a NumPy array, since those of a JAX array may be
    traced.
    """
    if given is None:
        return None
    if isinstance(given, np.ndarray) and given.dtype.kind == "f":
        _not_negative(function, given)
    given = jnp.asarray(given)
    if jax.typeof(given).memory_space is HOST:
        raise_for_host(function, "mask", given)
    got = f"mask.shape={given.shape}, mask.dtype={given.dtype} for x.shape={shape}"
    if given.dtype != jnp.bool_ and not jnp.issubdtype(given.dtype, jnp.floating):
        raise_error(
            function,
            "mask contains neither bools nor real weights",
            expected="a bool mask, True for elements that count; or float weights",
            got=got,
            fix="Convert it to a bool mask, as in mask > 0",
            kind=TypeError,
        )
    fits = given.ndim <= len(shape) and all(
        size in (1, full) for size, full in zip(given.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise_error(
            function,
            "mask does not broadcast to x",
            expected=f"a shape that broadcasts to {shape}",
            got=got,
            fix="Add the missing axes at the end, as in mask[:, None]",
        )
    return given.reshape((1,) * (len(shape) - given.ndim) + given.shape)


def _not_negative(function: str, weights: np.ndarray) -> None:
    """Raises an error for weights that are negative, infinite or NaN."""
    wrong = weights[~((weights >= 0) & np.isfinite(weights))]
    if wrong.size:
        raise_error(
            function,
            "mask contains weights that are negative or not finite",
            expected="finite weights of at least 0",
            got=f"{wrong.size} such weights, the first of them {wrong[0]}",
            fix="Clip them: np.maximum(mask, 0)",
        )


def sizes(function: str, name: str, given: Any) -> tuple[int, ...]:
    """Returns one or several axis sizes as ints; raises an error for anything else."""
    try:
        entries = tuple(
            operator.index(size) for size in (given if isinstance(given, Iterable) else (given,))
        )
    except TypeError:
        entries = (0,)
    if min(entries, default=1) < 1:
        raise_error(
            function,
            f"{name} is not a size",
            expected="a positive int, or several",
            got=f"{name}={given!r}",
            fix="Pass the size of x along feature_axes, as in x.shape[-1]",
        )
    return entries


def output_dtype(function: str, dtype: Any, x: jax.Array) -> Any:
    """Returns the dtype of y; raises an error for one that cannot hold it."""
    if dtype is None:
        return x.dtype
    kind = jnp.complexfloating if jnp.iscomplexobj(x) else jnp.inexact
    try:
        asked: Any = jnp.dtype(dtype)
        fits = jnp.issubdtype(asked, kind)
    except TypeError:
        asked, fits = repr(dtype), False
    if not fits:
        raise_error(
            function,
            "dtype cannot hold y",
            expected="a complex dtype" if jnp.iscomplexobj(x) else "a floating-point dtype",
            got=f"dtype={asked} for x.dtype={x.dtype}, x.shape={x.shape}",
            fix="Drop dtype to keep the dtype of x",
            kind=TypeError,
        )
    return asked


def no_common_dtype(function: str, *arrays: Any) -> NoReturn:
    """Raises an error for dtypes that JAX does not promote, such as float8 and float32."""
    dtypes = {str(array.dtype): None for array in arrays if array is not None}
    raise_error(
        function,
        "x and the variables have no common dtype",
        expected="dtypes that JAX promotes, or an explicit dtype",
        got=f"x.dtype={arrays[0].dtype} among {list(dtypes)}",
        fix="Pass dtype=... to the module, such as jnp.bfloat16",
        kind=TypeError,
    )


def choice(function: str, name: str, given: object, allowed: Sequence[object]) -> None:
    """Raises an error for an option outside `allowed`."""
    if given not in allowed:
        raise_error(
            function,
            f"{name} is unknown",
            expected=" or ".join(repr(option) for option in allowed),
            got=f"{name}={given!r}",
            fix="Check the spelling",
        )


def between(
    function: str, name: str, given: Any, low: float, high: float, *, finite: bool = True
) -> None:
    """Raises an error for a number outside `[low, high]`; JAX arrays are not checked."""
    if isinstance(given, jax.Array):
        return
    number = isinstance(given, (int, float, np.number, np.ndarray)) and not isinstance(given, bool)
    if not (
        number
        and np.ndim(given) == 0
        and low <= given <= high
        and (math.isfinite(given) or not finite)
    ):
        bounds = [f"{low} <= {name}"] * (low > -math.inf) + [f"{name} <= {high}"] * (
            high < math.inf
        )
        raise_error(
            function,
            f"{name} is out of range" if number else f"{name} is not a number",
            expected=", ".join(["a finite number" if finite else "a number", *bounds]),
            got=f"{name}={given!r}",
            fix=f"Choose {name} within the range" if number else f"Pass {name} as a float",
            kind=ValueError if number else TypeError,
        )


def number(function: str, name: str, given: Any, low: float, high: float) -> float:
    """Returns a number within `[low, high]` as a float; raises an error for a traced one."""
    if isinstance(given, float) and low <= given < math.inf:  # the common case, checked first
        return given
    if isinstance(given, Tracer):
        raise_error(
            function,
            f"{name} is traced, but it is a constant of the compiled program",
            expected="a number that is known at trace time",
            got=f"{name}={given}",
            fix=f"Pass a Python float, or close over {name} instead of passing it through jax.jit",
            kind=TypeError,
        )
    if isinstance(given, jax.Array) and given.ndim == 0:
        given = given.item()
    if isinstance(given, jax.Array):
        given = np.asarray(given)
    between(function, name, given, low, high)
    return float(given)


def positive_int(given: Any) -> int | None:
    """Returns an int of 1 or more; None for anything else."""
    try:
        value = 0 if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except TypeError:
        return None
    return value if value > 0 else None
