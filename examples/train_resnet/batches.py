"""Loads each process's part of every global batch, with grain.

Order and randomness only depend on the seed and on an example's position in the run, which is the
number of examples before it. So the batches do not depend on the number of processes that load
them, and a run can be continued from any position.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from absl import flags
from common.data import DataError
from common.extras import stop_without

from train_resnet import loader
from train_resnet.sources import Source

try:
    import grain
except ImportError as error:
    stop_without(error)

LOADER_DIED = "Worker process was terminated"  # part of grain's error

# image (batch, height, width, 3) uint8, label (batch,) int32, weight (batch,) float32
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """The rows of a global batch that a process loads: part `index` of `count` equal parts."""

    batch_size: int
    index: int
    count: int

    @property
    def rows(self) -> int:
        """Returns the number of rows that a process loads."""
        return self.batch_size // self.count

    def position(self, element: int) -> int:
        """Returns the position in the run of example number `element` of this process."""
        batch, row = divmod(element, self.rows)
        return batch * self.batch_size + self.index * self.rows + row


class _Load(grain.transforms.Map):
    """Loads the example at a position."""

    def __init__(self, source: Source, part: Part, seed: int | None, start: int):
        self.source, self.part, self.seed, self.start = source, part, seed, start

    def map(self, element: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]: grain says None
        """Returns the example."""
        position, size = self.start + self.part.position(int(element)), len(self.source)
        if self.seed is None:
            # Evaluation is in order; the last batch is padded with examples that do not count.
            image, label = self.source.load(min(position, size - 1), None)
            return _example(image, label, float(position < size))
        epoch, place = divmod(position, size)
        index = int(_order(self.seed, epoch, size)[place])
        image, label = self.source.load(index, np.random.default_rng((self.seed, 1, position)))
        return _example(image, label, 1.0)


def _example(image: np.ndarray, label: int, weight: float) -> Batch:
    return {
        "image": np.ascontiguousarray(image),
        "label": np.int32(label),
        "weight": np.float32(weight),
    }  # pyright: ignore


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


def training(
    source: Source, part: Part, seed: int, start: int, stop: int, workers: int
) -> Generator[Batch, None, None]:
    """Yields this process's parts of the batches between two positions in the run."""
    return _iterate(_Load(source, part, seed, start), (stop - start) // part.batch_size, workers)


def evaluation(source: Source, part: Part, workers: int) -> Generator[Batch, None, None]:
    """Yields this process's parts of batches with every example once."""
    return _iterate(_Load(source, part, None, 0), -(-len(source) // part.batch_size), workers)


def _iterate(load: _Load, batches: int, workers: int) -> Generator[Batch, None, None]:
    rows = load.part.rows
    examples = grain.MapDataset.range(batches * rows).map(load).batch(rows)
    dataset = examples.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        flags.FLAGS.mark_as_parsed()  # grain's own flags, with their current values
        loader.prepare()
        options = grain.multiprocessing.MultiprocessingOptions(workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=loader.start)
    iterator = iter(dataset)
    try:
        yield from iterator
    except RuntimeError as error:
        if LOADER_DIED not in str(error):
            raise
        raise DataError(f"a process that loads data (--workers) has died: {error}") from error
    finally:
        iterator.close()
