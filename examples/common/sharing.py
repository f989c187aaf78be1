"""One network, several domains: who shares which statistics, in a few lines each.

A way to share takes images `(domains, batch, pixels)` in training and returns logits `(domains,
batch, classes)`:

    params, batch_stats = way.init(key, pixels, domains)
    logits, batch_stats = way.train(params, batch_stats, images)
    logits = way.infer(params, batch_stats, images, domain)  # images (batch, pixels) of one domain
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

import normjax as nj
from common.data import CLASSES
from common.networks import BATCH_NORM_MOMENTUM, Tree

HIDDEN = (128, 128)


def init(key: Array, pixels: int) -> tuple[Tree, Tree]:
    """Returns the parameters of the network, and its running statistics."""
    params, batch_stats = {}, {}
    *sizes, last = zip(
        (pixels, *HIDDEN), (*HIDDEN, CLASSES), jax.random.split(key, len(HIDDEN) + 1), strict=True
    )
    for i, (inputs, outputs, layer_key) in enumerate(sizes):
        norm, batch_stats[f"hidden_{i}"] = nj.batch_norm_init(outputs)
        kernel = initializers.he_normal()(layer_key, (inputs, outputs), jnp.float32)
        params[f"hidden_{i}"] = {"kernel": kernel, "norm": norm}
    inputs, outputs, layer_key = last
    kernel = initializers.glorot_normal()(layer_key, (inputs, outputs), jnp.float32)
    return params | {"logits": {"kernel": kernel, "bias": jnp.zeros(outputs)}}, batch_stats


def apply(params: Tree, batch_stats: Tree, x: Array, train: bool) -> tuple[Array, Tree]:
    """Returns logits for images `(batch, pixels)`, and the new running statistics."""
    new_stats = {}
    for name, old in batch_stats.items():
        layer = params[name]
        x = x @ layer["kernel"]
        x, new_stats[name] = nj.batch_norm(
            layer["norm"], old, x, train, momentum=BATCH_NORM_MOMENTUM
        )
        x = jax.nn.relu(x)
    return x @ params["logits"]["kernel"] + params["logits"]["bias"], new_stats


class Way(NamedTuple):
    """A way to share: how parameters and statistics are made, and what is computed with them."""

    init: Callable[[Array, int, int], tuple[Tree, Any]]
    train: Callable[[Tree, Any, Array], tuple[Array, Any]]
    infer: Callable[[Tree, Any, Array, int], Array]


def _init_shared(key: Array, pixels: int, domains: int) -> tuple[Tree, Tree]:
    return init(key, pixels)


def _infer_shared(params: Tree, batch_stats: Tree, images: Array, domain: int) -> Array:
    return apply(params, batch_stats, images, False)[0]


def _train_mixed(params: Tree, batch_stats: Tree, images: Array) -> tuple[Array, Tree]:
    logits, batch_stats = apply(params, batch_stats, images.reshape(-1, images.shape[-1]), True)
    return logits.reshape(*images.shape[:2], -1), batch_stats


def _train_in_turn(params: Tree, batch_stats: Tree, images: Array) -> tuple[Array, Tree]:
    logits = []
    for batch in images:
        batch_logits, batch_stats = apply(params, batch_stats, batch, True)
        logits.append(batch_logits)
    return jnp.stack(logits), batch_stats


def _init_own(key: Array, pixels: int, domains: int) -> tuple[Tree, list[Tree]]:
    params, batch_stats = init(key, pixels)
    return params, [batch_stats] * domains


def _train_own(params: Tree, batch_stats: list[Tree], images: Array) -> tuple[Array, list[Tree]]:
    results = [
        apply(params, own, batch, True) for own, batch in zip(batch_stats, images, strict=True)
    ]
    return jnp.stack([logits for logits, _ in results]), [own for _, own in results]


def _infer_own(params: Tree, batch_stats: list[Tree], images: Array, domain: int) -> Array:
    return apply(params, batch_stats[domain], images, False)[0]


def condition(params: Tree, domains: Array) -> Tree:
    """Returns params with scales and biases for each example, `(batch, features)`.

    They are `(domains, features)` in `params`. One number as `domains` gives `(features,)`.
    """

    def rows(layer: Tree) -> Tree:
        return layer | {"norm": {leaf: table[domains] for leaf, table in layer["norm"].items()}}

    return {name: rows(layer) if "norm" in layer else layer for name, layer in params.items()}


def spread(params: Tree, domains: int) -> Tree:
    """Returns params with scales and biases for each domain, `(domains, features)`, all equal."""

    def tables(layer: Tree) -> Tree:
        return layer | {
            "norm": {leaf: jnp.tile(value, (domains, 1)) for leaf, value in layer["norm"].items()}
        }

    return {name: tables(layer) if "norm" in layer else layer for name, layer in params.items()}


def _init_conditional(key: Array, pixels: int, domains: int) -> tuple[Tree, Tree]:
    params, batch_stats = init(key, pixels)
    return spread(params, domains), batch_stats


def _train_conditional(params: Tree, batch_stats: Tree, images: Array) -> tuple[Array, Tree]:
    domains = jnp.repeat(jnp.arange(len(images)), images.shape[1])
    return _train_mixed(condition(params, domains), batch_stats, images)


def _infer_conditional(params: Tree, batch_stats: Tree, images: Array, domain: int) -> Array:
    return apply(condition(params, jnp.full(len(images), domain)), batch_stats, images, False)[0]


WAYS = {
    "mixed": Way(_init_shared, _train_mixed, _infer_shared),
    "in turn": Way(_init_shared, _train_in_turn, _infer_shared),
    "own": Way(_init_own, _train_own, _infer_own),  # Chang et al. 2019, Xie et al. 2020
    # de Vries et al. 2017
    "conditional": Way(_init_conditional, _train_conditional, _infer_conditional),
}
