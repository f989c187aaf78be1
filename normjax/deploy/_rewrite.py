"""Rewrites a program to use folded leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from normjax._jaxpr import Op, Program
from normjax._trees import Path
from normjax.deploy._graph import Graph, Linear
from normjax.deploy._kernels import (
    Names,
    as_border,
    bias_shape,
    changed,
    padded,
    spread_bias,
)
from normjax.deploy._parallel import Merge
from normjax.deploy._plan import Plan
from normjax.deploy._program import pruned


def rewritten(plan: Plan, names: Names) -> Program:
    """Returns the program with new kernels and biases in place of the folded operations."""
    program = plan.graph.program
    types, leaves = list(program.types), dict(program.leaves)

    def leaf(path: Path, shape: tuple[int, ...], like: int) -> int:
        leaves[path] = len(types)
        types.append(jax.ShapeDtypeStruct(shape, types[like].dtype))
        return leaves[path]

    new: dict[Any, Op] = {}
    for outputs, root in plan.wide.items():
        op = _op(plan.graph, outputs)
        new[outputs] = _wide(plan, op, root)
    for outputs in plan.absorbed - plan.wide.keys():
        op = _op(plan.graph, outputs)
        data = tuple(plan.graph.data(op))
        new[outputs] = Same(op.name, {"dtype": types[outputs[0]].dtype}, data, outputs)
    for sink in changed(plan):
        bias = leaf(names.biases[sink.path], bias_shape(plan.graph, sink), sink.operand)
        inputs = (sink.data, sink.operand, bias)
        if sink.path in names.borders:
            size = np.broadcast(*plan.inner[sink.path]).size
            inputs = (*inputs, leaf(names.borders[sink.path], (size,), sink.operand))
        new[sink.op.outputs] = _layer(plan, sink, inputs)
    for outputs, path in zip(padded(plan), names.pads, strict=True):
        op = _op(plan.graph, outputs)
        affine = plan.pads[outputs]
        like = plan.graph.program.leaves[next(iter(plan.inner))]
        border = leaf(path, (np.broadcast(*affine).size,), like)
        config = op.params["padding_config"]
        new[outputs] = Pad(
            "pad", {"config": config, "affine": affine}, (op.inputs[0], border), outputs
        )
    ops = [new.get(op.outputs, op) for op in program.ops]
    for merge in plan.merges.values():
        ops = _without_branches(ops, merge)
    return pruned(program._replace(types=types, leaves=leaves, ops=tuple(ops)))


def _op(graph: Graph, outputs: tuple[int, ...]) -> Op:
    return graph.makers[outputs[0]]


def _escapes(plan: Plan, outputs: tuple[int, ...]) -> bool:
    """Returns whether operations read a value that expect its traced dtype."""
    uses = [user for number in outputs for user in plan.graph.users[number]]
    return any(user is None or user.outputs not in plan.wide for user in uses)


def _wide(plan: Plan, op: Op, root: int) -> Op:
    """Returns an operation between a linear layer and the end of its batch norm.

    It computes in the wider dtype of both, so that the bias is not rounded in between.
    """
    graph = plan.graph
    dtype = graph.dtype(op.outputs[0]) if _escapes(plan, op.outputs) else None
    skipped = op.outputs in plan.absorbed or op.name == "convert_element_type"
    if skipped:
        return Same(op.name, {"dtype": dtype}, tuple(graph.data(op)), op.outputs)
    return Between(op.name, {**op.params, "normjax_dtype": dtype}, op.inputs, op.outputs, op.eqn)


def _layer(plan: Plan, sink: Linear, inputs: tuple[int, ...]) -> Op:
    graph, dtype = plan.graph, plan.graph.dtype(sink.output)
    if sink.op.outputs in plan.wide:
        root = plan.wide[sink.op.outputs]
        wide = wider(dtype, graph.dtype(root))
        dtype = dtype if _escapes(plan, sink.op.outputs) else wide
    params = {
        "op": sink.op,
        "side": sink.side,
        "sink": sink,
        "graph": graph,
        "dtype": dtype,
        "affine": plan.inner.get(sink.path),
    }
    return Layer("layer", params, inputs, sink.op.outputs)


def wider(*dtypes: Any) -> Any:
    """Returns the dtype with the most bits, independent of JAX's promotion settings."""
    return max(map(jnp.dtype, dtypes), key=lambda dtype: dtype.itemsize)


