"""Folds pairs: computes new leaves, and rewrites the program to use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array

from normjax import _checks
from normjax._jaxpr import Op, Program, trace
from normjax._trees import Path, by_path, path_of
from normjax.deploy._constants import FUNCTION, back
from normjax.deploy._pairs import LAYOUT, Finder, Pair, Step
from normjax.deploy._program import execute, inline, pruned
from normjax.deploy._wide import narrowed, widened

Biases = Mapping[Path, Path]  # the path of the bias by the path of the kernel, for each fold


def find(source: Callable[..., Any], variables: Any, inputs: tuple[Any, ...]) -> Finder:
    """Traces a model and finds its batch norms, which have leaves `mean` and `var`."""
    program = trace(source, variables, inputs, inline=inline)
    with_var = [path[:-1] for path in program.leaves if path[-1] == "var"]
    norms = [norm for norm in with_var if (*norm, "mean") in program.leaves]
    return Finder(pruned(program), norms)


def new_bias(kernel: Path, taken: Mapping[Path, Any]) -> Path:
    """Returns the path of a bias beside a kernel."""
    *place, name = kernel
    bias = "bias" if name == "kernel" else f"{name}_bias"
    while (*place, bias) in taken:
        bias = f"folded_{bias}"
    return (*place, bias)


def fold_pair(finder: Finder, pair: Pair, leaves: Mapping[Path, Any]) -> tuple[Any, Any]:
    """Returns the kernel and the bias that do what the pair did."""
    _check_variances(pair, leaves)
    with np.errstate(all="ignore"):  # `narrowed` raises an error for what is not finite
        multiplier, shift = _affine(finder, pair, leaves)
    shape = finder.program.types[pair.operand].shape
    others = _checks.other_axes(pair.features, len(shape))
    laid_out = np.expand_dims(multiplier.transpose(np.argsort(pair.features)), others)
    own, name = leaves[pair.kernel], "/".join(pair.kernel)
    multipliers = back(pair.view, np.broadcast_to(laid_out, shape), finder.program)
    kernel = widened(FUNCTION, name, own) * multipliers
    both = f"{name} with {' and '.join(map('/'.join, pair.norms))}"
    return narrowed(FUNCTION, both, kernel, own), narrowed(FUNCTION, f"bias of {both}", shift, own)


def _check_variances(pair: Pair, leaves: Mapping[Path, Any]) -> None:
    for norm in pair.norms:
        path = (*norm, "var")
        least = widened(FUNCTION, "/".join(path), leaves[path]).min(initial=0)
        if least < 0:
            _checks.raise_error(
                FUNCTION,
                f"{'/'.join(path)} is negative",
                expected="a variance of 0 or more for each feature",
                got=f"{least:.6g}",
                fix="Check where the statistics come from",
            )


def _affine(
    finder: Finder, pair: Pair, leaves: Mapping[Path, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a chain multiplies each feature by, and what it then adds."""
    multiplier, shift = np.ones(pair.sizes), np.zeros(pair.sizes)
    for step in pair.steps:
        if step.op.name == "neg":
            multiplier, shift = -multiplier, -shift
        elif step.constant is not None:
            value = _by_feature(finder.constants.value(step.constant, leaves), step.axes)
            multiplier, shift = _after(step, multiplier, shift, value)
    return multiplier, shift


def _after(
    step: Step, multiplier: np.ndarray, shift: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    match step.op.name, step.reverse:
        case "add", _:
            return multiplier, shift + value
        case "sub", False:
            return multiplier, shift - value
        case "sub", True:
            return -multiplier, value - shift
        case "mul", _:
            return multiplier * value, shift * value
    return multiplier / value, shift / value


def _by_feature(value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Returns the one number of each feature, with the features in the order of `axes`."""
    if value.ndim == 0:
        return value
    chosen = value[tuple(slice(None) if axis in axes else 0 for axis in range(value.ndim))]
    return chosen.transpose(np.argsort(np.argsort(axes)))


def rewritten(finder: Finder, biases: Biases) -> Program:
    """Returns the program with a bias in place of each folded chain."""
    program, pairs = finder.program, {pair.kernel: pair for pair in finder.pairs}
    if lost := [kernel for kernel in biases if kernel not in pairs]:
        _checks.raise_error(
            "Folded.apply",
            "with these inputs the model computes something else than on the sample",
            expected=f"batch norm after {', '.join(map('/'.join, biases))}",
            got=f"none after {', '.join(map('/'.join, lost))}",
            fix="Fold once for each path through the model",
        )
    types, leaves, last = list(program.types), dict(program.leaves), {}
    for kernel, bias in biases.items():
        pair = pairs[kernel]
        leaves[bias] = len(types)
        types.append(jax.ShapeDtypeStruct(pair.sizes, types[pair.operand].dtype))
        end = pair.steps[-1]
        layouts = [step.op for step in pair.steps if step.op.name in LAYOUT]
        made = end.op.outputs
        params = {"layouts": layouts, "axes": end.axes, "dtype": types[made[0]].dtype}
        last[made] = _AddBias("bias", params, (pair.output, leaves[bias]), made)
    ops = tuple(last.get(op.outputs, op) for op in program.ops)
    return pruned(program._replace(types=types, leaves=leaves, ops=ops))


class _AddBias(Op):
    """Lays the output of a linear operation out as its chain does, and adds the bias."""

    def run(self, *values: Array) -> Iterable[Array]:
        value, bias = values
        for op in self.params["layouts"]:
            (value,) = op.run(value)
        axes, dtype = self.params["axes"], self.params["dtype"]
        others = _checks.other_axes(axes, value.ndim)
        bias = jnp.expand_dims(bias.transpose(np.argsort(axes)), others)
        return (value.astype(dtype) + bias.astype(dtype),)


def run(
    source: Callable[..., Any],
    template: Any,
    biases: Biases,
    shapes: Mapping[Path, tuple[int, ...]],
    variables: Any,
    *inputs: Any,
) -> Any:
    """Traces the source for these inputs, rewrites it, and runs it on the folded variables."""
    given = by_path(variables)
    _check_shapes(given, shapes)

    def typed(path: Any, own: Any) -> Any:
        leaf = given.get(path_of(path))
        return own if leaf is None else jax.ShapeDtypeStruct(own.shape, leaf.dtype)

    finder = find(source, jax.tree.map_with_path(typed, template), inputs)
    return execute(rewritten(finder, biases), given, inputs)


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
