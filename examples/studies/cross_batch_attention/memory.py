"""A small language model with memory: pure functions, with layer or RMS norm.

    model = LanguageModel(NORMS["RMS norm"], vocabulary, length)
    params = model.init(key)
    memory = model.remember(params, previous)                    # (contexts, length) tokens
    logits, focus = model.answer(params, current, memory, sees)  # sees: bool (documents, contexts)

Each block is `x + attention(N(x))` and then `x + mlp(N(x))`, with N the normalization; queries and
keys are normalized, too, head by head (QK-norm: Henry et al. 2020; Dehghani et al. 2023), so that
N's scales are the temperature of their softmax. In a "local" block attention sees the tokens before
it in its own context, with a bias for each distance (Raffel et al. 2020). In a "memory" block it
sees these and, in the same softmax, all tokens of those contexts of the memory that its document
`sees` (Tworkowski et al. 2023, appendix on crossbatch), wherever they stand: there are no positions
in these blocks, as in that paper's smaller models.

Training and inference differ in nothing but `sees`. In training the memory is the previous contexts
of the batch, and a document sees its own and d - 1 others, its negatives. The gradient goes through
all of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import normjax as nj

Tree = dict[str, Any]
Pairs = tuple[Array, Array]  # keys and values, each (contexts, length, heads, features)

WIDTH, HEADS, EXPANSION = 64, 4, 2
BLOCKS = ("local", "memory")
NEAR = 5.0  # the bias with which head h of a local block starts for the token that is h before


class Norm(NamedTuple):
    """A normalization of the last axis without statistics."""

    init: Callable[[int], tuple[Tree, Tree]]
    apply: Callable[[Tree, Tree, Array, bool], tuple[Array, Tree]]

    def __call__(self, params: Tree, x: Array) -> Array:
        """Returns `x` normalized."""
        return self.apply(params, {}, x, True)[0]


NORMS = {
    "layer norm": Norm(nj.layer_norm_init, nj.layer_norm),
    "RMS norm": Norm(nj.rms_norm_init, nj.rms_norm),
}


class LanguageModel(NamedTuple):
    """A decoder for contexts of `length` tokens. Each of `blocks` is "local" or "memory"."""

    norm: Norm
    vocabulary: int
    length: int
    blocks: tuple[str, ...] = BLOCKS

    def init(self, key: Array) -> Tree:
        """Returns the parameters."""
        embedding, logits, *keys = jax.random.split(key, 2 + len(self.blocks))
        blocks = [self._init_block(kind, key) for kind, key in zip(self.blocks, keys, strict=True)]
        return {
            "embedding": jax.random.normal(embedding, (self.vocabulary, WIDTH)),
            "blocks": blocks,
            "norm": self.norm.init(WIDTH)[0],
            "logits": _dense(logits, WIDTH, self.vocabulary),
        }

    def _init_block(self, kind: str, key: Array) -> Tree:
        norms = {"attention_norm": WIDTH, "mlp_norm": WIDTH}
        norms |= {"query_norm": WIDTH // HEADS, "key_norm": WIDTH // HEADS}
        params: Tree = {name: self.norm.init(size)[0] for name, size in norms.items()}
        shapes = {
            "queries_keys_values": (WIDTH, 3 * WIDTH),
            "output": (WIDTH, WIDTH),
            "up": (WIDTH, EXPANSION * WIDTH),
            "down": (EXPANSION * WIDTH, WIDTH),
        }
        for own, (name, shape) in zip(jax.random.split(key, 4), shapes.items(), strict=True):
            params[name] = _dense(own, *shape)
        if kind == "local":
            # From zeros, finding out that the last few tokens matter takes most of the training.
            params["distances"] = NEAR * jnp.eye(HEADS, self.length)
        return params

    def remember(self, params: Tree, tokens: Array) -> list[Pairs]:
        """Returns keys and values of each memory block for contexts `(contexts, length)`."""
        return self._run(params, tokens, None)[1]

    def answer(
        self, params: Tree, tokens: Array, memory: list[Pairs], sees: Array
    ) -> tuple[Array, Array]:
        """Reads current contexts `(documents, length)` with a memory from `remember`.

        A document's own previous context has its place: the first is the first document's. `sees`
        is bool `(documents, contexts)`. Returns logits `(documents, length, vocabulary)`; and of
        the attention that goes to the memory the share of a document's own context, r_d in the
        paper, `(documents, length)`, mean of the heads of the last memory block.
        """
        logits, _, focus = self._run(params, tokens, (memory, sees))
        return logits, focus

    def _run(
        self, params: Tree, tokens: Array, recalled: tuple[list[Pairs], Array] | None
    ) -> tuple[Array, list[Pairs], Array]:
        x, remembered, focus = params["embedding"][tokens], [], jnp.ones(tokens.shape)
        for kind, block in zip(self.blocks, params["blocks"], strict=True):
            queries, keys, values = self._queries_keys_values(block, x)
            scores = _local_scores(queries, keys, block.get("distances"))
            if kind == "memory" and recalled is not None:
                memory, sees = recalled
                attended, focus = _attend(queries, scores, values, memory[len(remembered)], sees)
            else:
                attended = jnp.einsum("bhqk,bkhf->bqhf", jax.nn.softmax(scores), values)
            if kind == "memory":
                remembered.append((keys, values))
            x = x + attended.reshape(x.shape) @ block["output"]
            x = x + jax.nn.gelu(self.norm(block["mlp_norm"], x) @ block["up"]) @ block["down"]
        return self.norm(params["norm"], x) @ params["logits"], remembered, focus

    def _queries_keys_values(self, block: Tree, x: Array) -> tuple[Array, Array, Array]:
        normalized = self.norm(block["attention_norm"], x) @ block["queries_keys_values"]
        heads = normalized.reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        queries, keys, values = jnp.moveaxis(heads, 2, 0)
        queries = self.norm(block["query_norm"], queries) * queries.shape[-1] ** -0.5
        return queries, self.norm(block["key_norm"], keys), values


def _local_scores(queries: Array, keys: Array, distances: Array | None) -> Array:
    """Returns `(documents, heads, length, length)`: -inf for the tokens to come."""
    places = jnp.arange(queries.shape[1])
    back = places[:, None] - places
    scores = jnp.einsum("bqhf,bkhf->bhqk", queries, keys)
    if distances is not None:
        scores = scores + distances[:, jnp.maximum(back, 0)]
    return jnp.where(back >= 0, scores, -jnp.inf)


def _attend(
    queries: Array, scores: Array, values: Array, memory: Pairs, sees: Array
) -> tuple[Array, Array]:
    """Returns the attention's output, and its weight on the document's own previous context."""
    keys, remembered = memory
    far = jnp.einsum("bqhf,ckhf->bhqck", queries, keys)
    far = jnp.where(sees[:, None, None, :, None], far, -jnp.inf)
    both = jnp.concatenate([scores, far.reshape(*scores.shape[:3], -1)], -1)
    near, far = jnp.split(jax.nn.softmax(both), [scores.shape[-1]], axis=-1)
    far = far.reshape(*scores.shape[:3], *keys.shape[:2])
    attended = jnp.einsum("bhqk,bkhf->bqhf", near, values)
    attended = attended + jnp.einsum("bhqck,ckhf->bqhf", far, remembered)
    own = jnp.einsum("bhqbk->bhq", far[:, :, :, : len(far)])
    return attended, (own / far.sum((-2, -1))).mean(1)


def _dense(key: Array, inputs: int, outputs: int) -> Array:
    return jax.random.normal(key, (inputs, outputs)) * inputs**-0.5
