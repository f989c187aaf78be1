"""Rewrites a program to use folded leaves, compares it with the one that was folded, runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array

from normjax import _checks
from normjax._jaxpr import Op, Program, trace
from normjax._trees import Path, by_path, path_of
from normjax.deploy._graph import Graph, Linear, Norm
from normjax.deploy._kernels import (
    Names,
    as_border,
    as_made,
    as_read,
    bias_shape,
    bordered,
    changed,
    padded,
    spread_bias,
)
from normjax.deploy._layout import Affine
from normjax.deploy._parallel import Merge
from normjax.deploy._plan import Fold, Key, Plan
from normjax.deploy._program import execute, inline, pruned

# The names of a mean and a variance, side by side: Flax's and Haiku's, Keras's, PyTorch's.
STATISTICS = (
    ("mean", "var"),
    ("moving_mean", "moving_variance"),
    ("moving_mean", "moving_var"),
    ("running_mean", "running_var"),
)


def find(
    source: Callable[..., Any],
    variables: Any,
    inputs: tuple[Any, ...],
    leaves: Mapping[Path, Any],
) -> Graph:
    """Traces a model and finds its batch norms, which have leaves `mean` and `var`."""
    program = trace(source, variables, inputs, inline=inline)
    norms = []
    for path in program.leaves:
        for mean, var in STATISTICS:
            if path[-1] == var and (*path[:-1], mean) in program.leaves:
                norms.append(Norm(path[:-1], mean, var))
    return Graph(pruned(program), norms, leaves)


class Recipe(NamedTuple):
    """What a folded model has to do again for inputs of another shape.

    Attributes:
      source: the model.
      template: the shapes and dtypes of its variables.
      names: the paths of new leaves.
      shapes: the shapes of the folded model's leaves.
      used: the leaves that are read on the sample.
      constants: the leaves that were folded, to compare what is made of them.
      folds: what was folded.
      plan: what became of it on the sample.
      sample: the shapes of the sample's inputs.
    """

    source: Callable[..., Any]
    template: Any
    names: Names
    shapes: Mapping[Path, tuple[int, ...]]
    used: frozenset[Path]
    constants: Mapping[Path, np.ndarray]
    folds: Mapping[Key, Fold]
    plan: Maps
    sample: Any


class Maps(NamedTuple):
    """The affine maps of a plan, to be compared."""

    outer: dict[Path, Affine]
    inner: dict[Path, Affine]
    pads: list[Affine]
    borders: list[Path]
    merges: dict[Path, list[tuple[tuple[int, ...], Affine | None]]]


def maps(plan: Plan) -> Maps:
    """Returns what a plan does to each kernel, laid out as the kernel is."""
    graph = plan.graph
    outer = {path: as_made(graph, plan.sinks[path], each) for path, each in plan.outer.items()}
    inner = {
        path: Affine(*(as_read(graph, plan.sinks[path], each) for each in affine))
        for path, affine in plan.inner.items()
    }
    merges = {}
    for path, merge in plan.merges.items():
        scales = [each and as_made(graph, merge.target, each) for each in merge.scales]
        merges[path] = list(zip(merge.offsets, scales, strict=True))
    pads = [plan.pads[outputs] for outputs in padded(plan)]
    pads = [Affine(*(each.squeeze() for each in affine)) for affine in pads]
    borders = [sink.path for sink in bordered(plan)]
    return Maps(outer, inner, pads, borders, merges)


def rewritten(plan: Plan, names: Names) -> Program:
    """Returns the program with new kernels and biases in place of what was folded."""
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
    """Returns whether a value is read by operations that expect its own dtype."""
    uses = [user for number in outputs for user in plan.graph.users[number]]
    return any(user is None or user.outputs not in plan.wide for user in uses)


def _wide(plan: Plan, op: Op, root: int) -> Op:
    """Returns an operation between a linear layer and the end of its batch norm.

    It computes in the wider of both dtypes, so that the bias is not rounded in between.
    """
    graph = plan.graph
    dtype = graph.dtype(op.outputs[0]) if _escapes(plan, op.outputs) else None
    skipped = op.outputs in plan.absorbed or op.name == "convert_element_type"
    if skipped:
        return Same(op.name, {"dtype": dtype}, tuple(graph.data(op)), op.outputs)
    return Between(op.name, op.params | {"normjax_dtype": dtype}, op.inputs, op.outputs, op.eqn)


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
    """Returns the dtype with most bits, whatever JAX's promotion of types is set to."""
    return max(map(jnp.dtype, dtypes), key=lambda dtype: dtype.itemsize)


class Same(Op):
    """A step that has become part of a kernel; it may still change the dtype."""

    def run(self, *values: Array) -> Iterable[Array]:
        """Returns the value."""
        (value,) = values
        dtype = self.params["dtype"]
        return (value if dtype is None else value.astype(dtype),)


class Between(Op):
    """An operation that may be given values of a wider dtype than it was traced with."""

    def run(self, *values: Array) -> Iterable[Array]:
        """Returns the operation's values; those that others read have their own dtype."""
        dtype = self.params["normjax_dtype"]
        wide = wider(*(value.dtype for value in values))
        params = {name: own for name, own in self.params.items() if name != "normjax_dtype"}
        made = self._replace(params=params)
        found = Op(*made).run(*(value.astype(wide) for value in values))
        return [value if dtype is None else value.astype(dtype) for value in found]


