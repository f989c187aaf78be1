"""What a layer asks of its arguments, settled at trace time from static shapes and dtypes.

Every refusal reads
`{function}: {problem}. Expected {expected}; got {what was given}. {One concrete fix}.`
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

SCALARS = ("count", "alpha", "sigma")
HOST = jax.memory.Space.Host
REAL = ("var", "threshold", "epsilon", "alpha", "sigma")


def raise_error(
    function: str,
    problem: str,
    *,
    expected: str,
    got: str,
    fix: str,
    kind: Callable[[str], Exception] = ValueError,
) -> NoReturn:
    """Raises the one form of error that normjax has."""
    raise kind(f"{function}: {problem}. Expected {expected}; got {got}. {fix}.")


def must_be_callable(function: str, name: str, given: object, *, expected: str, fix: str) -> None:
    """Refuses an argument that is to be a function and is none."""
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
    """Returns `train` as a bool; refuses a traced or a non-boolean one."""
    if isinstance(train, Tracer):
        raise_error(
            function,
            "`train` is traced, but it chooses which program is compiled",
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


def array(function: str, x: Any, name: str = "x") -> jax.Array:
    """Returns `x` as an array; refuses what cannot be one, such as None."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        pass
    raise_error(
        function,
        f"{name} is not an array",
        expected=f"an array of numbers for {name}",
        got=f"{name} of type {type(x).__name__}",
        fix=f"Check what {name} was computed by: a function without return gives None",
        kind=TypeError,
    )


def activations(function: str, x: Any, name: str = "x") -> jax.Array:
    """Returns `x` as an array; refuses integers, booleans and scalars."""
    if not isinstance(x, Tracer):
        x = array(function, x, name)
    if _memory_of(x) is HOST:
        _raise_for_host(function, name, x)
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


def _memory_of(value: Any) -> Any:
    return getattr(getattr(value, "aval", None), "memory_space", None)


def _raise_for_host(function: str, name: str, value: Any) -> NoReturn:
    raise_error(
        function,
        f"{name} lies in the host's memory, which layers do not compute in",
        expected=f"{name} in the device's memory",
        got=f"{name} of type {value.aval.str_short()}",
        fix=f"Move it where it is used: jax.device_put({name}, jax.memory.Space.Device)",
    )


def axes(function: str, name: str, given: Axes, shape: Shape) -> tuple[int, ...]:
    """Returns axes as non-negative ints in ascending order; raises for repeated and unknown ones."""
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
                fix="Name axes by their position, as in -1 or (1, 2)",
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
            f"{name} names an axis twice",
            expected="each axis once",
            got=got,
            fix=f"Name each once: {tuple(dict.fromkeys(sorted(canonical)))}",
        )
    return tuple(sorted(canonical))


def other_axes(axes: Collection[int], rank: int) -> tuple[int, ...]:
    """Returns the axes of x that are not among `axes`, ascending."""
    return tuple(sorted(set(range(rank)).difference(axes)))


