"""Trains language models with and without negatives in memory, for `cross_batch_attention.py`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from jax import Array, lax
from rich.table import Table

from common import report
from common.data import DataError
from common.interrupt import Interrupt
from common.lookup import KEYS, Lookup
from common.memory import NORMS, LanguageModel, Norm, Tree
from common.session import Advance, Part
from common.study import Claim, Study, conduct

CHUNK = 20  # steps between two looks at the accuracy
# the accuracy in training, mean of a chunk, from which a document sees negatives; the paper has
# 0.98
SWITCH = 0.95
WARMUP = 40  # steps
TESTED = 32  # documents that are asked at once
TEST_SEED = 1_000_000
TRAININGS = {"crossbatch": True, "own context only": False}
COLOURS, LINES = (
    dict(zip(TRAININGS, ("C0", "C3"), strict=True)),
    dict(zip(NORMS, ("-", "--"), strict=True)),
)


class Run(NamedTuple):
    """One model with one seed.

    Attributes:
      switched: the step from which it saw negatives, None if it never did.
      trained: its accuracy in training, mean of the last steps.
      accuracies: of retrieval, by the number of contexts in memory.
      focus: the share of the attention to the memory that goes to the own context, likewise.
    """

    seed: int
    switched: int | None
    trained: float
    accuracies: list[float]
    focus: list[float]


def seen(documents: int, contexts: int, count: int | Array) -> Array:
    """Returns bool `(documents, contexts)`: a document's context and the next `count - 1`."""
    return (jnp.arange(contexts) - jnp.arange(documents)[:, None]) % contexts < count


