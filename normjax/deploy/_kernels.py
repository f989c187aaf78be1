"""Computes the kernels, biases and borders of a folded model, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp

from normjax import _checks
from normjax._trees import Path
from normjax.deploy._backward import Outputs
from normjax.deploy._constants import FUNCTION, backwards, forwards
from normjax.deploy._forward import pads_zeros, preimage
from normjax.deploy._graph import Graph, Linear
from normjax.deploy._layout import PASSING, Affine, Unfoldable, moved, unchanged
from normjax.deploy._parallel import merged_kernel
from normjax.deploy._plan import Plan
from normjax.deploy._wide import narrowed, widened


class Names(NamedTuple):
    """The paths of new leaves.

    Attributes:
      biases: the path of the bias, by the path of the kernel.
      borders: the path of a convolution's padding values, by the path of its kernel.
      pads: the paths of the padding values of each `pad`, in program order.
    """

    biases: dict[Path, Path]
    borders: dict[Path, Path]
    pads: tuple[Path, ...]


def changed(plan: Plan) -> list[Linear]:
    """Returns the linear layers that stay with changed kernels."""
    return [sink for path, sink in plan.sinks.items() if plan.merged(path) == path]


def bordered(plan: Plan) -> list[Linear]:
    """Returns the convolutions that pad with other values than zero."""
    sinks = [plan.sinks[path] for path in plan.inner]
    return [sink for sink in sinks if pads_zeros(sink.op) and plan.inner[sink.path].shift.any()]


def padded(plan: Plan) -> list[Outputs]:
    """Returns the `pad`s with changed values, by their outputs."""
    finite = []
    for op in plan.graph.program.ops:
        if op.outputs in plan.pads:
            if np.isfinite(plan.graph.padding(op)) and plan.pads[op.outputs].shift.any():
                finite.append(op.outputs)
    return finite


def named(plan: Plan, leaves: Mapping[Path, Any]) -> Names:
    """Returns paths for new leaves, beside the kernels."""
    taken = set(leaves)

    def new(kernel: Path, name: str) -> Path:
        *place, own = kernel
        name = name if own == "kernel" else f"{own}_{name}"
        while (*place, name) in taken:
            name = f"folded_{name}"
        taken.add((*place, name))
        return (*place, name)

    biases = {sink.path: _own_bias(plan, sink) for sink in changed(plan)}
    biases = {path: own or new(path, "bias") for path, own in biases.items()}
    borders = {sink.path: new(sink.path, "padding") for sink in bordered(plan)}
    first = next(iter(plan.inner), ())
    return Names(biases, borders, tuple(new(first, "padding") for _ in padded(plan)))


def _own_bias(plan: Plan, sink: Linear) -> Path | None:
    """Returns the bias of the linear layer: a leaf of the features' shape that is added first."""
    graph, number = plan.graph, sink.output
    while len(uses := graph.users[number]) == 1 and (op := uses[0]) is not None:
        if graph.is_step(op):
            break
        if not graph.passes(op):
            return None
        number = op.outputs[0]
    else:
        return None
    sources = graph.sources(op)
    if op.name != "add" or len(sources) != 1 or op.outputs not in plan.absorbed:
        return None
    (path,) = sources
    leaf = graph.program.leaves[path]
    fits = graph.shape(leaf) == bias_shape(graph, sink) and path[-1] not in ("mean", "var")
    return path if fits and graph.alone(leaf, op) else None


def _bias_axes(graph: Graph, sink: Linear) -> tuple[tuple[int, ...], bool]:
    """Returns the kernel axes of a bias, and whether they are axes of the leaf itself."""
    axes = tuple(sorted(sink.features))
    if all(op.name in PASSING for op in sink.view):
        return axes, True
    shape = graph.shape(sink.operand)
    mark = np.zeros([size if i in axes else 1 for i, size in enumerate(shape)])
    try:
        laid = backwards(sink.view, mark, graph.program)
    except Unfoldable:
        return axes, False
    own = tuple(axis for axis, size in enumerate(laid.shape) if size != 1)
    plain = all(shape[axis] > 1 for axis in axes) and laid.size == mark.size
    return (own, True) if plain else (axes, False)


def bias_shape(graph: Graph, sink: Linear) -> tuple[int, ...]:
    """Returns the shape of a bias: the sizes of the kernel's features, in the leaf's order."""
    axes, of_leaf = _bias_axes(graph, sink)
    shape = graph.shape(graph.program.leaves[sink.path] if of_leaf else sink.operand)
    return tuple(shape[axis] for axis in axes)


def spread_bias(graph: Graph, sink: Linear, bias: Any) -> Any:
    """Converts a bias to a compact array of the layer's output."""
    axes, of_leaf = _bias_axes(graph, sink)
    number = graph.program.leaves[sink.path] if of_leaf else sink.operand
    sizes = [size if i in axes else 1 for i, size in enumerate(graph.shape(number))]
    laid = bias.reshape(sizes)
    laid = forwards(sink.view, laid, graph.program) if of_leaf else laid
    return moved(laid, sink.features, sink.axes, len(graph.shape(sink.output)))


