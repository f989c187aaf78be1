"""Counts the Python functions that trace a layer, and the equations of its jaxpr."""

from __future__ import annotations

import gc
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import flax
import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive

import normjax as nj

NORMJAX, FLAX = (pathlib.Path(package.__path__[0]) for package in (nj, flax))
# the levels of packages: a file only imports from its own level and lower levels
LEVELS = {
    **dict.fromkeys(("linen", "nnx", "deploy", "convert", "optim", "diagnostics"), 4),
    **dict.fromkeys(("layers", "weights"), 3),
    **dict.fromkeys(("platforms", "kernels"), 2),
    **dict.fromkeys(("statistics", "_leaves"), 1),
}
SUMS = {"reduce_sum", "dot_general", "psum", "reduce"}


class Walk(NamedTuple):
    """The calls of one trace in order: in the layer's own files, and a count of others."""

    own: list[CodeType]
    before_first_sum: int
    around: int


def watched(own: pathlib.Path, run: Callable[[], Any]) -> Walk:
    """Runs a function and records calls of Python functions in `own`, a file or folder."""
    kept: list[CodeType] = []
    first_sum: list[int] = []
    around = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal around
        if event != "call":
            return
        file = frame.f_code.co_filename
        if file.startswith(str(own)):
            kept.append(frame.f_code)
        elif file.startswith(str(FLAX)):
            around += 1
        elif frame.f_code is Primitive.bind.__code__ and frame.f_locals["self"].name in SUMS:
            first_sum.append(len(kept))

    gc_was_on = gc.isenabled()
    gc.disable()  # otherwise finalizers of collected objects would be among the calls
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        if gc_was_on:
            gc.enable()
    return Walk(kept, first_sum[0] if first_sum else len(kept), around)


def climbs(files: Iterable[pathlib.Path]) -> int:
    """Counts the calls from a file of a lower level to one of a higher level."""
    levels = [level for path in files if (level := _level(path))]
    return sum(after > before for before, after in zip(levels, levels[1:], strict=False))


def empty_caches() -> None:
    """Empties the caches of JAX and of normjax's functions."""
    jax.clear_caches()
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "normjax"]
    for module in modules:
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def traced(function: Callable[..., Any], *operands: Any) -> ClosedJaxpr:
    """Returns the jaxpr of a function, always traced again."""
    # a new function each time, since make_jaxpr caches traces
    return jax.make_jaxpr(lambda *given: function(*given))(*operands)


def equations(jaxpr: Jaxpr) -> tuple[int, int]:
    """Returns the number of equations of a jaxpr, with and without nested jaxprs."""
    return sum(len(each.eqns) for each in _with_inner(jaxpr)), len(jaxpr.eqns)


def _with_inner(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """Yields a jaxpr and the jaxprs in the parameters of its equations."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values())):
            if isinstance(value, ClosedJaxpr):
                yield from _with_inner(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from _with_inner(value)


def _level(path: pathlib.Path) -> int:
    if not path.is_relative_to(NORMJAX):
        return 0
    return LEVELS.get(path.relative_to(NORMJAX).parts[0].removesuffix(".py"), 0)
