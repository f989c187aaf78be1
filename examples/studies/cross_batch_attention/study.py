"""Trains language models with and without negatives in memory."""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import report
from common.data import DataError
from common.results import medians
from common.study import Advance, Claim, Part, Study, table
from common.training import State, chunks, cross_entropy, descend
from jax import Array
from matplotlib.axes import Axes
from rich.table import Table
from studies.cross_batch_attention.lookup import KEYS, Lookup
from studies.cross_batch_attention.memory import NORMS, LanguageModel, Norm, Tree

CHUNK = 20  # steps between two looks at the accuracy
# The accuracy in training, mean of a chunk, from which a document sees negatives; the paper: 0.98.
SWITCH = 0.95
WARMUP = 40  # steps
TESTED = 32  # documents that are asked at once
TEST_SEED = 1_000_000
TRAININGS = {"crossbatch": True, "own context only": False}
COLOURS = {"crossbatch": "C0", "own context only": "C3"}
LINES = {"layer norm": "-", "RMS norm": "--"}


def seen(documents: int, contexts: int, count: int | Array) -> Array:
    """Returns bool `(documents, contexts)`: a document's context and the next `count - 1`."""
    return (jnp.arange(contexts) - jnp.arange(documents)[:, None]) % contexts < count


def memories(options: Namespace) -> list[int]:
    """Returns the numbers of contexts to test with: powers of 2, and the largest."""
    largest = options.distractors + 1
    return sorted({2**i for i in range(largest.bit_length())} | {largest})