class Same(Op):
    """A step that has become part of a kernel, but may still change the dtype."""

    def run(self, *values: Array) -> Iterable[Array]:
        """Returns the value."""
        (value,) = values
        dtype = self.params["dtype"]
        return (value if dtype is None else value.astype(dtype),)


class Between(Op):
    """An operation whose inputs may have a wider dtype than in the trace."""

    def run(self, *values: Array) -> Iterable[Array]:
        """Returns the outputs; outputs with other readers have their traced dtype."""
        dtype = self.params["normjax_dtype"]
        wide = wider(*(value.dtype for value in values))
        params = {name: own for name, own in self.params.items() if name != "normjax_dtype"}
        made = self._replace(params=params)
        found = Op(*made).run(*(value.astype(wide) for value in values))
        return [value if dtype is None else value.astype(dtype) for value in found]


class Layer(Op):
    """A linear layer with a bias, whose padding may be other values than zero."""

    def prepared(self, value: Array, *border: Array) -> tuple[Array, Op]:
        """Returns the padded value, and the operation without padding."""
        op = self.params["op"]
        if not border:
            return value, op
        numbers, rank = op.params["dimension_numbers"], value.ndim
        config = [(0, 0, 0)] * rank
        for i, axis in enumerate(numbers.lhs_spec[2:]):
            config[axis] = (*op.params["padding"][i], op.params["lhs_dilation"][i] - 1)
        none = {
            "padding": ((0, 0),) * (rank - 2),
            "lhs_dilation": (1,) * (rank - 2),
        }
        edge = as_border(border[0], self.params["affine"])
        return _padded(value, edge, config), op._replace(params={**op.params, **none})

    def finished(self, made: Array, bias: Array) -> Array:
        """Returns the layer's output plus its bias."""
        graph, dtype = self.params["graph"], self.params["dtype"]
        spread = spread_bias(graph, self.params["sink"], bias)
        return made.astype(dtype) + spread.astype(dtype)

    def run(self, *values: Array) -> Iterable[Array]:
        """Returns the layer's output."""
        value, kernel, bias, *border = values
        value, op = self.prepared(value, *border)
        both = (value, kernel) if self.params["side"] == 1 else (kernel, value)
        (made,) = op.run(*both)
        return (self.finished(made, bias),)


class Pad(Op):
    """Pads a value with a constant for each feature."""

    def run(self, *values: Array) -> Iterable[Array]:
        """Returns the padded value."""
        value, border = values
        edge = as_border(border, self.params["affine"])
        return (_padded(value, edge, self.params["config"]),)


def _padded(value: Array, border: Array, config: Any) -> Array:
    inside = lax.pad(jnp.ones(value.shape, bool), False, config)
    zeros = lax.pad(value, jnp.zeros((), value.dtype), config)
    return jnp.where(inside, zeros, border.astype(value.dtype))


def _without_branches(ops: list[Op], merge: Merge) -> list[Op]:
    """Removes terms from sums that have become part of the target."""
    gone = set()
    for term in merge.terms:
        if term.linear is None or term.linear.path != merge.target.path:
            gone.add(term.output)
    made = []
    for op in ops:
        left = tuple(number for number in op.inputs if number not in gone)
        if op.name == "add" and len(left) == 0:
            gone |= set(op.outputs)
        elif op.name == "add" and len(left) == 1 and len(op.inputs) == 2:
            made.append(Same(op.name, {"dtype": None}, left, op.outputs))
        else:
            made.append(op)
    return made
