"""Trains a network, folds its batch norms and quantizes what is left."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data
from common.extras import stop_without
from common.study import Advance, Part, Study, environment, table
from common.training import EVALUATION_BATCH, Examples, cross_entropy, examples
from flax import linen as nn
from jax import Array
from rich.table import Table

import normjax as nj

try:
    import qwix
except ImportError as error:
    stop_without(error)

INT8 = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]
MOMENTUM = 0.9  # of SGD, and of the running statistics
SMALL = 16  # pixels: images up to this size are made smaller once, not twice
VARIANTS = {
    "float": "as trained",
    "folded": "no batch norm left",
    "folded, int8": "no batch norm left",
    "int8": "batch norm in float32",
}


class Network(nn.Module):
    """Maps images to logits: three stages of two convolutions with batch norm."""

    width: int

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Returns logits; in training the collection `batch_stats` has to be mutable."""
        small = x.shape[1] <= SMALL
        for stage, strides in enumerate((1, 2, 1 if small else 2)):
            for i in range(2):
                x = nn.Conv(
                    self.width * 2**stage,
                    (3, 3),
                    strides if i == 0 else 1,
                    use_bias=False,
                )(x)
                x = nj.linen.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
                x = nn.relu(x)
        return nn.Dense(data.CLASSES)(x.mean((1, 2)))


class Deployed(NamedTuple):
    """What runs inference, and the bytes of its variables."""

    apply: Callable[..., Any]
    variables: Any

    @property
    def size(self) -> int:
        """The bytes of all variables."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.variables))


class Outcome(NamedTuple):
    """For each variant and one seed: test accuracy, agreement with float, and variables' size."""

    seed: int
    accuracies: dict[str, float]
    as_float: dict[str, float]
    bytes: dict[str, int]


def quantized(network: nn.Module, variables: Any, images: Array) -> Deployed:
    """Returns a module with int8 kernels, and activations rounded to int8 at run time."""
    model = qwix.quantize_model(network, qwix.PtqProvider(INT8))
    wanted = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return Deployed(
        model.apply, {**variables, "params": qwix.quantize_params(variables["params"], wanted)}
    )


def deployed(network: Network, variables: Any, images: Array) -> dict[str, Deployed]:
    """Returns the trained network in each of the variants; `images` are a sample."""
    folded = nj.deploy.fold(network, variables, images, show=False)
    return {
        "float": Deployed(network.apply, variables),
        "folded": Deployed(folded.apply, folded.variables),
        "folded, int8": quantized(*folded.as_linen(), images),
        "int8": quantized(network, variables, images),
    }


class Trainer:
    """A network with its training, compiled once for all seeds."""

    def __init__(self, options: Namespace, train: Examples, test: Examples):
        self.options, self.train, self.test = options, train, test
        self.network, self.labels = Network(options.width), np.asarray(test.labels)
        self.optimizer = optax.sgd(options.learning_rate, MOMENTUM, nesterov=True)
        self._step = jax.jit(self._take_step, donate_argnums=0)

    def run(self, seed: int, advance: Advance) -> Outcome:
        """Trains with a seed and returns the outcome of each variant."""
        rng, state, reported = np.random.default_rng(seed), self._init(seed), 0
        for step in range(1, self.options.steps + 1):
            rows = rng.integers(len(self.train.labels), size=self.options.batch_size)
            state = self._step(state, *self.train.pick(jnp.asarray(rows)))
            if step % self.options.eval_every == 0 or step == self.options.steps:
                right = self.answers(Deployed(self.network.apply, state[0])) == self.labels
                advance(step - reported, f"{right.mean():.1%}")
                reported = step
        variants = deployed(self.network, state[0], self.train.pick(jnp.arange(2))[0])
        answers = {name: self.answers(variant) for name, variant in variants.items()}
        return Outcome(
            seed,
            {name: float((given == self.labels).mean()) for name, given in answers.items()},
            {name: float((given == answers["float"]).mean()) for name, given in answers.items()},
            {name: variant.size for name, variant in variants.items()},
        )

    def answers(self, variant: Deployed) -> np.ndarray:
        """Returns the classes that the test images are given."""
        apply, count = jax.jit(variant.apply), len(self.labels)
        batches = [
            jnp.arange(start, min(start + EVALUATION_BATCH, count))
            for start in range(0, count, EVALUATION_BATCH)
        ]
        logits = [np.asarray(apply(variant.variables, self.test.pick(rows)[0])) for rows in batches]
        return np.concatenate(logits).argmax(-1)

    def _init(self, seed: int) -> tuple[Any, Any]:
        variables = self.network.init(jax.random.key(seed), self.train.pick(jnp.arange(1))[0])
        return variables, self.optimizer.init(variables["params"])

    def _take_step(self, state: tuple[Any, Any], images: Array, labels: Array) -> tuple[Any, Any]:
        variables, optimizer = state

        def loss(params: Any) -> tuple[Array, Any]:
            own = variables | {"params": params}
            logits, updates = self.network.apply(own, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, optimizer = self.optimizer.update(gradients, optimizer)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, optimizer


class Quantize(Study):
    """The seeds of one command line, and what is finished of them."""

    name = "quantize"

    def parts(self) -> Mapping[str, Part]:
        options, images = self.options, data.selected(self.options)
        trainer = Trainer(options, *examples(images, standardize=True))
        return {
            f"seed {seed}": Part(options.steps, partial(trainer.run, seed))
            for seed in range(options.seeds)
        }

    def content(self) -> dict[str, Any]:
        seeds = [outcome._asdict() for outcome in self.results.values()]
        versions = environment()["versions"] | {"qwix": qwix.__version__}
        return {"versions": versions, "seeds": seeds}

    def interrupted(self, parts: int) -> str:
        return f"{len(self.results)} of {parts} seeds are finished."

    def tables(self) -> list[Table]:
        outcomes = list(self.results.values())
        title = f"Test accuracy, median of {len(outcomes)} seed(s)"
        headings = "variant", "", "accuracy", "answers as float", "variables"
        made = table(headings, left=2, title=title)
        for name, description in VARIANTS.items():
            accuracy = median(outcome.accuracies[name] for outcome in outcomes)
            same = median(outcome.as_float[name] for outcome in outcomes)
            size = f"{outcomes[0].bytes[name] / 1024:.0f} KiB"
            made.add_row(name, description, f"{accuracy:.1%}", f"{same:.1%}", size)
        return [made]
