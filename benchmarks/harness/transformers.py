"""Transformers with pre-norm blocks of attention and an MLP, without biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PATCH, HEAD = 16, 64
NORMAL = jax.nn.initializers.normal(0.02)


@dataclass(frozen=True)
class Transformer:
    """The common base of all transformers."""

    kind: str  # the kind of normalization: layer or rms
    width: int
    depth: int
    classes: int
    dtype: str
    norm: Callable[[Any, jax.Array], jax.Array]


class Decoder(Transformer):
    """A causal language model with tied embeddings."""

    def init(self, key: jax.Array, tokens: Any) -> tuple[Any, Any]:
        """Returns params and empty statistics."""
        key, own = jax.random.split(key)
        embedding = NORMAL(own, (self.classes, self.width))
        return {"embedding": embedding, **_init_blocks(self, key)}, {}

    def logits(self, params: Any, batch_stats: Any, tokens: Any) -> tuple[jax.Array, Any]:
        """Returns the logits of the next token at each position."""
        embedding = params["embedding"].astype(self.dtype)
        return _blocks(self, params, embedding[tokens], causal=True) @ embedding.T, batch_stats


class ViT(Transformer):
    """A vision transformer with patches and a class token."""

    def init(self, key: jax.Array, images: Any) -> tuple[Any, Any]:
        """Returns params, and no statistics."""
        key, *keys = jax.random.split(key, 5)
        patches = (images.shape[1] // PATCH) * (images.shape[2] // PATCH)
        shapes = {
            "patch": (PATCH * PATCH * images.shape[3], self.width),
            "token": (1, 1, self.width),
            "position": (1, patches + 1, self.width),
            "head": (self.width, self.classes),
        }
        own = {name: NORMAL(k, of) for k, (name, of) in zip(keys, shapes.items(), strict=True)}
        return own | _init_blocks(self, key), {}

    def logits(self, params: Any, batch_stats: Any, images: Any) -> tuple[jax.Array, Any]:
        """Returns the logits of the classes."""
        own = {
            name: params[name].astype(self.dtype) for name in ("patch", "token", "position", "head")
        }
        x = _patches(images.astype(self.dtype)) @ own["patch"]
        token = jnp.broadcast_to(own["token"], (len(x), 1, self.width))
        x = jnp.concatenate([token, x], 1) + own["position"]
        return _blocks(self, params, x, causal=False)[:, 0] @ own["head"], batch_stats


def _patches(images: jax.Array) -> jax.Array:
    """Splits images into square patches: (batch, patches, values of a patch)."""
    count, height, width, channels = images.shape
    cut = images.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return jnp.moveaxis(cut, 3, 2).reshape(count, -1, PATCH * PATCH * channels)


def _init_blocks(model: Transformer, key: jax.Array) -> dict[str, Any]:
    width = model.width
    matrices = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }

    def leaves() -> dict[str, jax.Array]:
        bias = {} if model.kind == "rms" else {"bias": jnp.zeros(width)}
        return {"scale": jnp.ones(width), **bias}

    keys = iter(jax.random.split(key, 4 * model.depth))
    blocks = [
        {name: NORMAL(next(keys), of) for name, of in matrices.items()}
        | {"one": leaves(), "two": leaves()}
        for _ in range(model.depth)
    ]
    return {"blocks": blocks, "last": leaves()}


def _blocks(model: Transformer, params: Any, x: jax.Array, causal: bool) -> jax.Array:
    head = min(model.width, HEAD)
    for each in params["blocks"]:
        own = {name: each[name].astype(x.dtype) for name in ("qkv", "out", "up", "down")}
        qkv = model.norm(each["one"], x) @ own["qkv"]
        heads = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, model.width // head, head), 2, 0)
        seen = jax.nn.dot_product_attention(*heads, is_causal=causal)
        x = x + seen.reshape(x.shape) @ own["out"]
        x = x + jax.nn.gelu(model.norm(each["two"], x) @ own["up"]) @ own["down"]
    return model.norm(params["last"], x)