class Trainer:
    """A model with its compiled training and test, for all seeds, with and without negatives."""

    def __init__(self, norm: Norm, lookup: Lookup, options: Namespace):
        self.lookup, self.options = lookup, options
        self.model = LanguageModel(norm, lookup.vocabulary, lookup.length, tuple(options.blocks))
        rate = optax.warmup_cosine_decay_schedule(
            0, options.learning_rate, WARMUP, max(options.steps, WARMUP + 1)
        )
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))
        self._steps, self._test = jax.jit(self._take_steps), jax.jit(self._ask)

    def run(self, negatives: bool, seed: int, advance: Advance) -> Run:
        """Trains and tests a model. A seed has the same start and documents without negatives."""
        options, params = self.options, self.model.init(jax.random.key(seed))
        state, switched, trained, done = (params, self.optimizer.init(params)), None, 0.0, 0
        for keys in _chunks(seed, options.steps):
            count = 1 if switched is None else options.contexts
            state, accuracy = self._steps(state, keys, count)
            done, trained = done + len(keys), float(accuracy)
            if negatives and switched is None and trained >= SWITCH:
                switched = done
            advance(len(keys), f"{trained:.1%}, {count} context{'s' * (count > 1)} in memory")
        return Run(seed, switched, trained, *self.test(state[0]))

    def test(self, params: Tree) -> tuple[list[float], list[float]]:
        """Returns accuracy and focus by number of contexts, means over `--test-batches` batches."""
        keys = jax.random.split(jax.random.key(TEST_SEED), self.options.test_batches)
        tested = np.array(
            [[self._test(params, key, count) for key in keys] for count in memories(self.options)]
        )
        return tuple(tested.mean(1).T.tolist())

    def _take_steps(
        self, state: tuple[Any, Any], keys: Array, count: Array
    ) -> tuple[tuple[Any, Any], Array]:
        """Takes a step for each key, and returns the mean of their accuracies."""

        def loss(params: Tree, key: Array) -> tuple[Array, Array]:
            size = self.options.batch_size
            documents = self.lookup.draw(key, size)
            memory = self.model.remember(params, documents.previous)
            logits, _ = self.model.answer(
                params, documents.current, memory, seen(size, size, count)
            )
            logits = self.lookup.read(logits)
            # As in the paper, of the values alone: what is asked cannot be known.
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, documents.answers)
            return losses.mean(), (logits.argmax(-1) == documents.answers).mean()

        def step(state: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
            params, optimizer = state
            gradients, accuracy = jax.grad(loss, has_aux=True)(params, key)
            updates, optimizer = self.optimizer.update(gradients, optimizer)
            return (optax.apply_updates(params, updates), optimizer), accuracy

        state, accuracies = lax.scan(step, state, keys)
        return state, accuracies.mean()

    def _ask(self, params: Tree, key: Array, count: Array) -> Array:
        """Returns accuracy and focus at the questions with so many contexts in memory."""
        contexts = self.options.distractors + 1
        documents = self.lookup.draw(key, contexts)
        asked = min(TESTED, contexts)
        memory = self.model.remember(params, documents.previous)
        logits, focus = self.model.answer(
            params, documents.current[:asked], memory, seen(asked, contexts, count)
        )
        correct = self.lookup.read(logits).argmax(-1) == documents.answers[:asked]
        return jnp.stack([correct.mean(), self.lookup.read(focus).mean()])


def memories(options: Namespace) -> list[int]:
    """Returns the numbers of contexts to test with: powers of 2, and the largest."""
    largest = options.distractors + 1
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


def _chunks(seed: int, steps: int) -> Iterator[Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
    for start in range(0, steps, CHUNK):
        yield keys[start : start + CHUNK]


def run(options: Namespace, interrupt: Interrupt) -> int:
    """Trains the models of the command line and reports; returns the exit status."""
    return conduct(CrossBatch(options), interrupt)


class CrossBatch(Study):
    """Retrieval among distractors, with and without negatives in training, by normalization."""

    name = "cross_batch_attention"
    source = "Tworkowski et al. 2023 (Focused Transformer)"
    caption = (
        "What to see: at the left edge, the memory only has the document's own context, and all"
        " models find the value. To the right, contexts of other documents are added. Without"
        " negatives in training, attention spreads over all of them and the value is lost; with"
        " negatives it is still found among many more than in training (dotted). Bands span the"
        " seeds."
    )

    def parts(self) -> Mapping[str, Part]:
        """Returns a run of all seeds for each normalization, with and without negatives."""
        options, lookup = self.options, _lookup(self.options)
        parts = {}
        for norm in options.norms:
            trainer = Trainer(NORMS[norm], lookup, options)
            for training, negatives in TRAININGS.items():
                work = partial(self._run, trainer, negatives)
                parts[f"{norm}, {training}"] = Part(options.seeds * options.steps, work)
        return parts

    def _run(self, trainer: Trainer, negatives: bool, advance: Advance) -> dict[str, Any]:
        runs = [
            trainer.run(negatives, seed, advance)._asdict() for seed in range(self.options.seeds)
        ]
        return {"contexts": memories(self.options), "runs": runs}

    def tables(self) -> Sequence[Table]:
        """Returns the accuracy by model and number of contexts."""
        counts = memories(self.options)
        chosen = sorted({*range(0, len(counts), 2), len(counts) - 1})
        seeds = f"median of {self.options.seeds} seed(s)"
        title = f"Accuracy by contexts in memory, and focus in the largest, {seeds}"
        shown = Table(title=title, title_justify="left")
        shown.box, shown.pad_edge, shown.collapse_padding = rich.box.SIMPLE_HEAD, False, True
        shown.add_column("model", no_wrap=True)
        for heading in (*(str(counts[i]) for i in chosen), "focus"):
            shown.add_column(heading, justify="right", no_wrap=True)
        for name, result in self.results.items():
            accuracies, focus = (_medians(result["runs"], of) for of in ("accuracies", "focus"))
            shown.add_row(name, *(f"{accuracies[i]:.1%}" for i in chosen), f"{focus[-1]:.2f}")
        return [shown]

    def claims(self) -> Sequence[Claim]:
        """Returns what can be said of the models that are finished."""
        options = self.options
        trained, most = 2 * _lookup(options).length, memories(options)[-1]
        largest = f"{_lookup(options).length * most:,} tokens"
        accuracy = self._by_training("accuracies", "{:.1%}")
        focus = self._by_training("focus", "{:.2f}")
        claims = [
            Claim(
                "accuracy in a memory far larger than documents in training",
                "above 92% of 16M tokens, after training on documents of 512",
                f"{accuracy['crossbatch']} of {largest}, after training on documents of {trained}",
            ),
            Claim(
                "accuracy without negatives",
                "a transformer trained on 512 tokens fails from 16K on",
                f"{accuracy['own context only']} of {largest}",
            ),
            Claim(
                "attention to the own context among n, without negatives "
                f"(1/n = {1 / most:.3f} for {most})",
                "about 1/n",
                focus["own context only"],
            ),
            Claim(
                "the same, with negatives",
                "the distraction is mostly alleviated",
                focus["crossbatch"],
            ),
        ]
        if len(options.norms) > 1:
            claims.append(
                Claim(
                    "layer norm or RMS norm",
                    "not compared",
                    f"with negatives {accuracy['crossbatch']}",
                )
            )
        return claims

    def _by_training(self, of: str, form: str) -> dict[str, str]:
        """Returns, with the largest memory, the medians of each normalization in words."""
        words = {}
        for training in TRAININGS:
            runs = {norm: self.results.get(f"{norm}, {training}") for norm in self.options.norms}
            values = {
                norm: form.format(_medians(of_norm["runs"], of)[-1])
                for norm, of_norm in runs.items()
                if of_norm
            }
            words[training] = (
                ", ".join(f"{value} ({norm})" for norm, value in values.items()) or "-"
            )
        return words

    def draw(self, path: Path) -> None:
        """Draws accuracy and focus against the number of contexts in memory."""
        counts = memories(self.options)
        title = "Finding a key among those of other documents"
        with report.figure(path, title, self.caption, size=(9.5, 5)) as grid:
            accuracy, focus = grid[0]
            for name, result in self.results.items():
                norm, training = name.split(", ")
                style = {"color": COLOURS[training], "linestyle": LINES[norm]}
                for axes, of, scale in ((accuracy, "accuracies", 100), (focus, "focus", 1)):
                    values = scale * np.array([run[of] for run in result["runs"]])
                    axes.plot(
                        counts, np.median(values, 0), marker="o", markersize=3, label=name, **style
                    )
                    axes.fill_between(
                        counts, values.min(0), values.max(0), color=style["color"], alpha=0.12
                    )
            accuracy.set(ylabel="questions answered (%)", ylim=(0, 103))
            focus.set(ylabel="attention to the own context,\nof that to the memory", ylim=(0, 1.03))
            for axes in (accuracy, focus):
                axes.axvline(self.options.contexts, color="0.5", linestyle=":", linewidth=1.2)
                axes.set_xscale("log", base=2)
                axes.set_xticks(counts, map(str, counts))
                axes.set_xlabel("contexts in memory, one of them the document's own")
                axes.grid(alpha=0.3)
            focus.plot(
                counts,
                [1 / count for count in counts],
                color="0.5",
                linewidth=1,
                label="1/n: evenly spread",
            )
            accuracy.legend(fontsize="small", loc="lower left")
            focus.legend(handles=focus.get_lines()[-1:], fontsize="small")


def _medians(runs: Sequence[Mapping[str, Any]], of: str) -> list[float]:
    return [median(values) for values in zip(*(run[of] for run in runs), strict=True)]


def _lookup(options: Namespace) -> Lookup:
    """Returns the documents' source; raises an error for too few keys or too little text."""
    lookup = Lookup(options.pairs)
    if options.text is not None:
        content = np.frombuffer(options.text.read_bytes(), np.uint8)
        lookup = lookup._replace(gap=options.gap, text=jnp.asarray(content))
        if len(content) < options.pairs * options.gap:
            needed = f"{options.pairs * options.gap} are needed"
            purpose = f"for {options.pairs} pairs and gaps of {options.gap}"
            raise DataError(f"{options.text}: {len(content)} bytes; {needed} {purpose}")
    for flag, contexts in (
        ("--batch-size", options.batch_size),
        ("--distractors", options.distractors + 1),
    ):
        if contexts * options.pairs > KEYS:
            raise DataError(
                f"{flag}: {contexts} contexts of {options.pairs} keys, "
                f"but there are only {KEYS} keys"
            )
    return lookup