class Trainer:
    """A model with its compiled training and test, for all seeds, with and without negatives."""

    def __init__(self, norm: Norm, lookup: Lookup, options: Namespace):
        self.lookup, self.options = lookup, options
        self.model = LanguageModel(norm, lookup.vocabulary, lookup.length, tuple(options.blocks))
        end = max(options.steps, WARMUP + 1)
        rate = optax.warmup_cosine_decay_schedule(0, options.learning_rate, WARMUP, end)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))
        self._steps = jax.jit(partial(descend, self._loss, self.optimizer))
        self._test = jax.jit(self._ask)

    def run(self, negatives: bool, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains and tests a model. A seed has the same start and documents without negatives.

        Returns the step from which it saw negatives, None if it never did; its accuracy in
        training, mean of the last steps; and by the number of contexts in memory the accuracies of
        retrieval, and the share of the attention to the memory that goes to the own context.
        """
        options, params = self.options, self.model.init(jax.random.key(seed))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), options.steps)
        state, switched, trained = State(params, None, self.optimizer.init(params)), None, 0.0
        for done, steps in chunks(options.steps, CHUNK):
            count = 1 if switched is None else options.contexts
            state, accuracies = self._steps(state, (keys[done : done + steps],), count)
            trained = float(accuracies.mean())
            if negatives and switched is None and trained >= SWITCH:
                switched = done + steps
            advance(steps, f"{trained:.1%}, {count} context{'s' * (count > 1)} in memory")
        accuracies, focus = self.test(state.params)
        run = {"seed": seed, "switched": switched, "trained": trained}
        return run | {"accuracies": accuracies, "focus": focus}

    def test(self, params: Tree) -> tuple[list[float], list[float]]:
        """Returns accuracy and focus by number of contexts, means over `--test-batches` batches."""
        keys = jax.random.split(jax.random.key(TEST_SEED), self.options.test_batches)
        counts = memories(self.options)
        tested = [[self._test(params, key, count) for key in keys] for count in counts]
        return tuple(np.array(tested).mean(1).T.tolist())

    def _loss(
        self, params: Tree, batch_stats: None, key: Array, count: Array
    ) -> tuple[Array, tuple[None, Array]]:
        size = self.options.batch_size
        documents, sees = self.lookup.draw(key, size), seen(size, size, count)
        memory = self.model.remember(params, documents.previous)
        logits, _ = self.model.answer(params, documents.current, memory, sees)
        logits = self.lookup.read(logits)
        accuracy = (logits.argmax(-1) == documents.answers).mean()
        # As in the paper, of the values alone: what is asked cannot be known.
        return cross_entropy(logits, documents.answers).mean(), (None, accuracy)

    def _ask(self, params: Tree, key: Array, count: Array) -> Array:
        """Returns accuracy and focus at the questions with so many contexts in memory."""
        contexts = self.options.distractors + 1
        documents, asked = self.lookup.draw(key, contexts), min(TESTED, contexts)
        memory, sees = self.model.remember(params, documents.previous), seen(asked, contexts, count)
        logits, focus = self.model.answer(params, documents.current[:asked], memory, sees)
        correct = self.lookup.read(logits).argmax(-1) == documents.answers[:asked]
        return jnp.stack([correct.mean(), self.lookup.read(focus).mean()])


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
        options, lookup, parts = self.options, _lookup(self.options), {}
        for norm in options.norms:
            trainer = Trainer(NORMS[norm], lookup, options)
            for training, negatives in TRAININGS.items():
                work = partial(self._run, trainer, negatives)
                parts[f"{norm}, {training}"] = Part(options.seeds * options.steps, work)
        return parts

    def _run(self, trainer: Trainer, negatives: bool, advance: Advance) -> dict[str, Any]:
        runs = [trainer.run(negatives, seed, advance) for seed in range(self.options.seeds)]
        return {"contexts": memories(self.options), "runs": runs}

    def curve(self, name: str, *keys: str) -> list[float]:
        """Returns the medians over seeds, by number of contexts."""
        return medians([run[keys[0]] for run in self.results[name]["runs"]])

    def tables(self) -> list[Table]:
        counts, rows = memories(self.options), []
        chosen = sorted({*range(0, len(counts), 2), len(counts) - 1})
        for name in self.results:
            accuracies, focus = self.curve(name, "accuracies"), self.curve(name, "focus")[-1]
            rows.append((name, *(f"{accuracies[i]:.1%}" for i in chosen), f"{focus:.2f}"))
        seeds = f"median of {self.options.seeds} seed(s)"
        title = f"Accuracy by contexts in memory, and focus in the largest, {seeds}"
        headings = "model", *(str(counts[i]) for i in chosen), "focus"
        return [table(headings, rows, title=title, collapse_padding=True)]

    def claims(self) -> list[Claim]:
        length, most = _lookup(self.options).length, memories(self.options)[-1]
        tokens, training = f"{length * most:,} tokens", f"training on documents of {2 * length}"
        with_negatives, without = (self._last(kind, "accuracies", ".1%") for kind in TRAININGS)
        focus_with, focus = (self._last(kind, "focus", ".2f") for kind in TRAININGS)
        own, even = "attention to the own context among n, without negatives", f"{1 / most:.3f}"
        claims = [
            (
                "accuracy in a memory far larger than documents in training",
                "above 92% of 16M tokens, after training on documents of 512",
                f"{with_negatives} of {tokens}, after {training}",
            ),
            (
                "accuracy without negatives",
                "a transformer trained on 512 tokens fails from 16K on",
                f"{without} of {tokens}",
            ),
            (f"{own} (1/n = {even} for {most})", "about 1/n", focus),
            ("the same, with negatives", "the distraction is mostly alleviated", focus_with),
        ]
        if len(self.options.norms) > 1:
            measured = f"with negatives {with_negatives}"
            claims.append(("layer norm or RMS norm", "not compared", measured))
        return [Claim(*claim) for claim in claims]

    def _last(self, training: str, of: str, form: str) -> str:
        """Returns, with the largest memory, the medians of each normalization in words."""
        names = {norm: f"{norm}, {training}" for norm in self.options.norms}
        finished = {norm: name for norm, name in names.items() if name in self.results}
        last = (f"{self.curve(name, of)[-1]:{form}} ({norm})" for norm, name in finished.items())
        return ", ".join(last) or "-"

    def draw(self, path: Path) -> None:
        counts, title = memories(self.options), "Finding a key among those of other documents"
        with report.figure(path, title, self.caption, size=(9.5, 5)) as ((accuracy, focus),):
            for name in self.results:
                self._draw_curve(accuracy, name, "accuracies", 100)
                self._draw_curve(focus, name, "focus", 1)
            even = [1 / count for count in counts]
            (line,) = focus.plot(counts, even, color="0.5", linewidth=1, label="1/n: evenly spread")
            for axes in (accuracy, focus):
                axes.axvline(self.options.contexts, color="0.5", linestyle=":", linewidth=1.2)
                axes.set_xscale("log", base=2)
                axes.set_xticks(counts, map(str, counts))
                report.dress(axes, None)
                axes.set_xlabel("contexts in memory, one of them the document's own")
            accuracy.set(ylabel="questions answered (%)", ylim=(0, 103))
            focus.set(ylabel="attention to the own context,\nof that to the memory", ylim=(0, 1.03))
            accuracy.legend(fontsize="small", loc="lower left")
            focus.legend(handles=[line], fontsize="small")

    def _draw_curve(self, axes: Axes, name: str, of: str, scale: float) -> None:
        """Draws the medians over the seeds, in a band that spans them."""
        (norm, training), counts = name.split(", "), memories(self.options)
        values = scale * np.array([run[of] for run in self.results[name]["runs"]])
        style = {"marker": "o", "markersize": 3, "color": COLOURS[training], "label": name}
        axes.plot(counts, np.median(values, 0), LINES[norm], **style)
        axes.fill_between(counts, values.min(0), values.max(0), color=COLOURS[training], alpha=0.12)


def _lookup(options: Namespace) -> Lookup:
    """Returns the documents' source; raises an error for too few keys or too little text."""
    lookup = Lookup(options.pairs)
    if options.text is not None:
        content = np.frombuffer(options.text.read_bytes(), np.uint8)
        lookup = lookup._replace(gap=options.gap, text=jnp.asarray(content))
        needed = options.pairs * options.gap
        if len(content) < needed:
            purpose = f"{needed} are needed for {options.pairs} pairs and gaps of {options.gap}"
            raise DataError(f"{options.text}: {len(content)} bytes; {purpose}")
    contexts = {"--batch-size": options.batch_size, "--distractors": options.distractors + 1}
    for flag, count in contexts.items():
        if count * options.pairs > KEYS:
            problem = f"{count} contexts of {options.pairs} keys, but there are only {KEYS} keys"
            raise DataError(f"{flag}: {problem}")
    return lookup
