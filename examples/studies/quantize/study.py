"""Trains a network, folds its batch norms and quantizes what is left."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from common import data
from common.study import Advance, Part, Study, environment, table
from common.training import EVALUATION_BATCH, Examples, chunks, cross_entropy, examples
from flax import linen as nn
from jax import Array
from rich.table import Table

import normjax as nj

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
        last = 1 if x.shape[1] <= SMALL else 2
        for stage, first in enumerate((1, 2, last)):
            for stride in (first, 1):
                x = nn.Conv(self.width * 2**stage, (3, 3), stride, use_bias=False)(x)
                x = nj.linen.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
                x = nn.relu(x)
        return nn.Dense(data.CLASSES)(x.mean((1, 2)))


class Deployed(NamedTuple):
    """What runs inference, and its variables."""

    apply: Callable[..., Any]
    variables: Any

    @property
    def size(self) -> int:
        """The bytes of all variables."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.variables))


def quantized(network: nn.Module, variables: Any, images: Array) -> Deployed:
    """Returns a module with int8 kernels, and activations rounded to int8 at run time."""
    model = qwix.quantize_model(network, qwix.PtqProvider(INT8))
    wanted = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = qwix.quantize_params(variables["params"], wanted)
    return Deployed(model.apply, {**variables, "params": params})


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

    def run(self, seed: int, advance: Advance) -> dict[str, Any]:
        """Trains, and returns each variant's accuracy, agreement with float, and bytes."""
        rng, options = np.random.default_rng(seed), self.options
        sample, _ = self.train.pick(slice(1))
        variables = self.network.init(jax.random.key(seed), sample)
        state = variables, self.optimizer.init(variables["params"])
        for _, steps in chunks(options.steps, options.eval_every):
            for rows in rng.integers(len(self.train.labels), size=(steps, options.batch_size)):
                state = self._step(state, *self.train.pick(jnp.asarray(rows)))
            right = self.answers(Deployed(self.network.apply, state[0])) == self.labels
            advance(steps, f"{right.mean():.1%}")
        made = deployed(self.network, state[0], self.train.pick(slice(2))[0])
        answers = {name: self.answers(variant) for name, variant in made.items()}
        return {
            "seed": seed,
            "accuracies": {name: share(given == self.labels) for name, given in answers.items()},
            "as_float": {name: share(each == answers["float"]) for name, each in answers.items()},
            "bytes": {name: variant.size for name, variant in made.items()},
        }

    def answers(self, variant: Deployed) -> np.ndarray:
        """Returns the classes that the test images are given."""
        apply, starts = jax.jit(variant.apply), range(0, len(self.labels), EVALUATION_BATCH)
        batches = (self.test.pick(slice(i, i + EVALUATION_BATCH))[0] for i in starts)
        logits = [np.asarray(apply(variant.variables, images)) for images in batches]
        return np.concatenate(logits).argmax(-1)

    def _take_step(self, state: tuple[Any, Any], images: Array, labels: Array) -> tuple[Any, Any]:
        variables, optimizer = state

        def loss(params: Any) -> tuple[Array, Any]:
            own = variables | {"params": params}
            logits, updates = self.network.apply(own, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, labels).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, optimizer = self.optimizer.update(gradients, optimizer)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, optimizer


def share(right: np.ndarray) -> float:
    """Returns how many are true, from 0 to 1."""
    return float(right.mean())


class Quantize(Study):
    """The seeds of one command line, and what is finished of them."""

    name, unit = "quantize", "seeds"

    def parts(self) -> Mapping[str, Part]:
        images = examples(data.selected(self.options), standardize=True)
        return self.seeds_apart(Trainer(self.options, *images).run)

    def content(self) -> dict[str, Any]:
        versions = environment()["versions"] | {"qwix": qwix.__version__}
        return {"versions": versions, "seeds": list(self.results.values())}

    def tables(self) -> list[Table]:
        runs, rows = list(self.results.values()), []
        for name, description in VARIANTS.items():
            accuracy, same = (
                f"{median(run[of][name] for run in runs):.1%}" for of in ("accuracies", "as_float")
            )
            size = f"{runs[0]['bytes'][name] / 1024:.0f} KiB"
            rows.append((name, description, accuracy, same, size))
        headings = "variant", "", "accuracy", "answers as float", "variables"
        return [table(headings, rows, 2, f"Test accuracy, median of {len(runs)} seed(s)")]
