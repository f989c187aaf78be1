"""Documents of a dictionary and questions about it: the lookup task of Tworkowski et al. 2023."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

KEY_TOKENS = 3
# symbols that a key's first, second and third token, and its value, each have of their own
ALPHABET = 16
KEYS = ALPHABET**KEY_TOKENS
SYMBOLS = ALPHABET * (KEY_TOKENS + 1) + 1
ASKED = SYMBOLS - 1  # stands for the value that is asked for
BYTES = 256


class Documents(NamedTuple):
    """Documents in two contexts: `previous` defines keys, `current` asks for them, reordered.

    Tokens are `(documents, length)`, and `answers`, the values in the order in which they are asked
    for, `(documents, pairs)`.
    """

    previous: Array
    current: Array
    answers: Array


class Lookup(NamedTuple):
    """A source of documents, in which no two keys are alike.

    A definition is a key's tokens and its value, a question the key's tokens and a mark, which the
    value is to follow. The paper's keys and values are of four tokens of one alphabet; here each
    place has its own, so that little is to learn before a key can be told from others.

    Attributes:
      pairs: how many a document defines, and asks for.
      gap: bytes of `text` before each definition and question.
      text: `(bytes,)`, to hide them in.
    """

    pairs: int = 8
    gap: int = 0
    text: Array | None = None

    @property
    def record(self) -> int:
        """The tokens of a definition or a question."""
        return self.gap + KEY_TOKENS + 1

    @property
    def length(self) -> int:
        """The tokens of a context."""
        return self.pairs * self.record

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return SYMBOLS + (BYTES if self.gap else 0)

    def draw(self, key: Array, count: int) -> Documents:
        """Returns `count` documents."""
        of_keys, of_values, of_order, *of_text = jax.random.split(key, 5)
        keys = jax.random.choice(of_keys, KEYS, (count, self.pairs), replace=False)
        places = jnp.arange(KEY_TOKENS)
        tokens = keys[..., None] // ALPHABET**places % ALPHABET + ALPHABET * places
        answers = jax.random.randint(of_values, (count, self.pairs, 1), ASKED - ALPHABET, ASKED)
        pairs = jnp.concatenate([tokens, answers], -1)
        order = jnp.argsort(jax.random.uniform(of_order, (count, self.pairs)))
        asked = jnp.take_along_axis(pairs, order[..., None], axis=1)
        previous = self._hide(of_text[0], pairs)
        current = self._hide(of_text[1], asked.at[..., -1].set(ASKED))
        return Documents(previous, current, asked[..., -1])

    def _hide(self, key: Array, records: Array) -> Array:
        """Returns each document's records in a passage of the text."""
        count = len(records)
        if self.text is not None and self.gap:
            size = self.pairs * self.gap
            starts = jax.random.randint(key, (count, 1), 0, len(self.text) - size + 1)
            passages = self.text[starts + jnp.arange(size)].astype(records.dtype) + SYMBOLS
            records = jnp.concatenate([passages.reshape(count, self.pairs, self.gap), records], -1)
        return records.reshape(count, self.length)

    def read(self, outputs: Array) -> Array:
        """Returns outputs for values, `(documents, pairs, ...)` of `(documents, length, ...)`."""
        return outputs.reshape(len(outputs), self.pairs, self.record, *outputs.shape[2:])[:, :, -1]
