"""How devices of a mesh share the statistics of batch norm."""

from __future__ import annotations

from typing import NamedTuple

import hlo
import jax
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float

import normjax as nj
from explained.style import OURS, REST, THEIRS, WIDTH

GROUPS, MEMBERS = 2, 4
DEVICES = GROUPS * MEMBERS
EXAMPLES, FEATURES = 32, 64  # of a device
LABELS = ["examples", "mean and deviation in use", "the whole batch's"]
AXES = (None, "member", ("group", "member"))


class Shared(NamedTuple):
    """What each device normalizes by, and what the compiled program sends for it."""

    mean: Float[Array, "devices features"]
    var: Float[Array, "devices features"]
    collectives: list[hlo.Collective]


def batch() -> Float[Array, "examples features"]:
    """Returns examples of all devices, whose means and deviations differ from device to device."""
    mean_key, deviation_key, x_key = jax.random.split(jax.random.key(1), 3)
    mean = 2 * jax.random.normal(mean_key, (DEVICES, 1, FEATURES))
    deviation = jax.random.uniform(deviation_key, (DEVICES, 1, FEATURES), minval=0.4, maxval=1.6)
    noise = jax.random.normal(x_key, (DEVICES, EXAMPLES, FEATURES))
    return (mean + deviation * noise).reshape(-1, FEATURES)


def share(x: Float[Array, "examples features"], axis_name: str | tuple | None) -> Shared:
    """Runs batch norm on the mesh, and compiles it to see what the devices send.

    With momentum=0 the new running statistics are what the batch was normalized by.
    """
    mesh = jax.make_mesh((GROUPS, MEMBERS), ("group", "member"))
    over_devices = jax.P(("group", "member"))
    params, batch_stats = nj.batch_norm_init(FEATURES)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=over_devices, out_specs=(over_devices, over_devices))
    def normalize(x: jax.Array) -> tuple[jax.Array, dict]:
        y, new = nj.batch_norm(
            params, batch_stats, x, train=True, momentum=0.0, axis_name=axis_name
        )
        return y, jax.tree.map(lambda leaf: leaf[None], new)

    x = jax.device_put(x, jax.NamedSharding(mesh, over_devices))
    _, new = normalize(x)
    compiled = normalize.lower(x).compile()
    return Shared(new["mean"], new["var"], hlo.collectives(compiled))


def sync_on_a_mesh() -> plt.Figure:
    """Draws each device's examples and the statistics it uses: its own, its group's, all's."""
    x = batch()
    figure, axes = plt.subplots(3, 1, figsize=(WIDTH, 7), sharex=True, layout="constrained")
    for axis, axis_name, members in zip(axes, AXES, (1, MEMBERS, DEVICES), strict=True):
        shared = share(x, axis_name)
        draw_devices(axis, x[:, 0], shared)
        for first in range(members, DEVICES, members):
            axis.axvline(first - 0.5, color="0.8", linewidth=0.8)
        name = f"axis_name={axis_name!r}".replace("'", '"')
        axis.set_title(f"{name}\n{sent(shared, members)}", loc="left")
        axis.set(yticks=(), ylabel="x, one feature")
    handles, labels = axes[0].get_legend_handles_labels()
    order = sorted(range(3), key=lambda i: LABELS.index(labels[i]))
    figure.legend(
        [handles[i] for i in order],
        LABELS,
        loc="outside upper left",
        ncols=3,
        handlelength=1,
        columnspacing=1,
    )
    axes[-1].set(xlabel="device", xticks=range(DEVICES))
    return figure


def sent(shared: Shared, members: int) -> str:
    """Says what the program sends, apart from branches that are not taken."""
    found = [each for each in shared.collectives if not each.in_branch]
    if not found:
        return "no collective: each device has its own"
    (only,) = found
    per_feature = only.elements // FEATURES
    return f"1 {only.kind} among {members} devices, {per_feature} numbers a feature"


def draw_devices(axis: plt.Axes, x: Float[Array, " examples"], shared: Shared) -> None:
    """Draws the examples of one feature as points, and mean and deviation as bars."""
    device = np.repeat(np.arange(DEVICES), EXAMPLES)
    jitter = np.tile(np.linspace(-0.42, -0.18, EXAMPLES), DEVICES)
    axis.scatter(device + jitter, x, 4, color=REST, label=LABELS[0])
    axis.errorbar(
        np.arange(DEVICES) + 0.15,
        shared.mean[:, 0],
        shared.var[:, 0] ** 0.5,
        fmt="s",
        color=OURS,
        elinewidth=4,
        label=LABELS[1],
    )
    low, high = x.mean() - x.std(), x.mean() + x.std()
    axis.axhspan(low, high, color=THEIRS, alpha=0.2, label=LABELS[2])
    axis.axhline(x.mean(), color=THEIRS, linewidth=1)
