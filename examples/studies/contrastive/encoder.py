"""SimCLR as pure functions: encoder, augmentation, and the loss over the keys of all devices.

encoder = Encoder(unit, widths)
params, batch_stats = encoder.init(key, channels)
q, batch_stats = encoder.embed(params, batch_stats, augment(key, images), True)    # on a device
queries, keys = (lax.all_gather(each, AXIS, tiled=True) for each in (q, k))
loss, found = contrast(queries, keys, own)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from common.networks import UNITS, Tree, Unit, batch
from jax import Array
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

AXIS = "devices"
TEMPERATURE = 0.2
EMBEDDING = 32
LEAST_AREA = 0.5  # of a crop, relative to the image
NOISE = 0.1  # of pixels from 0 to 1


class Way(NamedTuple):
    """How a network normalizes across devices.

    Attributes:
      unit: its layers.
      shuffled: whether keys are dealt to other devices than their queries, as in MoCo.
      own_statistics: whether each device has statistics of its own.
    """

    unit: Unit
    shuffled: bool = False
    own_statistics: bool = False


WAYS = {
    "per device": Way(batch(), own_statistics=True),
    "shuffled": Way(batch(), own_statistics=True, shuffled=True),
    "synced": Way(batch(axis_name=AXIS)),
    "layer norm": Way(UNITS["layer"]),
}


class Encoder(NamedTuple):
    """3x3 convolutions, all but the first of stride 2, the mean over pixels, and a two-layer head.

    Every layer is normalized, including the last one. Only the contrastive loss uses the head (Chen
    et al. 2020, 4.2).
    """

    unit: Unit
    widths: Sequence[int]

    def init(self, key: Array, channels: int) -> tuple[Tree, Tree]:
        """Returns the parameters and the statistics."""
        inputs, last = (channels, *self.widths), self.widths[-1]
        shapes = {f"conv_{i}": (3, 3, inputs[i], width) for i, width in enumerate(self.widths)}
        shapes |= {"head_0": (last, last), "head_1": (last, EMBEDDING)}
        params, batch_stats = {}, {}
        for name, own in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
            params[name], batch_stats[name] = self.unit.init(own, shapes[name])
        return params, batch_stats

    def features(
        self, params: Tree, batch_stats: Tree, images: Array, train: bool
    ) -> tuple[Array, Tree]:
        """Returns what a linear probe sees, `(batch, features)`, and the statistics."""
        apply, x, new = self.unit.apply, images, dict(batch_stats)
        for i in range(len(self.widths)):
            name, stride = f"conv_{i}", 2 if i else 1
            x, new[name] = apply(params[name], batch_stats[name], x, train, stride=stride)
            x = self.unit.activation(x)
        return x.mean((1, 2)), new

    def embed(
        self, params: Tree, batch_stats: Tree, images: Array, train: bool
    ) -> tuple[Array, Tree]:
        """Returns embeddings of length 1, and the statistics."""
        apply, (x, new) = self.unit.apply, self.features(params, batch_stats, images, train)
        x, new["head_0"] = apply(params["head_0"], batch_stats["head_0"], x, train)
        x = self.unit.activation(x)
        x, new["head_1"] = apply(params["head_1"], batch_stats["head_1"], x, train)
        return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-12), new


def augment(key: Array, images: Array) -> Array:
    """Returns a view of each image: a crop, contrast, noise; in colour also hue and mirroring."""
    return jax.vmap(_view)(jax.random.split(key, len(images)), images)


def _view(key: Array, image: Array) -> Array:
    crop, corner, contrast, noise, side = jax.random.split(key, 5)
    height, width, channels = image.shape
    zoom = jax.random.uniform(crop, (2,), minval=LEAST_AREA, maxval=1) ** -0.5
    size = jnp.array([height, width], jnp.float32)
    outside = size * (zoom - 1) * jax.random.uniform(corner, (2,))
    image = jax.image.scale_and_translate(
        image, image.shape, (0, 1), zoom, -outside, "linear", antialias=False
    )
    if channels > 1:  # the sides of a digit are not alike
        image = jnp.where(jax.random.bernoulli(side), image[:, ::-1], image)
    image = image * jax.random.uniform(contrast, (channels,), minval=0.6, maxval=1.4)
    return image + NOISE * jax.random.normal(noise, image.shape)


def contrast(queries: Array, keys: Array, own: Array) -> tuple[Array, Array]:
    """Returns the mean NT-Xent loss of a device's examples, both ways, and the queries' accuracy.

    Queries and keys are embeddings of the first and second views of all devices, `(batch,
    features)`, of length 1; `own` are the device's rows of both.
    """

    def one_way(queries: Array, keys: Array) -> tuple[Array, Array]:
        # but not oneself
        others = (queries[own] @ queries.T).at[jnp.arange(len(own)), own].set(-jnp.inf)
        logits = jnp.concatenate([queries[own] @ keys.T, others], axis=1) / TEMPERATURE
        found = logits[:, : len(keys)].argmax(-1) == own
        return cross_entropy(logits, own).mean(), found.mean()

    (loss, found), (back, _) = one_way(queries, keys), one_way(keys, queries)
    return (loss + back) / 2, found


def probe(train: tuple[Array, Array], test: tuple[Array, Array], classes: int) -> Array:
    """Returns the test accuracy of a linear classifier by ridge regression.

    Both parts are features `(count, features)` and labels.
    """
    features, labels = train
    mean, std = features.mean(0), features.std(0) + 1e-6

    def inputs(features: Array) -> Array:
        return jnp.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=1)  # and a bias

    x = inputs(features)
    decay = 1e-2 * len(x) * jnp.eye(x.shape[1])
    kernel = jnp.linalg.solve(x.T @ x + decay, x.T @ jax.nn.one_hot(labels, classes))
    return ((inputs(test[0]) @ kernel).argmax(-1) == test[1]).mean()
