"""Folds the batch norms of whole models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, PyTree

from normjax import _checks
from normjax._jaxpr import Program
from normjax._trees import Path, by_path, nest
from normjax.deploy._constants import FUNCTION
from normjax.deploy._kernels import folded_leaves, named
from normjax.deploy._linen import as_linen
from normjax.deploy._model import check_arrays, check_callable, traced
from normjax.deploy._notes import notes
from normjax.deploy._plan import Fold, Key, Plan
from normjax.deploy._recipe import Recipe, maps, run
from normjax.deploy._rewrite import rewritten
from normjax.statistics.modules import open_model

# How much rounding changes the outputs of a deep network in float32 and in half precision.
FULL, HALF = 1e-5, 5e-2


class Found(NamedTuple):
    """A batch norm of a model, and whether it was folded.

    Attributes:
      norm: its path in the variables.
      kernel: the path of the kernel into which it is folded, or several paths joined by " + "; None
        if it is not folded.
      reason: the reason why it is not folded; None if it is folded.

    Example:
      >>> import normjax as nj
      >>> print(nj.deploy.Found("batch_stats/norm", None, reason="its variance is not used"))
      Found(norm='batch_stats/norm', kernel=None, reason='its variance is not used')
    """

    norm: str
    kernel: str | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Folded:
    """A model without its folded batch norms; `print` shows a table of all batch norms.

    Attributes:
      variables: nested dicts of the leaves that the folded model needs, under their old paths.
        Kernels and biases include the batch norms; a new bias is stored beside its kernel.
      apply: the model as a pure function `(variables, *inputs) -> outputs`, for inputs of any shape
        that the model accepts. It raises an error if the folds are not valid for a shape.
      found: each batch norm, and whether it was folded.
      error: the largest relative error of an output on the sample: the norm of the difference from
        the source model's output, divided by the norm of that output.
      notes: notes about statistics that have other names than `mean` and `var`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj
      >>> def model(variables, x):
      ...     return nj.batch_norm({}, variables["norm"], x @ variables["kernel"], train=False)[0]
      >>> variables = {"kernel": jnp.eye(2), "norm": {"mean": jnp.ones(2), "var": 4 * jnp.ones(2)}}
      >>> folded = nj.deploy.fold(model, variables, jnp.ones((1, 2)) * 3, show=False)
      >>> y = folded.apply(folded.variables, jnp.array([[1.0, 5.0]]))
      >>> print(folded.variables["bias"], y.round(4))
      [-0.49999937 -0.49999937] [[0. 2.]]
    """

    variables: dict
    apply: Callable[..., Any]
    found: tuple[Found, ...]
    error: float
    notes: tuple[str, ...] = ()
    recipe: Any = dataclasses.field(default=None, repr=False, compare=False)

    def as_linen(self) -> tuple[Any, dict]:
        """Returns the folded model as a linen module, for tools that work on modules.

        Each kernel is a parameter of a module with its path, and `jax.lax` is called with it inside
        that module. So qwix finds and quantizes it, without a hand-written network that has no
        batch norms.

        Returns:
          A `flax.linen.Module` and its variables: the leaves that it reads, under their paths, in
          the collection "params" if they have no collection. `module.apply(variables, *inputs)`
          equals `apply`, and `module.init` returns these variables.

        Example:
          >>> import jax, jax.numpy as jnp, normjax as nj
          >>> def model(variables, x):
          ...     y = x @ variables["kernel"]
          ...     return nj.batch_norm({}, variables["norm"], y, train=False)[0]
          >>> norm = {"mean": jnp.ones(2), "var": jnp.ones(2)}
          >>> x = jnp.array([[1.0, 5.0]])
          >>> folded = nj.deploy.fold(model, {"kernel": jnp.eye(2), "norm": norm}, x, show=False)
          >>> module, variables = folded.as_linen()
          >>> print(module.apply(variables, x).round(3), sorted(variables["params"]))
          [[0. 4.]] ['bias', 'kernel']
        """
        return as_linen(self.recipe, self.variables)

    def __str__(self) -> str:
        rows = [(found.norm, found.kernel or "-", found.reason or "folded") for found in self.found]
        rows = [("batch norm", "into", ""), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        count = sum(found.kernel is not None for found in self.found)
        lines.append(f"{count} of {len(self.found)} folded; outputs agree to {self.error:.1e}")
        return "\n".join([*lines, *self.notes])


def fold(
    model: Any,
    variables: PyTree[Array],
    *inputs: PyTree[Array],
    pairs: Sequence[tuple[str, str]] | None = None,
    tolerance: float | None = None,
    show: bool = True,
) -> Folded:
    """Folds the batch norms of a model into convolutions and dense layers before or after them.

    Inference then runs without these batch norms, and quantizers see the weights that are actually
    used. The model is traced to find what can be folded. The affine map of a batch norm is carried
    back to the linear layers that compute its input, or else forward to all readers of its output,
    through casts, reshapes, concatenation, slices, means and max pooling. Each kernel has to be a
    leaf of the variables that is used only once. If a convolution after a batch norm pads with
    zeros, it then pads with the values that the batch norm maps to zero, a leaf `padding` beside
    its kernel. Branches that read the same value and are added become one kernel. The arithmetic of
    the model is folded in float64 as it is written, so it works with the batch norms of normjax and
    Flax, batch renorm, and your own. Batch norms that cannot be folded stay, and the printed table
    shows the reason. Finally, the source and the result are compared on the inputs, and the folds
    are checked again for each other shape.

    Args:
      model: the model at inference: a function `(variables, *inputs) -> outputs`, such as
        `functools.partial(model.apply, train=False)`; a linen module or an nnx module, which is run
        in inference mode; or a `TrainState`. After an nnx module or a `TrainState`, you can omit
        `variables`.
      variables: the variables of the model; `nnx.state(model)` for an nnx module. Batch norms are
        recognized by sibling leaves `mean` and `var`, or by the names in Keras (`moving_mean`) and
        PyTorch (`running_mean`).
      *inputs: a small sample of real inputs.
      pairs: the pairs to fold, as tuples of the paths of a kernel and a batch norm, as shown in the
        table. None folds all batch norms that can be folded.
      tolerance: the largest relative error of an output, by its norm. None means 1e-5, or 0.05 if
        the model computes in half precision.
      show: whether to print the table.

    Returns:
      The folded model; see `Folded`. Kernels keep their dtype, and each bias has the dtype of its
      kernel.

    Raises:
      ValueError: if a leaf is not finite or a variance is negative, with its path; if a pair in
        `pairs` cannot be folded; if source and result differ by more than `tolerance`. TypeError:
        under `jax.jit` and other transformations; fold outside of them.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> from flax import linen as nn
      >>> norm = nj.linen.BatchNorm(use_running_average=True)
      >>> model = nn.Sequential([nn.Dense(4, use_bias=False), norm, nn.relu])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> folded = nj.deploy.fold(model, model.init(jax.random.key(1), x), x)  # doctest: +ELLIPSIS
      batch norm            into
      batch_stats/layers_1  params/layers_0/kernel  folded
      1 of 1 folded; outputs agree to ...e-08
      >>> print(jax.tree.map(jnp.shape, folded.variables))
      {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 4)}}}
      >>> y = jax.jit(folded.apply)(folded.variables, x)
    """
    source, variables, inputs, _ = open_model(FUNCTION, model, (variables, *inputs), train=False)
    check_callable(source)
    leaves = by_path(variables)
    check_arrays(leaves, inputs)
    graph = traced(source, variables, inputs, leaves)
    plan = Plan(graph)
    found = _choose(plan, pairs)
    if pairs is not None:
        plan = Plan(graph, _named_folds(plan, found))
    recipe, new = _folded(source, variables, plan, inputs)
    apply = jax.jit(partial(run, recipe))
    tolerance = _rounding(graph.program) if tolerance is None else tolerance
    programs = partial(jax.jit(source), variables), partial(apply, nest(new))
    error = _verified(*programs, inputs, tolerance)
    folded = Folded(nest(new), apply, found, error, tuple(notes(graph)), recipe)
    if show:
        print(folded)
    return folded


def _folded(
    source: Callable[..., Any], variables: Any, plan: Plan, inputs: tuple[Any, ...]
) -> tuple[Recipe, dict[Path, Any]]:
    """Returns the recipe for `Folded.apply`, and the leaves of the folded model."""
    leaves = by_path(variables)
    names = named(plan, leaves)
    new = leaves | folded_leaves(plan, names, leaves)
    program = rewritten(plan, names)
    for path in plan.graph.program.leaves.keys() - program.leaves.keys():
        del new[path]
    recipe = Recipe(
        source,
        jax.tree.map(_described, variables),
        names,
        {path: np.shape(leaf) for path, leaf in new.items()},
        frozenset(program.leaves),
        _constants(plan, leaves),
        {fold.key: fold for fold in plan.folds},
        maps(plan),
        [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)],
    )
    return recipe, new


def _constants(plan: Plan, leaves: Mapping[Path, Any]) -> dict[Path, np.ndarray]:
    """Returns the leaves of the scales and shifts that were folded."""
    graph = plan.graph
    steps = [graph.makers[outputs[0]] for outputs in plan.absorbed]
    paths = frozenset().union(*map(graph.sources, steps))
    return {path: np.asarray(leaves[path]) for path in paths}


def _described(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def _rows(plan: Plan) -> list[tuple[str, str, Fold]]:
    """Returns the kernels and the batch norm of each row of the table."""
    rows = []
    for fold in plan.folds:
        kernels = dict.fromkeys("/".join(plan.merged(kernel)) for kernel in fold.kernels)
        rows += [(" + ".join(kernels), "/".join(norm), fold) for norm in fold.norms]
    return sorted(rows, key=lambda row: row[2].place)


def _named_folds(plan: Plan, found: tuple[Found, ...]) -> set[Key]:
    """Returns the folds that the selected batch norms need."""
    named = {(each.kernel, each.norm) for each in found if each.kernel is not None}
    rows = _rows(plan)
    keys = {fold.key for kernel, norm, fold in rows if (kernel, norm) in named}
    left = {kernel for kernel, norm, _ in rows if (kernel, norm) not in named}
    for fold in plan.folds:
        kernels = {"/".join(plan.merged(kernel)) for kernel in fold.kernels}
        if not fold.norms and not kernels & left:
            keys.add(fold.key)
    return keys


def _choose(plan: Plan, pairs: Sequence[tuple[str, str]] | None) -> tuple[Found, ...]:
    """Returns whether each batch norm is folded.

    Raises an error for named pairs that cannot be folded.
    """
    possible = [(kernel, norm) for kernel, norm, _ in _rows(plan)]
    folded = {norm for _, norm in possible}
    left = [norm for norm in plan.graph.norms if "/".join(norm) not in folded]
    reasons = {"/".join(norm): plan.reason(norm) for norm in left}
    named = possible if pairs is None else list(pairs)
    for pair in named:
        if pair not in possible:
            _checks.raise_error(
                FUNCTION,
                f"{pair!r} is not a kernel and a batch norm that can be folded",
                expected=f"pairs among {possible}, by their full paths",
                got=f"pairs={named}; {reasons.get(pair[-1], 'there is no such pair')}",
                fix="Leave that pair out; without `pairs`, all that can be folded are",
            )
    kernels = {kernel for kernel, _ in named}
    missing = [pair for pair in possible if pair[0] in kernels and pair not in named]
    if missing:
        _checks.raise_error(
            FUNCTION,
            "a kernel is followed by several batch norms, but pairs has only some of them",
            expected=f"also {missing} among the pairs",
            got=f"pairs={named}",
            fix="List all batch norms that follow it, or none of them",
        )
    rows = [
        Found(norm, kernel) if (kernel, norm) in named else Found(norm, None, "not named")
        for kernel, norm in possible
    ]
    return (*rows, *(Found(norm, None, reason) for norm, reason in reasons.items()))


def _rounding(program: Program) -> float:
    dtypes = [of.dtype for of in program.types if jnp.issubdtype(of.dtype, jnp.inexact)]
    half = any(dtype.itemsize < 4 for dtype in dtypes)
    return HALF if half else FULL


def _verified(
    source: Callable, folded: Callable, inputs: tuple[Any, ...], tolerance: float
) -> float:
    """Returns the folded model's largest relative error on the sample.

    Raises an error if the error exceeds the tolerance.
    """
    # On accelerators, float32 matrix products have about half precision by default.
    with jax.default_matmul_precision("highest"):
        expected, actual = (_floats(function(*inputs)) for function in (source, folded))
    # Python's max() may skip NaN, np.max() does not.
    error = float(np.max([*map(_difference, expected, actual)])) if expected else np.nan
    if not error <= tolerance:
        disagree = "the folded model does not agree with its source"
        _checks.raise_error(
            FUNCTION,
            disagree if expected else "the model returns no floats to compare",
            expected=f"finite outputs that differ by at most {tolerance:g} of their norm",
            got=f"{error:.3g} on the sample",
            fix="Fold the function that returns logits. If the source itself rounds that much, as "
            "with means hundreds of deviations from 0, pass `tolerance`",
        )
    return error


def _floats(tree: Any) -> list[np.ndarray]:
    return [
        np.asarray(leaf, np.complex128)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def _difference(source: np.ndarray, folded: np.ndarray) -> float:
    difference = np.linalg.norm(source - folded)
    return float(difference / np.linalg.norm(source)) if difference else 0.0
