"""The steps that devices run: one of training, mapped over the mesh, and one of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax as nj
from train_resnet.options import Options
from train_resnet.resnet import ResNet, Sharing

AXIS = "data"
GROUP, MEMBER = "group", "member"  # instead of it, if groups of devices share statistics
WHOLE = PartitionSpec()
MEAN, STD = 118.0, 62.0  # of the pixels of photographs, roughly: batch norm does the rest


class State(NamedTuple):
    """All that training changes; the same on every device."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any


class SetupError(Exception):
    """Options that do not fit together or the devices that are there; one line says which."""


def sharing(options: Options, devices: int) -> Sharing:
    """Returns how `--norm-group` examples share statistics; raises SetupError for a bad number.

    Groups larger than what a device has are groups of devices, smaller ones are slices of its
    examples: the statistics are the same on any number of devices.
    """
    batch, group = options.batch_size, options.norm_group
    if batch % devices:
        raise SetupError(f"--batch-size {batch} is not divisible by the {devices} devices")
    local = batch // devices
    if batch % group or (group % local and local % group):
        raise SetupError(
            f"--norm-group {group} does not partition --batch-size {batch} on {devices} devices of "
            f"{local} examples: expected a divisor of {batch} that is a multiple or a divisor of "
            f"{local}"
        )
    if group < local:
        return Sharing(virtual_batch_size=group)
    if group == batch:
        return Sharing(axis_name=AXIS)
    if group == local:
        return Sharing()
    size = group // local
    groups = tuple(tuple(range(first, first + size)) for first in range(0, devices, size))
    return Sharing(axis_name=AXIS, axis_index_groups=groups)


def in_words(sharing: Sharing, options: Options) -> str:
    """Returns who shares statistics, for the screen."""
    if sharing.axis_index_groups is not None:
        size = len(sharing.axis_index_groups[0])
        return f"{options.norm_group} examples, on {size} devices, share statistics"
    if sharing.axis_name is not None:
        return f"the whole batch of {options.batch_size} examples shares statistics"
    return f"{options.norm_group} examples of a device share statistics"


def learning_rate(options: Options, steps: int) -> optax.Schedule:
    """Returns a linear warm-up and a cosine to 0."""
    warmup = min(round(options.warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, steps)


def optimizer(options: Options, steps: int) -> optax.GradientTransformation:
    """Returns SGD with Nesterov's momentum, and weight decay of the kernels."""
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask=nj.optim.decay_mask),
        optax.sgd(learning_rate(options, steps), momentum=0.9, nesterov=True),
    )


def _grouped(mesh: Mesh, shared: Sharing) -> tuple[Mesh, Sharing]:
    """Returns a mesh with an axis of the members of a group, if devices share in groups.

    The groups are neighbours. A psum over an axis of the mesh is one all-reduce within each group;
    `axis_index_groups` would gather what all members have, in bytes that grow with the group.
    """
    if shared.axis_index_groups is None:
        return mesh, shared
    members = len(shared.axis_index_groups[0])
    devices = mesh.devices.reshape(-1, members)
    return Mesh(devices, (GROUP, MEMBER)), Sharing(axis_name=MEMBER)


class Program:
    """The compiled functions of a run, and the shardings of what goes into them."""

    def __init__(self, options: Options, mesh: Mesh, classes: int, steps: int, image_size: int):
        self.options, self.image_size = options, image_size
        shared = sharing(options, mesh.size)
        self.shared = in_words(shared, options)
        self.mesh, shared = _grouped(mesh, shared)
        self.model = ResNet(
            options.network, options.width, classes, shared, options.momentum, options.dtype
        )
        self.optimizer = optimizer(options, steps)
        split = PartitionSpec(self.mesh.axis_names)
        self.whole, self.split = NamedSharding(self.mesh, WHOLE), NamedSharding(self.mesh, split)
        mapped = jax.shard_map(
            self._train, mesh=self.mesh, in_specs=(WHOLE, split), out_specs=(WHOLE, WHOLE)
        )
        self.train: Callable[[State, Any], tuple[State, dict[str, Array]]] = jax.jit(
            mapped, donate_argnums=0
        )
        # Evaluation touches no axis: plain jit, and the sums over sharded examples are those of
        # all.
        self.evaluate = jax.jit(self._evaluate, out_shardings=self.whole)

    def init(self) -> State:
        """Returns the state before the first step, on all devices."""
        return jax.jit(self._init, out_shardings=self.whole)(jax.random.key(self.options.seed))

    def abstract_state(self) -> State:
        """Returns the shapes, dtypes and shardings of a state."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.whole), shapes
        )

    def compile(self, state: State, batch: Any) -> None:
        """Compiles both steps for batches such as this one."""
        without = {name: rows for name, rows in batch.items() if name != "stop"}
        self.train = self.train.lower(state, batch).compile()  # pyright: ignore
        self.evaluate = self.evaluate.lower(state, without).compile()  # pyright: ignore

    def place(self, batch: Any) -> Any:
        """Returns this process's rows as part of global arrays."""
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(self.split, rows), batch
        )

    def _init(self, key: Array) -> State:
        image = jnp.zeros((1, self.image_size, self.image_size, 3), self.options.dtype)
        variables = self.model.init(key, image, train=False)
        params = variables["params"]
        return State(
            jnp.zeros((), jnp.int32), params, variables["batch_stats"], self.optimizer.init(params)
        )

    def _train(self, state: State, batch: Any) -> tuple[State, dict[str, Array]]:
        """A device's share of a step. JAX sums gradients typed as equal on all devices."""

        def loss(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = self.model.apply(
                variables, self._pixels(batch), train=True, mutable=["batch_stats"]
            )
            losses = _losses(logits, batch["label"], self.options.label_smoothing)
            return losses.sum() / self.options.batch_size, (logits, updates["batch_stats"])

        (value, (logits, batch_stats)), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params
        )
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        right = jnp.sum(logits.argmax(-1) == batch["label"]) / self.options.batch_size
        sums = lax.psum(
            {"loss": value, "accuracy": right, "stop": batch["stop"].sum()}, self.mesh.axis_names
        )
        merged = self._of_the_whole_batch(batch_stats)
        bad = [jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(merged)]
        sums["not_finite"] = jnp.sum(jnp.stack(bad))
        return State(state.step + 1, params, merged, opt_state), sums

    def _of_the_whole_batch(self, batch_stats: Any) -> Any:
        """Merges the running statistics of groups of examples for all devices."""
        if self.model.sharing == Sharing(axis_name=AXIS):
            return batch_stats
        apart = GROUP if GROUP in self.mesh.axis_names else AXIS
        return nj.sync_batch_stats(batch_stats, apart, momentum=self.options.momentum)

    def _evaluate(self, state: State, batch: Any) -> dict[str, Array]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = self.model.apply(variables, self._pixels(batch), train=False)
        weight = batch["weight"]
        losses = _losses(logits, batch["label"], 0.0)
        right = logits.argmax(-1) == batch["label"]
        return {
            "loss": jnp.sum(losses * weight),
            "accuracy": jnp.sum(right * weight),
            "examples": weight.sum(),
        }

    def _pixels(self, batch: Any) -> Array:
        return ((batch["image"].astype(jnp.float32) - MEAN) / STD).astype(self.options.dtype)


def _losses(logits: Array, labels: Array, smoothing: float) -> Array:
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets)