class Layer(Op):
    """A linear layer with a bias, whose border may be something else than zeros."""

    def prepared(self, value: Array, *border: Array) -> tuple[Array, Op]:
        """Returns the value with its border, and the operation that needs no other."""
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
        """Returns the layer's output with its bias."""
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
    """Puts a value for each feature around another."""

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
    """Removes from sums what has become part of the target."""
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


def run(recipe: Recipe, variables: Any, *inputs: Any) -> Any:
    """Traces the source for these inputs, rewrites it, and runs it on the folded variables."""
    given = by_path(variables)
    _check_shapes(given, recipe.shapes)
    return execute(program_for(recipe, given, inputs), given, inputs)


def program_for(recipe: Recipe, given: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Program:
    """Returns the folded program for inputs of any shape, after comparing it with the sample's."""

    def typed(path: Any, own: Any) -> Any:
        leaf = given.get(path_of(path))
        return own if leaf is None else jax.ShapeDtypeStruct(own.shape, leaf.dtype)

    template = jax.tree.map_with_path(typed, recipe.template)
    graph = find(recipe.source, template, inputs, recipe.constants)
    plan = Plan(graph, recipe.folds.keys())
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    check_same(recipe, plan, shapes)
    program = rewritten(plan, recipe.names)
    lost = [path for path in program.leaves if path not in recipe.shapes]
    if lost:
        differs(
            recipe,
            shapes,
            expected="a model that reads the leaves that it reads on the sample",
            got=f"one that reads {', '.join(map('/'.join, lost))} too",
        )
    return program


def check_same(recipe: Recipe, plan: Plan, shapes: list[Any]) -> None:
    """Raises an error if what was folded is something else for these inputs."""
    found = {fold.key: fold for fold in plan.folds}
    for key, fold in recipe.folds.items():
        into = ", ".join(map("/".join, fold.kernels))
        other = found.get(key)
        if other is None:
            names = ", ".join(map("/".join, fold.norms)) or "a bias"
            reasons = [plan.reason(norm) for norm in plan.graph.norms if tuple(norm) in fold.norms]
            why = f" ({reasons[0]})" if reasons and reasons[0] else ""
            differs(
                recipe,
                shapes,
                expected=f"{names} beside {into}, with {_listed(fold.steps)}",
                got=f"none beside {into}{why}",
            )
        elif other.steps != fold.steps:
            _name_step(recipe, shapes, into, fold.steps, other.steps)
    _check_maps(recipe, found, maps(plan), shapes)


def _check_maps(recipe: Recipe, found: Mapping[Key, Fold], new: Maps, shapes: list[Any]) -> None:
    old = recipe.plan
    kernels = [*(path for path in old.outer if not _close(old.outer[path], new.outer.get(path)))]
    kernels += [path for path in old.inner if not _close(old.inner[path], new.inner.get(path))]
    kernels += [path for path in old.merges if not _merges_agree(old, new, path)]
    same_pads = len(old.pads) == len(new.pads) and all(map(_close, old.pads, new.pads))
    if kernels or not same_pads or old.borders != new.borders:
        for key, fold in recipe.folds.items():
            if fold.factors != found[key].factors:
                into = ", ".join(map("/".join, fold.kernels))
                _name_step(recipe, shapes, into, fold.factors, found[key].factors)
        into = ", ".join(map("/".join, kernels)) or "the border of a convolution"
        differs(
            recipe,
            shapes,
            expected=f"the scales and shifts of the sample, beside {into}",
            got="others, or in another order",
        )


def _name_step(
    recipe: Recipe, shapes: list[Any], into: str, old: tuple[str, ...], new: tuple[str, ...]
) -> None:
    place = next(
        (i for i, (one, other) in enumerate(zip(old, new, strict=False)) if one != other),
        min(len(old), len(new)),
    )
    differs(
        recipe,
        shapes,
        expected=f"beside {into} {old[place] if place < len(old) else 'no further operation'}",
        got=new[place] if place < len(new) else "no such operation",
    )


def differs(recipe: Recipe, shapes: list[Any], *, expected: str, got: str) -> None:
    """Raises the error for a model that is another one at another shape."""
    _checks.raise_error(
        "Folded.apply",
        f"with inputs of shapes {shapes} the model computes something else than on the sample, "
        f"of shapes {recipe.sample}",
        expected=expected,
        got=got,
        fix=f"Fold once more with a sample of shapes {shapes}, and use that result for them",
    )


def _listed(steps: tuple[str, ...]) -> str:
    return ", ".join(steps) or "no steps"


def _close(one: Affine, other: Affine | None) -> bool:
    return other is not None and all(
        a.shape == b.shape and np.allclose(a, b, rtol=1e-6, atol=0)
        for a, b in zip(one, other, strict=True)
    )


def _merges_agree(old: Maps, new: Maps, path: Path) -> bool:
    mine, own = old.merges[path], new.merges.get(path, [])
    if len(mine) != len(own):
        return False
    for (offset, scale), (other, found) in zip(mine, own, strict=True):
        if offset != other or (scale is None) != (found is None):
            return False
        if scale is not None and not _close(scale, found):
            return False
    return True


def _check_shapes(given: Mapping[Path, Any], shapes: Mapping[Path, tuple[int, ...]]) -> None:
    found = {path: np.shape(leaf) for path, leaf in given.items()}
    for path in [*found, *shapes]:
        if found.get(path) != shapes.get(path):
            _checks.raise_error(
                "Folded.apply",
                f"{'/'.join(path)} differs from the folded model's",
                expected=f"shape {shapes[path]}" if path in shapes else "no such leaf",
                got=f"shape {found[path]}" if path in found else "no such leaf",
                fix="Pass the `variables` of the folded model instead of its source's",
            )
