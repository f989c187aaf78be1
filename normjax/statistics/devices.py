"""Shares statistics over devices, with one packed collective forward and one backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Inexact, Int

from normjax import _checks
from normjax._typing import AxisIndexGroups, AxisName, promote

# Groups of up to this many devices all-gather and sum, in one collective whose bytes grow with the
# group. Larger groups use two collectives whose bytes do not.
FEW_MEMBERS = 16


@dataclass(frozen=True)
class DeviceGroup:
    """The devices that share statistics.

    Attributes:
      axis_name: the mapped axes that statistics are shared over; empty if they are not shared.
      groups: groups of indices of the one mapped axis that share statistics; None if all share.
    """

    axis_name: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def size(self) -> int:
        """Returns the number of devices that share statistics."""
        if self.groups is not None:
            return len(self.groups[0])
        return math.prod(map(lax.axis_size, self.axis_name))

    def sum(self, *parts: Inexact[Array, "..."]) -> tuple[Inexact[Array, "..."], ...]:
        """Sums each part over the devices, in one collective of all parts."""
        return _packed(self._sum, parts) if self.axis_name else parts

    def gather(self, *parts: Inexact[Array, "..."]) -> tuple[Inexact[Array, "devices ..."], ...]:
        """Stacks each device's parts along a new first axis, in one collective of all parts."""
        return _packed(self._gather, parts)

    def _sum(self, flat: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        if self.groups is None:
            return lax.psum(flat, self.axis_name)
        (name,) = self.axis_name
        by_vmap = name not in jax.sharding.get_abstract_mesh().manual_axes
        if by_vmap or _tracks_variation(name):
            # psum supports no groups under vmap or check_vma=True; a gather within a group is
            # small.
            if by_vmap or self.size <= FEW_MEMBERS:
                return self._gather(flat).sum(0)
            return self._sum_of_parts(flat, name)
        return lax.psum(flat, name, axis_index_groups=self.groups)

    def _sum_of_parts(self, flat: Inexact[Array, " n"], name: Hashable) -> Inexact[Array, " n"]:
        """Sums by reduce-scatter and all-gather, so that bytes do not grow with the group."""
        groups = cast(Any, self.groups)  # JAX asks for lists
        padded = jnp.pad(flat, (0, -flat.size % self.size))
        own = lax.psum_scatter(padded, name, axis_index_groups=groups, tiled=True)
        return lax.all_gather(own, name, axis_index_groups=groups, tiled=True)[: flat.size]

    def _gather(self, flat: Inexact[Array, " n"]) -> Inexact[Array, "devices n"]:
        if self.groups is None:
            alike = "invarying" if any(map(_tracks_variation, self.axis_name)) else "varying"
            return lax.all_gather(flat, self.axis_name, to=alike)
        (name,) = self.axis_name
        if name not in jax.sharding.get_abstract_mesh().manual_axes:
            # vmap does not support groups. Its "devices" are rows of one array, so a gather is
            # free.
            return lax.all_gather(flat, name)[self._peers()]
        return lax.all_gather(flat, name, axis_index_groups=self.groups)

    def _peers(self) -> Int[Array, " group"]:
        """Returns the indices of the devices in this device's group."""
        assert self.groups is not None
        peers = {index: group for group in self.groups for index in group}
        return jnp.asarray([peers[index] for index in range(len(peers))])[
            lax.axis_index(self.axis_name)
        ]


ALONE = DeviceGroup()


def device_group(
    function: str, axis_name: AxisName | None, axis_index_groups: AxisIndexGroups | None
) -> DeviceGroup:
    """Returns the devices that share statistics; raises an error for bad axes or groups."""
    if axis_name is None and axis_index_groups is None:
        return ALONE
    names = _bound_axes(function, axis_name)
    return DeviceGroup(names, _index_groups(function, axis_index_groups, names))


def varying_axes(value: Any) -> frozenset[Hashable]:
    """Returns the mapped axes over which `value` varies; none if JAX does not track them."""
    kind = jax.typeof(value)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "mat", None), "varying", frozenset())


def _tracks_variation(name: Hashable) -> bool:
    return name in varying_axes(lax.axis_index(name))


def pcast_like(x: Array, *parts: Inexact[Array, "..."]) -> tuple[Inexact[Array, "..."], ...]:
    """Casts parts to vary over the mapped axes over which `x` varies, all in one cast.

    The transpose of this cast is a sum over devices. If JAX cast each part by itself, the backward
    pass would have an all-reduce for each of mean, scale and bias. Packed, there is only one.
    """
    over = varying_axes(x)
    missing = over and over - frozenset().union(*map(varying_axes, parts))
    if not (missing and parts):
        return parts
    return _packed(partial(lax.pcast, axis_name=tuple(missing), to="varying"), parts)


