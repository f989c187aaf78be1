"""Training steps of whole networks that only differ in the normalization layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import normjax as nj

from . import peers, transformers
from .cases import Case
from .records import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from common import networks as examples  # noqa: E402 (after the examples are on the path)
from studies.speedup import inception as of_speedup  # noqa: E402
from train_resnet import resnet  # noqa: E402

RATE, CLASSES, DISCOUNT = 0.01, 1000, 0.99
# the peers that take features last
PEERS = ("normjax", "flax.linen", "flax.nnx", "haiku", "keras", "formula", "none")
State = tuple[Any, Any]  # params, batch_stats


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of classes."""
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits.astype(jnp.float32)), labels[..., None], -1
    )
    return -chosen.mean()


class Network(NamedTuple):
    """A network, the shape of its inputs, and its loss."""

    name: str
    shape: tuple[int, ...]  # of the inputs: images, or token ids
    dtype: str
    init: Callable[[jax.Array, Any], State]
    logits: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    error: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy  # of logits, by labels

    @property
    def title(self) -> str:
        """Returns the name of the row."""
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype}"


def step(network: Network) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Returns a step of SGD from (params, batch_stats, inputs, labels) to new ones and the loss."""

    def apply(
        params: Any, batch_stats: Any, inputs: Any, labels: Any
    ) -> tuple[Any, Any, jax.Array]:
        (value, batch_stats), grads = jax.value_and_grad(partial(loss, network), has_aux=True)(
            params, batch_stats, inputs, labels
        )
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), batch_stats, value

    return apply


def loss(
    network: Network, params: Any, batch_stats: Any, inputs: Any, labels: Any
) -> tuple[jax.Array, Any]:
    """Returns the loss and the new statistics."""
    logits, batch_stats = network.logits(params, batch_stats, inputs)
    return network.error(logits, labels), batch_stats


def batch(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and labels."""
    rng = np.random.default_rng(0)
    if len(network.shape) == 2:
        return tuple(rng.integers(0, CLASSES, network.shape).astype(np.int32) for _ in range(2))  # pyright: ignore
    labels = rng.integers(0, CLASSES, network.shape[0]).astype(np.int32)
    return rng.standard_normal(network.shape, np.float32), labels


@contextmanager
def normalized_by(peer: str) -> Iterator[None]:
    """Within this context, networks are traced with the peer's layers."""
    with (
        mock.patch.object(resnet, "BatchNorm", partial(_Norm, peer)),
        mock.patch.object(
            examples, "nj", SimpleNamespace(**vars(nj) | {"batch_norm": partial(_batch_norm, peer)})
        ),
        mock.patch.dict(_CHOSEN, peer=peer),
    ):
        yield


def suite(name: str) -> list[Network]:
    """Returns the networks at a size: tiny, cpu, gpu, or tpu (one chip); or gpu_static's."""
    if name == "gpu_static":
        return [
            _resnet("resnet50", (128, 224, 224, 3), "bfloat16"),
            _vit((256, 224, 224, 3), "bfloat16", 768, 12),
            _transformer("layer", (16, 1024), "bfloat16", 768, 12),
            _critic((256, 2, 23)),
        ]
    sizes: dict[str, tuple[tuple[int, ...], ...]] = {
        "tiny": ((4, 8, 8, 1), (4, 8, 8, 3), (), (2, 16)),
        "cpu": ((64, 28, 28, 1), (32, 32, 32, 3), (8, 128, 128, 3), (8, 128)),
        "gpu": ((512, 28, 28, 1), (512, 32, 32, 3), (128, 224, 224, 3), (16, 1024)),
        "tpu": ((512, 28, 28, 1), (512, 32, 32, 3), (64, 224, 224, 3), (16, 1024)),
    }
    width, depth = {"tiny": (32, 1), "cpu": (256, 4)}.get(name, (768, 12))
    small, images, large, tokens = sizes[name]
    dtype = "float32" if name in ("tiny", "cpu") else "bfloat16"
    transformers = [_transformer(kind, tokens, dtype, width, depth) for kind in ("layer", "rms")]
    found = [_resnet("resnet50", large, dtype), *transformers, _resnet("resnet18", images, dtype)]
    if name == "tiny":
        found = [_resnet("resnet8", images, "bfloat16", width=8), *transformers]
    sizes_of_inception = {"stem": 4, "widths": (4,)} if name == "tiny" else {}
    unit = examples.style(normalize=True, activation="relu")
    inception = of_speedup.inception(unit, **sizes_of_inception)
    return [
        *found,
        Network(
            "inception",
            small,
            "float32",
            lambda key, x: inception.init(key, small[1:], CLASSES),
            lambda params, batch_stats, x: inception.apply(params, batch_stats, x, True),
        ),
    ]


