"""Compiles the programs of a case for peers on JAX, and measures their memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .cases import Case, Shape, operands
from .peers import AXIS, MASKED, PEERS, Unable, features_first
from .timing import Program

CHECKED = 2**16  # the number of checked values of y, and of each gradient of its size


class Built(NamedTuple):
    """A program, its results (for the check), and its memory use."""

    program: Program
    outputs: Callable[[], dict[str, np.ndarray]]
    memory: dict[str, int]


class Operands:
    """The operands of a case, placed on the devices once for each layout."""

    def __init__(self, case: Case):
        self.case, self.host = case, operands(case)
        self._placed: dict[bool, dict[str, jax.Array]] = {}

    def placed(self, features_first: bool) -> dict[str, jax.Array]:
        """Returns them on the devices."""
        if features_first not in self._placed:
            placed = {
                name: _placed(value, self.case, features_first) for name, value in self.host.items()
            }
            self._placed[features_first] = placed
        return self._placed[features_first]


def build(peer: str, case: Case, operands: Operands) -> Built:
    """Compiles a case for a peer on JAX; raises Unable or ImportError if it is missing."""
    first = features_first(peer, case)
    run, given = traceable(peer, case, operands.placed(first))
    jitted = jax.jit(run)
    program = Program(lambda: jitted(*given), jax.block_until_ready, jax.default_backend() != "cpu")

    def outputs() -> dict[str, np.ndarray]:
        return {
            name: checked(np.asarray(value, np.float32), first)
            for name, value in jitted(*given).items()
        }

    memory = compiled_memory(jitted.lower(*given).compile())
    if case.mode == "forward+backward" and case.devices == 1:
        params, stats, arrays = given
        forward = partial(_forward, PEERS[peer](case), case, mask=arrays.get("mask"))
        memory["kept_bytes"] = kept_bytes(
            lambda params, x, residual: forward(params, stats, x, residual)[0],
            params,
            arrays["x"],
            arrays.get("residual"),
        )
    return Built(program, outputs, memory)


def traceable(
    peer: str, case: Case, operands: dict[str, Any]
) -> tuple[Callable[..., dict[str, Any]], tuple]:
    """Returns the function to compile for a case, and its arguments: arrays, or shapes of them.

    The arguments are params, batch_stats and the arrays. For the backward pass alone, they are the
    residuals of the forward pass and the cotangent of y.
    """
    if case.masked and peer not in MASKED:
        raise Unable("takes no mask")
    apply = PEERS[peer](case)
    params = {name: operands[name] for name in ("scale", "bias") if name in operands}
    stats = {name: operands[name] for name in ("mean", "var") if case.layer == "batch"}
    names = ("x", "cotangent", "residual", "mask")
    arrays = {name: operands[name] for name in names if name in operands}
    if case.mode == "backward":
        return _transposed(partial(_forward, apply, case), params, stats, arrays)
    run = partial(_run, apply, case)
    if case.devices > 1:
        run = _shared(run, params, stats, arrays)
    return run, (params, stats, arrays)


def arranged(shape: Shape, features_first: bool) -> Shape:
    """Returns the shape of an operand in the layout of a program."""
    leaf = len(shape) == 1
    return shape if leaf or not features_first else (shape[0], shape[-1], *shape[1:-1])


def sharding(case: Case, devices: Sequence[Any], leaf: bool) -> NamedSharding:
    """Returns the sharding of an operand over the devices of a case; leaves are replicated."""
    mesh = Mesh(np.array(devices[: case.devices]), (AXIS,))
    return NamedSharding(mesh, PartitionSpec() if leaf else PartitionSpec(AXIS))


def checked(value: np.ndarray, features_first: bool) -> np.ndarray:
    """Returns the first examples of an array, with features last; leaves are unchanged."""
    if value.ndim == 1:
        return value
    value = value[: math.ceil(CHECKED / value[0].size)]
    return np.moveaxis(value, 1, -1) if features_first else value


def relative_errors(
    outputs: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> dict[str, float]:
    """Returns the largest difference in each output, relative to the largest value."""
    return {
        name: float(np.max(np.abs(value - reference[name])) / np.max(np.abs(reference[name])))
        for name, value in outputs.items()
        if name in reference
    }


def compiled_memory(compiled: Any) -> dict[str, int]:
    """Returns a program's temporary bytes, without arguments and results, and its peak."""
    memory = compiled.memory_analysis()
    if memory is None:
        return {}
    found = {"temporary_bytes": memory.temp_size_in_bytes}
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    return found | ({"peak_bytes": peak} if peak else {})