def laid_out_by_the_compiler(
    step: Callable[..., Any], mesh: AbstractMesh, results: Any
) -> Callable[..., Any]:
    """Returns a step that is compiled as on Auto axes, with results of the specs `results`.

    On Explicit axes, JAX derives the sharding of each operation's result. It cannot do so for a
    branch under vmap, for ghost batches, groups or columns that span devices, or for the
    concatenation of differently sharded parts. The compiler can.
    """

    def on_the_mesh(leaf: Array) -> Array:
        # The gradient of an array without a mesh would lose the mesh, which fails under vmap over a
        # sharded axis. A product with 1 keeps the mesh in both directions, and XLA removes it.
        has_gradient = isinstance(leaf, Tracer) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if not (has_gradient and jax.typeof(leaf).sharding.mesh.empty):
            return leaf
        return leaf * jnp.ones((), leaf.dtype, out_sharding=NamedSharding(mesh, PartitionSpec()))

    def in_whole(*operands: Any) -> Any:
        operands = jax.tree.map(on_the_mesh, operands)
        shardings = jax.tree.map(partial(NamedSharding, mesh), results)
        return jax.sharding.auto_axes(step, axes=mesh.explicit_axes, out_sharding=shardings)(
            *operands
        )

    return in_whole


def explicit_mesh(*operands: Any) -> AbstractMesh | None:
    """Returns the mesh with Explicit axes on which the operands lie, or None."""
    for leaf in jax.tree.leaves(operands):
        mesh = jax.typeof(leaf).sharding.mesh
        if mesh.explicit_axes:
            return mesh
    return None


def spec_of(value: Any) -> PartitionSpec:
    """Returns the PartitionSpec of a value, as far as its JAX type tells."""
    return jax.typeof(value).sharding.spec


def _packed(collective: Callable[[Array], Array], parts: Sequence[Array]) -> tuple[Array, ...]:
    """Applies a collective to the concatenated parts; it may add leading axes."""
    dtype = promote(*(part.dtype for part in parts))
    result = collective(jnp.concatenate([jnp.ravel(part).astype(dtype) for part in parts]))
    cuts = list(accumulate((part.size for part in parts), initial=0))
    pieces = []
    for part, start, stop in zip(parts, cuts, cuts[1:], strict=False):
        piece = result[..., start:stop].reshape(*result.shape[:-1], *part.shape)
        real = jnp.iscomplexobj(piece) and not jnp.iscomplexobj(part)
        pieces.append((piece.real if real else piece).astype(part.dtype))
    return tuple(pieces)


def _bound_axes(function: str, axis_name: AxisName | None) -> tuple[Hashable, ...]:
    """Returns the mapped axis names as a tuple; raises an error if one is not in scope."""
    if axis_name is None:
        return ()
    names = tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            # Imported here, since this import takes as long as half of normjax.
            from jax.extend.core import unsafe_get_axis_names_DO_NOT_USE as axis_names_in_scope  # pyright: ignore

            scope = [str(axis) for axis in axis_names_in_scope()]
            _checks.raise_error(
                function,
                f"axis name {name!r} is not bound here",
                expected=f"one of the axes in scope, {scope}" if scope else "an axis in scope",
                got=f"axis_name={axis_name!r}" + ("" if scope else ", and no axis is in scope"),
                fix="Call it under jax.pmap, jax.shard_map or jax.vmap with that axis_name, or "
                "drop axis_name (plain jit synchronizes sharded inputs by itself)",
                kind=NameError,
            )
    return names


def _index_groups(
    function: str, groups: Sequence[Sequence[int]] | None, names: tuple[Hashable, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Returns groups as tuples; raises an error unless they partition the mapped axis evenly."""
    if groups is None:
        return None
    got = f"axis_index_groups={groups!r} for axis_name={names!r}"
    if len(names) != 1:
        _checks.raise_error(
            function,
            "axis_index_groups needs exactly one axis_name",
            expected="one mapped axis",
            got=got,
            fix="Pass the single axis name that the groups divide",
        )
    size = lax.axis_size(names[0])
    canonical = tuple(tuple(int(index) for index in group) for group in groups)
    even = len({len(group) for group in canonical}) == 1
    if not even or sorted(index for group in canonical for index in group) != list(range(size)):
        _checks.raise_error(
            function,
            "axis_index_groups does not partition the axis evenly",
            expected=f"groups of equal size that contain each of 0..{size - 1} once",
            got=got,
            fix="For groups of k: numpy.arange(size).reshape(-1, k).tolist()",
        )
    return canonical
