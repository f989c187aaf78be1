"""Repeats the folds for inputs of other shapes, and compares them with the sample's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from normjax import _checks
from normjax._jaxpr import Program, trace
from normjax._trees import Path, by_path, path_of
from normjax.deploy._graph import Graph, Norm
from normjax.deploy._kernels import (
    Names,
    as_made,
    as_read,
    bordered,
    padded,
)
from normjax.deploy._layout import Affine
from normjax.deploy._plan import Fold, Key, Plan
from normjax.deploy._program import execute, inline, pruned
from normjax.deploy._rewrite import rewritten

# The names of mean and variance in Flax and Haiku, Keras, and PyTorch.
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
    """Traces a model and finds its batch norms by their leaves `mean` and `var`."""
    program = trace(source, variables, inputs, inline=inline)
    norms = []
    for path in program.leaves:
        for mean, var in STATISTICS:
            if path[-1] == var and (*path[:-1], mean) in program.leaves:
                norms.append(Norm(path[:-1], mean, var))
    return Graph(pruned(program), norms, leaves)


class Recipe(NamedTuple):
    """What is needed to repeat the folds for inputs of another shape.

    Attributes:
      source: the model.
      template: the shapes and dtypes of its variables.
      names: the paths of new leaves.
      shapes: the shapes of the folded model's leaves.
      used: the leaves that the model reads on the sample.
      constants: the folded leaves, to compare values that are computed from them.
      folds: the folds.
      plan: the plan for the sample.
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
    """Returns the map of each kernel in a plan, in the layout of the kernel."""
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


def run(recipe: Recipe, variables: Any, *inputs: Any) -> Any:
    """Traces the source for these inputs, rewrites it, and runs it on the folded variables."""
    given = by_path(variables)
    _check_shapes(given, recipe.shapes)
    return execute(program_for(recipe, given, inputs), given, inputs)


def program_for(recipe: Recipe, given: Mapping[Path, Any], inputs: tuple[Any, ...]) -> Program:
    """Returns the folded program for inputs of any shape; compares it with the sample's."""

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
            expected="a model that reads the same leaves as on the sample",
            got=f"a model that also reads {', '.join(map('/'.join, lost))}",
        )
    return program


def check_same(recipe: Recipe, plan: Plan, shapes: list[Any]) -> None:
    """Raises an error if the folds differ for these inputs."""
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
    """Raises an error for a model that computes something else at another shape."""
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
                fix="Pass the `variables` of the folded model, not those of its source",
            )
