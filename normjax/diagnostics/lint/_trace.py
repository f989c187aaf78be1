"""Traces functions into graphs; calls, branches and loops are inlined."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

from normjax import _jaxpr
from normjax._jaxpr import Writer
from normjax.diagnostics.lint._graph import Graph

# Operations that apply a jaxpr to pairs of elements, so they do not call it on their operands.
NOT_CALLS = ("reduce", "scatter", "pallas", "select_and")


def trace(
    function: Callable[..., Any],
    variables: PyTree,
    x: PyTree,
    *,
    axes: Sequence[tuple[Hashable, int]] = (),
    statistics: Iterable[int] = (),
) -> Graph:
    """Traces a function `(variables, x) -> (outputs, updates)`.

    Args:
      function: the function to trace.
      variables: its first argument.
      x: its second argument.
      axes: the mapped axes to trace under, and their sizes.
      statistics: the numbers of the leaves of the variables that are running statistics.
    """
    try:
        program = _jaxpr.trace(function, variables, (x,), inline=_inline, axes=axes)
    except NameError as error:  # probably of an axis
        error.add_note(
            "lint: if apply_fn is mapped over an axis, pass its name: lint(..., axis_name='data')"
        )
        raise
    return Graph(program, frozenset(statistics))


def _inline(writer: Writer, eqn: Any, inputs: list[int]) -> Sequence[int] | None:
    """Inlines an equation that has a body, such as a call, a derivative, a branch or a loop."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(writer, params, inputs)
    if name == "while":
        return _while(writer, params, inputs)
    if name == "cond":
        ends = [writer.write(branch, inputs[1:]) for branch in params["branches"]]
        return [_add(writer, "branch", (inputs[0], *each)) for each in zip(*ends, strict=True)]
    body = _body(eqn)
    if body is None:
        return None
    if name == "shard_map":
        shards = zip(inputs, body.invars, params["in_specs"], strict=True)
        inputs = [_add(writer, "shard", (i,), var.aval, {"spec": spec}) for i, var, spec in shards]
    return writer.write(body, inputs)


def _scan(writer: Writer, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
    """Adds the body of a scan once; a carry is unknown, or the variable that it starts from."""
    consts, first = params["num_consts"], params["num_consts"] + params["num_carry"]
    body, carries = params["jaxpr"], params["num_carry"]
    carried = [_add(writer, "carry", (number,)) for number in inputs[consts:first]]
    sliced = zip(inputs[first:], body.jaxpr.invars[first:], strict=True)
    taken = [_add(writer, "take", (number,), var.aval) for number, var in sliced]
    results = writer.write(body, [*inputs[:consts], *carried, *taken])
    stacked = []
    for number in results[carries:]:
        one = writer.types[number]
        aval = jax.ShapeDtypeStruct((params["length"], *one.shape), one.dtype)
        stacked.append(_add(writer, "stack", (number,), aval))
    return [*results[:carries], *stacked]


def _while(writer: Writer, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
    first, consts = params["cond_nconsts"], params["body_nconsts"]
    carried = [_add(writer, "carry", (number,)) for number in inputs[first + consts :]]
    return writer.write(params["body_jaxpr"], [*inputs[first : first + consts], *carried])


def _add(
    writer: Writer,
    name: str,
    inputs: Sequence[int],
    aval: Any = None,
    params: Mapping[str, Any] = {},
) -> int:
    """Adds a value; its type is that of its last input unless another is given."""
    aval = writer.types[inputs[-1]] if aval is None else aval
    (number,) = writer.add(name, inputs, [aval], params)
    return number


def _body(eqn: Any) -> Any:
    """Returns the jaxpr of an equation that only calls it, such as jit, remat or a derivative."""
    kinds = (core.Jaxpr, core.ClosedJaxpr)
    bodies = [param for param in eqn.params.values() if isinstance(param, kinds)]
    if len(bodies) != 1 or eqn.primitive.name.startswith(NOT_CALLS):
        return None
    body = getattr(bodies[0], "jaxpr", bodies[0])
    fits = len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return bodies[0] if fits else None
