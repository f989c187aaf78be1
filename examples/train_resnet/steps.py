"""The training step, which is mapped over the mesh, and the evaluation step."""

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
GROUP, MEMBER = "group", "member"  # used instead if groups of devices share statistics
WHOLE = PartitionSpec()
# The approximate mean and deviation of photographs; batch norm corrects the rest.
MEAN, STD = 118.0, 62.0


class State(NamedTuple):
    """Everything that training changes; replicated on all devices."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any


class SetupError(Exception):
    """Raised if options do not fit each other or the devices; the message is one line."""


def sharing(options: Options, devices: int) -> Sharing:
    """Returns how `--norm-group` examples share statistics; raises SetupError for a bad number.

    A group that is larger than the examples of a device is a group of devices; a smaller one is a
    slice of a device's examples. So the statistics do not depend on the number of devices.
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
    """Describes in words which examples share statistics."""
    if sharing.axis_index_groups is not None:
        size = len(sharing.axis_index_groups[0])
        return f"{options.norm_group} examples, on {size} devices, share statistics"
    if sharing.axis_name is not None:
        return f"the whole batch of {options.batch_size} examples shares statistics"
    return f"{options.norm_group} examples of a device share statistics"


def learning_rate(options: Options, steps: int) -> optax.Schedule:
    """Returns a schedule with a linear warm-up and cosine decay to 0."""
    warmup = min(round(options.warmup * steps), steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, steps)


def optimizer(options: Options, steps: int) -> optax.GradientTransformation:
    """Returns SGD with Nesterov momentum, and weight decay of kernels."""
    return optax.chain(
        optax.add_decayed_weights(options.weight_decay, mask=nj.optim.decay_mask),
        optax.sgd(learning_rate(options, steps), momentum=0.9, nesterov=True),
    )


def _grouped(mesh: Mesh, shared: Sharing) -> tuple[Mesh, Sharing]:
    """Returns a mesh with an axis over the members of a group, if groups of devices share.

    Groups consist of neighbouring devices. A psum over a mesh axis is one all-reduce within each
    group, while `axis_index_groups` would all-gather, with bytes that grow with the group.
    """
    if shared.axis_index_groups is None:
        return mesh, shared
    members = len(shared.axis_index_groups[0])
    devices = mesh.devices.reshape(-1, members)
    return Mesh(devices, (GROUP, MEMBER)), Sharing(axis_name=MEMBER)


class Program:
    """The compiled functions of a run, and the shardings of their arguments."""

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
        # Evaluation needs no mapped axis: under plain jit, sums over sharded examples are global.
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
        """Compiles both steps for batches of this shape."""
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
        """Runs one device's part of a step. JAX sums gradients that are typed as replicated."""

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
