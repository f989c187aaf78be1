"""Compiles the steps of layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from normjax._typing import Params
from normjax.layers.affine import lay_out
from normjax.platforms.cpu import without_unit_axes
from normjax.platforms.plain import custom_jvp, is_plain_for, plain_phrasing
from normjax.statistics.devices import explicit_mesh, laid_out_by_the_compiler, spec_of
from normjax.statistics.elements import OUTPUT, STATISTICS

KEPT = jax.checkpoint_policies.save_only_these_names(STATISTICS, OUTPUT)


def jit_step(step: Callable[..., Any], like: str | tuple[str, ...] = "x") -> Callable[..., Any]:
    """Compiles a step once for each value of its last, static argument.

    If operands have Explicit mesh axes, each result is sharded like the operand that `like` names
    for it. A result without such an operand is replicated.

    Under an outer jit, the step is inlined into the outer program. For the backward pass, it stores
    only its operands and the arrays that it names: statistics, and an output that replaces the
    input. This is a `jax.checkpoint` inside the derivative rule, so that `jax.experimental.jet` and
    exporters do not find it in the forward program.
    """
    names = [*inspect.signature(step).parameters]
    last = len(names) - 1
    lean = jax.checkpoint(step, prevent_cse=False, policy=KEPT, static_argnums=last)

    def derivative(spec: Any, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(lambda *operands: lean(*operands, spec), primals, tangents)

    differentiable = custom_jvp(step, nondiff_argnums=(last,))
    differentiable.defjvp(derivative)
    compiled = jax.jit(differentiable, static_argnums=last, inline=True)

    def run(*arguments: Any) -> Any:
        *operands, spec = arguments
        mesh = explicit_mesh(operands)
        if mesh is None:
            return _plainly(step, arguments) if is_plain_for(operands) else compiled(*arguments)
        specs = dict(zip(names, jax.tree.map(spec_of, operands), strict=False))
        results = jax.tree.map(lambda name: specs.get(name, PartitionSpec()), like)
        return laid_out_by_the_compiler(lambda *each: compiled(*each, spec), mesh, results)(
            *operands
        )

    return run


def _plainly(step: Callable[..., Any], arguments: Any) -> Any:
    """Runs a step without jit, so that no cache keeps functions that an exporter patched."""
    with plain_phrasing():
        return step(*arguments)


def jit_step_within_examples(step: Callable[..., Array]) -> Callable[..., Array]:
    """Compiles a step `(params, x, mask, spec)` that reduces x within examples.

    The step receives params with the rank of x.
    """
    squeezed = without_unit_axes(step)

    def with_rank_of_x(params: Params, x: Array, mask: Array | None, spec: Any) -> Array:
        return squeezed(lay_out(params, x.ndim, spec), x, mask, spec)

    return jit_step(with_rank_of_x)