def folded_leaves(plan: Plan, names: Names, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns the new leaves, in the dtypes of their kernels."""
    graph, made = plan.graph, {}
    for path in {path for fold in plan.folds for path in fold.norms}:
        _check_variance(graph, path, leaves)
    with np.errstate(all="ignore"):  # `narrowed` raises an error for values that are not finite
        parts = {path: _kernel_and_shift(plan, sink, leaves) for path, sink in plan.sinks.items()}
        for sink in changed(plan):
            kernel, shift = _merged(plan, sink, parts)
            own = leaves[sink.path]
            words = "/".join(sink.path)
            laid = backwards(sink.view, kernel, graph.program).reshape(np.shape(own))
            made[sink.path] = narrowed(FUNCTION, words, laid, own)
            made[names.biases[sink.path]] = narrowed(
                FUNCTION, f"bias of {words}", _as_bias(graph, sink, shift), own
            )
    for path, border in names.borders.items():
        value = preimage(plan.inner[path], 0.0)
        made[border] = narrowed(FUNCTION, "/".join(border), value.ravel(), leaves[path])
    for outputs, path in zip(padded(plan), names.pads, strict=True):
        value = preimage(plan.pads[outputs], graph.padding(graph.makers[outputs[0]]))
        like = leaves[next(iter(plan.inner))]
        made[path] = narrowed(FUNCTION, "/".join(path), value.ravel(), like)
    return made


def _check_variance(graph: Graph, norm: Path, leaves: Mapping[Path, Any]) -> None:
    (path,) = (each.var for each in graph.norms if tuple(each) == norm)
    least = widened(FUNCTION, "/".join(path), leaves[path]).min(initial=0)
    if least < 0:
        _checks.raise_error(
            FUNCTION,
            f"{'/'.join(path)} is negative",
            expected="a variance of 0 or more for each feature",
            got=f"{least:.6g}",
            fix="Check where the statistics come from",
        )


def _kernel_and_shift(
    plan: Plan, sink: Linear, leaves: Mapping[Path, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a kernel as the operation reads it, and the shift of its output."""
    graph = plan.graph
    wide = widened(FUNCTION, "/".join(sink.path), leaves[sink.path])
    kernel = forwards(sink.view, wide, graph.program)
    others = _checks.other_axes(sink.features, kernel.ndim)
    shift: Any = 0.0
    if sink.path in plan.inner:
        scale, offset = (as_read(graph, sink, each) for each in plan.inner[sink.path])
        shift = (kernel * offset).sum(others, keepdims=True)
        kernel = kernel * scale
    outer = plan.outer.get(sink.path, unchanged(len(graph.shape(sink.output))))
    scale, offset = as_made(graph, sink, outer)
    return kernel * scale, shift * scale + offset


def as_made(graph: Graph, sink: Linear, affine: Affine) -> Affine:
    """Converts a map of the layer's output to the layout of the kernel."""
    rank = len(graph.shape(sink.operand))
    return Affine(*(moved(each, sink.axes, sink.features, rank) for each in affine))


def as_read(graph: Graph, sink: Linear, array: np.ndarray) -> np.ndarray:
    """Converts an array of the layer's input to the layout of the kernel."""
    params, rank = sink.op.params, len(graph.shape(sink.operand))
    if sink.op.name == "dot_general":
        contracted, batch = params["dimension_numbers"]
        taken = (*contracted[1 - sink.side], *batch[1 - sink.side])
        return moved(array, taken, (*contracted[sink.side], *batch[sink.side]), rank)
    made, given = params["dimension_numbers"].rhs_spec[:2]
    shape, groups = graph.shape(sink.operand), params["feature_group_count"]
    grouped = np.broadcast_to(array.ravel(), shape[given] * groups).reshape(groups, shape[given])
    by_output = grouped.repeat(shape[made] // groups, axis=0)
    return moved(by_output, (0, 1), (made, given), rank)


def _merged(
    plan: Plan, sink: Linear, parts: Mapping[Path, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    merge = plan.merges.get(sink.path)
    if merge is None:
        return parts[sink.path]
    kernels = {path: kernel for path, (kernel, _) in parts.items()}
    shift: Any = 0.0
    for term, scale in zip(merge.terms, merge.scales, strict=True):
        if term.linear is not None:
            shift = shift + parts[term.linear.path][1]
        elif scale is not None:
            shift = shift + as_made(plan.graph, sink, scale).shift
    return merged_kernel(plan.graph, merge, kernels), shift


def _as_bias(graph: Graph, sink: Linear, shift: np.ndarray) -> np.ndarray:
    shape = graph.shape(sink.operand)
    full = np.broadcast_to(
        shift, [size if i in sink.features else 1 for i, size in enumerate(shape)]
    )
    _, of_leaf = _bias_axes(graph, sink)
    laid = backwards(sink.view, full, graph.program) if of_leaf else full
    return laid.reshape(bias_shape(graph, sink))


def compact_shape(affine: Affine) -> tuple[int, ...]:
    """Returns the compact shape of the padding values."""
    return np.broadcast_shapes(*(each.shape for each in affine))


def as_border(value: Any, affine: Affine) -> Any:
    """Converts padding values to a compact array of the padded value."""
    return jnp.asarray(value).reshape(compact_shape(affine))