def kept_bytes(function: Callable[..., Any], *operands: Any) -> int:
    """Returns the bytes that a function stores for its backward pass, without its operands."""
    traced = jax.make_jaxpr(lambda *operands: jax.vjp(function, *operands)[1])(*operands).jaxpr
    given = {id(value) for value in (*traced.invars, *traced.constvars)}
    kept = {id(value): value.aval for value in traced.outvars if not isinstance(value, Literal)}
    return sum(
        math.prod(aval.shape) * aval.dtype.itemsize
        for key, aval in kept.items()
        if key not in given
    )


def _forward(
    apply: Callable,
    case: Case,
    params: dict,
    stats: dict,
    x: jax.Array,
    residual: Any = None,
    mask: Any = None,
) -> tuple[Any, dict]:
    y, stats = apply(params, stats, x, **({"mask": mask} if case.masked else {}))
    if residual is not None:
        y = y + residual
    return (jax.nn.relu(y) if case.then else y), stats


def _run(
    apply: Callable, case: Case, params: dict, stats: dict, arrays: dict[str, Any]
) -> dict[str, Any]:
    """The function to time: returns y, new statistics, and all gradients."""
    forward = partial(_forward, apply, case, mask=arrays.get("mask"))
    x, residual = arrays["x"], arrays.get("residual")
    if not case.differentiated:
        y, new = forward(params, stats, x, residual)
        return {"y": y, **(new if case.train else {})}
    y, backward, new = jax.vjp(
        lambda p, x, r: forward(p, stats, x, r), params, x, residual, has_aux=True
    )
    d_params, d_x, d_residual = backward(arrays["cotangent"])
    if case.devices > 1:
        d_params = jax.lax.psum(d_params, AXIS)
    return {"y": y, **_gradients(d_params, d_x, d_residual), **new}


def _gradients(d_params: dict, d_x: Any, d_residual: Any) -> dict[str, Any]:
    found = {"d_x": d_x, "d_residual": d_residual, **{f"d_{k}": v for k, v in d_params.items()}}
    return {name: value for name, value in found.items() if value is not None}


def _transposed(
    forward: Callable, params: dict, stats: dict, arrays: dict[str, Any]
) -> tuple[Callable[..., dict[str, Any]], tuple]:
    """Returns the backward pass as a separate program, and the residuals of the forward pass."""

    def kept(params: dict, stats: dict, x: Any, residual: Any, mask: Any) -> Any:
        one = lambda p, x, r: forward(p, stats, x, r, mask)  # noqa: E731
        return jax.vjp(one, params, x, residual, has_aux=True)[1]

    given = (params, stats, arrays["x"], arrays.get("residual"), arrays.get("mask"))
    abstract = isinstance(arrays["x"], jax.ShapeDtypeStruct)
    backward = jax.eval_shape(kept, *given) if abstract else jax.jit(kept)(*given)
    return (
        lambda backward, cotangent: _gradients(*backward(cotangent)),
        (backward, arrays["cotangent"]),
    )


def _shared(run: Callable, params: dict, stats: dict, arrays: dict[str, Any]) -> Callable:
    """Runs on all devices, each with its part of the examples."""
    split, whole = PartitionSpec(AXIS), PartitionSpec()

    def specs(tree: dict[str, Any]) -> dict[str, PartitionSpec]:
        return {name: split if value.ndim > 1 else whole for name, value in tree.items()}

    given = (params, stats, arrays)
    mesh = arrays["x"].sharding.mesh
    named = {name: whole for name in (*(f"d_{name}" for name in params), *stats)} | {
        "y": split,
        "d_x": split,
    }
    produced = {
        name: spec
        for name, spec in named.items()
        if "cotangent" in arrays or not name.startswith("d_")
    }
    return jax.shard_map(
        run, mesh=mesh, in_specs=tuple(map(specs, given)), out_specs=produced, check_vma=False
    )


def _placed(value: np.ndarray, case: Case, features_first: bool) -> jax.Array:
    """Places an operand in the layout and sharding of a program."""
    leaf = value.ndim == 1
    if features_first and not leaf:
        value = np.ascontiguousarray(np.moveaxis(value, -1, 1))
    if case.devices == 1:
        return jnp.asarray(value)
    return jax.device_put(value, sharding(case, jax.devices(), leaf))