def mask(function: str, given: Any, shape: Shape) -> jax.Array | None:
    """Returns the mask with the rank of x; refuses one that is not bool or does not broadcast to x."""
    if given is None:
        return None
    given = jnp.asarray(given)
    if _memory_of(given) is HOST:
        _raise_for_host(function, "mask", given)
    got = f"mask.shape={given.shape}, mask.dtype={given.dtype} for x.shape={shape}"
    if given.dtype != jnp.bool_:
        raise_error(
            function,
            "mask is not boolean",
            expected="dtype bool, True where an element counts",
            got=got,
            fix="Compare first, as in mask > 0",
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


def sizes(function: str, name: str, given: Any) -> tuple[int, ...]:
    """Returns one or several axis sizes as ints; refuses what is none."""
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


def leaves(
    function: str,
    name: str,
    tree: Any,
    *,
    shape: Shape,
    dtype: Any,
    required: Collection[str] = (),
    optional: Collection[str] = (),
    leading: Shape = (),
) -> None:
    """Raises for a tree that is not a dict of the named arrays, each of `shape` and fit for x.

    Args:
      function: that the error begins with.
      name: of the tree.
      tree: what was given.
      shape: of each leaf, but for scalars.
      dtype: of x.
      required: leaves that must be there.
      optional: leaves that may be there.
      leading: the sizes of x's non-feature axes; a leaf may have some of them (or ones) in front.
    """
    known = {*required, *optional}
    if not isinstance(tree, dict) or not known.issuperset(tree) or not set(required) <= set(tree):
        _raise_for_tree(function, name, tree, sorted(required), sorted(known))
    for leaf, value in tree.items():
        if not (hasattr(value, "dtype") or isinstance(value, int | float | complex)):
            _raise_without_array(function, f"{name}[{leaf!r}]", value)
        if _memory_of(value) is HOST:
            _raise_for_host(function, f"{name}[{leaf!r}]", value)
        given = np.shape(value)
        features, allowed = ((), ()) if leaf in SCALARS else (shape, leading)
        extra = len(given) - len(features)
        fits = given == features
        if not fits and 0 < extra <= len(allowed) and given[extra:] == features:
            sizes = zip(given[:extra], allowed, strict=False)
            fits = all([size in (1, full) for size, full in sizes])
        if not fits:
            _raise_for_shape(function, f"{name}[{leaf!r}]", given, features, allowed)
        if leaf == "count" or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            _check_kind(function, f"{name}[{leaf!r}]", jnp.result_type(value), leaf, dtype)


def _check_kind(function: str, where: str, given: Any, leaf: str, dtype: Any) -> None:
    """Raises for the wrong kind: counts are whole, variances real, others complex only if x is."""
    kind, words = jnp.floating, "a real float"
    if leaf == "count":
        if given in (jnp.float32, jnp.float64):  # of averages, such as optax.incremental_update's
            return
        kind, words = jnp.integer, "an int, or a float32 of averages"
    elif leaf not in REAL and jnp.issubdtype(dtype, jnp.complexfloating):
        kind, words = jnp.inexact, "a float, real or complex"
    if not jnp.issubdtype(given, kind):
        raise_error(
            function,
            f"{where} holds the wrong kind of number",
            expected=words,
            got=f"dtype {given}",
            fix="Pass it in the dtype that the init function gave it",
            kind=TypeError,
        )


def moments(function: str, **given: Any) -> None:
    """Raises for arguments that are not `Moments` whose parts fit together."""
    shapes = []
    for name, argument in given.items():
        if not (isinstance(argument, tuple) and len(argument) == 3):
            raise_error(
                function,
                f"{name} does not hold moments",
                expected="nj.Moments(count, mean, var)",
                got=f"{name} of type {type(argument).__name__}",
                fix="Compute them with nj.moments(x, reduction_axes)",
                kind=TypeError,
            )
        for part, value in zip(("count", "mean", "var"), argument, strict=True):
            if not (hasattr(value, "dtype") or isinstance(value, int | float | complex)):
                _raise_without_array(function, f"{name}.{part}", value)
            shapes.append((f"{name}.{part}", np.shape(value)))
    try:
        np.broadcast_shapes(*(shape for _, shape in shapes))
    except ValueError:
        raise_error(
            function,
            "the moments have different shapes",
            expected="shapes that broadcast to each other",
            got=", ".join(f"{name}.shape={shape}" for name, shape in shapes),
            fix="Take all of them over the same features",
        )


def params(
    function: str,
    tree: Any,
    x: jax.Array,
    feature_axes: Shape,
    other_axes: Shape,
    *,
    known: Collection[str] = ("scale", "bias"),
    required: Collection[str] = (),
) -> Shape:
    """Raises for params that do not fit x; returns the sizes of its feature axes."""
    features = tuple(map(x.shape.__getitem__, feature_axes))
    leading = tuple(map(x.shape.__getitem__, other_axes))
    leaves(
        function,
        "params",
        tree,
        shape=features,
        dtype=x.dtype,
        required=required,
        optional=known,
        leading=leading,
    )
    return features


def _raise_for_tree(
    function: str, name: str, tree: Any, required: list[str], known: list[str]
) -> NoReturn:
    wanted = f"a dict with {required} and at most {known}" if known else "an empty dict"
    if isinstance(tree, dict):
        raise_error(
            function,
            f"{name} has the wrong leaves",
            expected=wanted,
            got=f"{name} with {sorted(map(str, tree))}",
            fix="Pass this layer's own sub-tree, as its init function returned it",
        )
    frozen = isinstance(tree, Mapping)
    raise_error(
        function,
        f"{name} is not a dict",
        expected=wanted,
        got=f"{type(tree).__name__}",
        fix="Unfreeze it: flax.core.unfreeze(tree)"
        if frozen
        else "Pass it as the layer's init function returned it",
        kind=TypeError,
    )


def _raise_without_array(function: str, leaf: str, value: object) -> NoReturn:
    raise_error(
        function,
        f"{leaf} is not an array",
        expected="a JAX or NumPy array",
        got=f"{leaf} of type {type(value).__name__}",
        fix="Convert it: jnp.asarray(...), or jax.tree.map over the arrays that were made lists",
        kind=TypeError,
    )


def _raise_for_shape(
    function: str, leaf: str, given: Shape, features: Shape, leading: Shape
) -> NoReturn:
    expected = f"shape {features}"
    if leading:
        expected += f", or with leading sizes of x's non-feature axes, {leading}, or ones"
    raise_error(
        function,
        f"{leaf} does not fit the features of x, of shape {features}",
        expected=expected,
        got=f"shape {given}",
        fix="Channels first? Pass feature_axes=1; else check num_features of the init function",
    )


def output_dtype(function: str, dtype: Any, x: jax.Array) -> Any:
    """Returns the dtype of y; refuses one that cannot hold it."""
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
            fix="Drop dtype to keep that of x",
            kind=TypeError,
        )
    return asked


def no_common_dtype(function: str, *arrays: Any) -> NoReturn:
    """Raises for dtypes that JAX does not promote, as x in float8 and parameters in float32."""
    dtypes = {str(array.dtype): None for array in arrays if array is not None}
    raise_error(
        function,
        "x and the variables have no common dtype",
        expected="dtypes that JAX promotes, or the dtype of y",
        got=f"x.dtype={arrays[0].dtype} among {list(dtypes)}",
        fix="Pass dtype=... to the module, such as jnp.bfloat16",
        kind=TypeError,
    )


def choice(function: str, name: str, given: object, allowed: Sequence[object]) -> None:
    """Refuses an option outside `allowed`."""
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
    """Refuses what is no number, or one outside `[low, high]`; the value of a JAX array is not looked at."""
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
    """Returns a number within `[low, high]` as a float, of a JAX array too; refuses a traced one."""
    if isinstance(given, float) and low <= given < math.inf:  # as nearly always
        return given
    if isinstance(given, Tracer):
        raise_error(
            function,
            f"{name} is traced, but it is a part of the program that is compiled",
            expected=f"{name} as a number that is known at trace time",
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
    """Returns an int of 1 or more, None for what is none."""
    try:
        value = 0 if isinstance(given, (bool, np.bool_)) else operator.index(given)
    except TypeError:
        return None
    return value if value > 0 else None