def _batch_norm(
    peer: str, params: Any, batch_stats: Any, x: jax.Array, train: bool, **_: Any
) -> tuple[jax.Array, Any]:
    if peer == "none":
        return x, batch_stats
    case = Case("batch", "forward" if train else "evaluation", x.shape, x.dtype.name)
    return peers.PEERS[peer](case)(params, batch_stats, x)


class _Norm(nn.Module):
    """A peer's batch norm in place of Flax's in the ResNets, with Flax's variables."""

    peer: str
    use_running_average: bool
    momentum: float
    dtype: Any
    axis_name: Any = None
    axis_index_groups: Any = None
    virtual_batch_size: Any = None
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x normalized, and updates the statistics."""
        size = x.shape[-1:]
        inits = {"scale": self.scale_init, "bias": nn.initializers.zeros}
        params = {name: self.param(name, init, size, jnp.float32) for name, init in inits.items()}
        fills = {"mean": jnp.zeros, "var": jnp.ones}
        stats = {
            name: self.variable("batch_stats", name, fill, size) for name, fill in fills.items()
        }
        y, new = _batch_norm(
            self.peer,
            params,
            {k: v.value for k, v in stats.items()},
            x,
            not self.use_running_average,
        )
        if not self.is_initializing():
            for name, value in new.items():
                stats[name].value = value
        return y


def _resnet(name: str, shape: tuple[int, ...], dtype: str, width: int = 64) -> Network:
    def model() -> Any:
        return resnet.ResNet(name, width, CLASSES, dtype=dtype)

    def init(key: jax.Array, x: Any) -> State:
        variables = model().init(key, x, train=True)
        return variables["params"], variables["batch_stats"]

    def logits(params: Any, batch_stats: Any, x: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        found, new = model().apply(variables, x, train=True, mutable=["batch_stats"])
        return found, new["batch_stats"]

    return Network(name, shape, dtype, init, logits)


_CHOSEN = {"peer": "normjax"}


def _layer(kind: Any, params: Any, x: jax.Array) -> jax.Array:
    """Returns the layer or RMS norm of the selected peer."""
    peer = _CHOSEN["peer"]
    if peer == "none":
        return x
    return peers.PEERS[peer](Case(kind, "forward", x.shape, x.dtype.name))(params, {}, x)[0]


def _transformer(kind: Any, shape: tuple[int, ...], dtype: str, width: int, depth: int) -> Network:
    model = transformers.Decoder(kind, width, depth, CLASSES, dtype, partial(_layer, kind))
    return Network(f"transformer, {kind} norm,", shape, dtype, model.init, model.logits)


def _vit(shape: tuple[int, ...], dtype: str, width: int, depth: int) -> Network:
    model = transformers.ViT("layer", width, depth, CLASSES, dtype, partial(_layer, "layer"))
    return Network("vit", shape, dtype, model.init, model.logits)


def _critic(shape: tuple[int, ...], width: int = 256, depth: int = 3) -> Network:
    """CrossQ's critic (Bhatt et al., 2024): batch norm before each layer, no target network.

    A batch contains the pairs of observation and action, and the pairs of next observation and next
    action.
    """
    normal = jax.nn.initializers.lecun_normal()
    sizes = (shape[-1], *[width] * depth, 1)

    def init(key: jax.Array, x: Any) -> State:
        keys = jax.random.split(key, depth + 1)
        params = [
            {
                "norm": {"scale": jnp.ones(inputs), "bias": jnp.zeros(inputs)},
                "kernel": normal(key, (inputs, outputs)),
                "bias": jnp.zeros(outputs),
            }
            for key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]
        return params, [{"mean": jnp.zeros(each), "var": jnp.ones(each)} for each in sizes[:-1]]

    def values(params: Any, batch_stats: Any, x: Any) -> tuple[jax.Array, Any]:
        x, new = x.reshape(-1, x.shape[-1]), []
        for i, (own, stats) in enumerate(zip(params, batch_stats, strict=True)):
            x, stats = _batch_norm(_CHOSEN["peer"], own["norm"], stats, x, train=True)
            x = x @ own["kernel"] + own["bias"]
            x = jax.nn.relu(x) if i < depth else x
            new.append(stats)
        return x.reshape(shape[:2]), new

    return Network("crossq critic", shape, "float32", init, values, _temporal_difference)


def _temporal_difference(values: jax.Array, rewards: jax.Array) -> jax.Array:
    """Returns the squared temporal difference error."""
    target = jax.lax.stop_gradient(rewards + DISCOUNT * values[:, 1])
    return jnp.square(values[:, 0] - target).mean()
