"""The rows of the benchmark: layer, mode and array, and the bytes that must move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

Mode = Literal["forward", "backward", "forward+backward", "evaluation"]
Layer = Literal["batch", "layer", "rms", "group", "instance"]
Then = Literal["", "relu", "add+relu"]
Shape = tuple[int, ...]

MOMENTUM, EPSILON, GROUPS = 0.9, 1e-5, 32
DTYPES = ("float32", "bfloat16")
TRAINED: tuple[Mode, ...] = ("forward", "backward", "forward+backward")


class Case(NamedTuple):
    """One row: a layer with channels last in one of its modes, and the layers after it."""

    layer: Layer
    mode: Mode
    shape: tuple[int, ...]
    dtype: str
    then: Then = ""
    devices: int = (
        1  # the number of devices that share the batch and the statistics of a batch norm
    )
    masked: bool = False  # some examples are padding, a different number on each device

    @property
    def train(self) -> bool:
        """Returns whether the layer is in training mode."""
        return self.mode != "evaluation"

    @property
    def differentiated(self) -> bool:
        """Returns whether there is a backward pass."""
        return self.mode in ("backward", "forward+backward")

    @property
    def features(self) -> int:
        """Returns the size of the last axis."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of x."""
        return math.prod(self.shape) * np.dtype(storage(self.dtype)).itemsize

    @property
    def name(self) -> str:
        """Returns the name of the row in tables and comparisons."""
        kind = " + ".join([f"{self.layer} norm", *filter(None, [self.then.replace("+", ", ")])])
        sync = f", {self.devices} devices" if self.devices > 1 else ""
        mask = ", masked" if self.masked else ""
        return f"{kind} {self.mode} {'x'.join(map(str, self.shape))} {self.dtype}{sync}{mask}"


def storage(dtype: str) -> type:
    """Returns the NumPy dtype with this name."""
    return {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[dtype]


def arrays_moved(case: Case) -> int:
    """Returns the minimal number of arrays of x's size that must move to or from memory.

    A batch norm must read all of x before it can normalize any element, so it reads x twice; the
    other layers reduce over parts that fit into caches. The backward pass reads x and the gradient
    of y, and reads both again for the gradient of x. A ReLU moves nothing. A residual is read; its
    backward pass reads y for the sign of the ReLU, and its gradient is written once and read in
    place of the gradient of y.
    """
    residual = case.then == "add+relu"
    reads = 2 if case.layer == "batch" and case.train else 1
    forward = reads + 1 + residual
    backward = 2 * reads + 1 + 2 * residual
    passes = {"backward": backward, "forward+backward": forward + backward}
    return passes.get(case.mode, forward)


def shapes(case: Case) -> dict[str, tuple[Shape, Any]]:
    """Returns the shapes and dtypes of a case's operands.

    They are x, the cotangent of y, the residual, the mask, the leaves of the layer, and running
    statistics.
    """
    leaf, array = ((case.features,), np.float32), (case.shape, storage(case.dtype))
    found = {"x": array, "scale": leaf, "bias": leaf, "mean": leaf, "var": leaf}
    if case.differentiated:
        found["cotangent"] = array
    if case.then == "add+relu":
        found["residual"] = array
    if case.masked:
        found["mask"] = ((case.shape[0], *(1 for _ in case.shape[1:])), np.bool_)
    if case.layer == "rms":
        del found["bias"]
    return found


def operands(case: Case) -> dict[str, np.ndarray]:
    """Returns the operands of a case, with the names and shapes of `shapes`.

    All values are exact in bfloat16, so they do not depend on the dtype in which a peer stores its
    parameters.
    """
    rng = np.random.default_rng(0)

    def drawn(shift: float) -> np.ndarray:
        some = (rng.standard_normal(min(math.prod(case.shape), 1_000_003)) + shift).astype(
            storage(case.dtype)
        )
        return np.resize(some, case.shape)

    def leaf(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, case.features).astype(ml_dtypes.bfloat16).astype(np.float32)

    values: dict[str, Callable[[], np.ndarray]] = {
        "x": lambda: drawn(0.5),
        "scale": lambda: leaf(0.5, 1.5),
        "bias": lambda: leaf(-1, 1),
        "mean": lambda: leaf(0, 1),
        "var": lambda: leaf(0.5, 2),
        "cotangent": lambda: drawn(0),
        "residual": lambda: drawn(0),
        "mask": lambda: rng.random(shapes(case)["mask"][0]) < 0.7,
    }
    return {name: values[name]() for name in shapes(case)}


def suite(name: str) -> list[Case]:
    """Returns the rows of a suite, the most important first; sync runs on 8 devices."""
    suites = {
        "tiny": _tiny,
        "cpu": _cpu,
        "gpu": _gpu,
        "sync": _sync,
        "gpu_static": _gpu_static,
    }
    return list(dict.fromkeys(suites[name]()))


def _tiny() -> Iterator[Case]:
    both: tuple[Mode, ...] = ("forward+backward", "forward")
    yield Case("batch", "evaluation", (4, 3, 3, 32), "float32")
    for then in ("", "relu", "add+relu"):
        yield Case("batch", "forward+backward", (4, 3, 3, 32), "bfloat16", then)
    yield from (Case("batch", mode, (4, 3, 3, 32), "float32") for mode in both)
    yield from (Case(layer, both[0], (4, 6, 64), "float32") for layer in ("layer", "rms"))
    yield from (Case(layer, both[0], (4, 3, 3, 64), "bfloat16") for layer in ("group", "instance"))


def _cpu() -> Iterator[Case]:
    yield from _resnet50(
        [
            (32, 56, 56, 64),
            (32, 28, 28, 512),
            (32, 14, 14, 1024),
            (32, 7, 7, 2048),
            (32, 56, 56, 256),
        ]
    )
    yield from _fused((32, 28, 28, 512))
    yield from _others((32, 197, 768), (1, 2048, 4096), (32, 28, 28, 512))
    yield from _resnet50([(64, 32, 32, 64), (256, 14, 14, 256)])


def _gpu() -> Iterator[Case]:
    stages = ((56, 256), (112, 64), (28, 512), (14, 1024), (7, 2048))
    usual = ("bfloat16",)
    yield from _resnet50([(256, 56, 56, 256)])
    yield from _others((256, 197, 768), (8, 2048, 4096), (64, 56, 56, 256), usual)
    yield from _fused((256, 56, 56, 256), usual)
    yield from _resnet50([(256, size, size, channels) for size, channels in stages[1:]], usual)
    yield from _resnet50([(32, size, size, channels) for size, channels in stages], usual)
    yield from _others((256, 197, 768), (8, 2048, 4096), (64, 56, 56, 256))
    yield from _fused((256, 56, 56, 256))
    yield from _resnet50(
        [(batch, size, size, channels) for batch in (256, 32, 64, 128) for size, channels in stages]
    )


def _sync() -> Iterator[Case]:
    modes: tuple[Mode, ...] = ("forward+backward", "forward")
    for shape, mode, dtype in product(
        [(64, 28, 28, 128), (64, 14, 14, 256), (64, 7, 7, 512)], modes, DTYPES
    ):
        yield Case("batch", mode, shape, dtype, devices=8)


def _gpu_static() -> Iterator[Case]:
    """Yields rows whose programs are read but not run.

    Only batch norm has a different program in evaluation. Each of the 8 devices of a synced row has
    as many examples as the single device of the row without sync.
    """
    image, main = (64, 28, 28, 512), (128, 28, 28, 512)
    rows: list[tuple[Layer, Shape]] = [
        ("layer", (8192, 4096)),
        ("rms", (8192, 4096)),
        ("layer", (256, 197, 768)),
        ("group", image),
        ("instance", image),
        ("batch", main),
    ]
    for dtype, (layer, shape), mode in product(reversed(DTYPES), rows, TRAINED):
        yield Case(layer, mode, shape, dtype)
    stages = ((112, 64), (56, 256), (28, 512), (14, 1024), (7, 2048))
    for (size, channels), mode in product(stages, (*TRAINED, "evaluation")):
        yield Case("batch", mode, (128, size, size, channels), "bfloat16")
    shared = (8 * 128, 28, 28, 512)
    both: tuple[Mode, ...] = ("forward", "forward+backward")
    for dtype, mode in product(reversed(DTYPES), both):
        yield Case("batch", mode, shared, dtype, devices=8)
    for mode in both:
        yield Case("batch", mode, shared, "bfloat16", devices=8, masked=True)


def _resnet50(shapes: list[Shape], dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """Yields batch norms at the outputs of the stages of ResNet-50."""
    modes: tuple[Mode, ...] = ("forward+backward", "forward", "evaluation")
    yield from (
        Case("batch", mode, shape, dtype) for shape, mode, dtype in product(shapes, modes, dtypes)
    )


def _fused(shape: Shape, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    modes: tuple[Mode, ...] = ("forward+backward", "forward", "evaluation")
    thens: tuple[Then, ...] = ("relu", "add+relu")
    yield from (
        Case("batch", mode, shape, dtype, then)
        for then, mode, dtype in product(thens, modes, dtypes)
    )


def _others(
    vit: Shape, language: Shape, image: Shape, dtypes: tuple[str, ...] = DTYPES
) -> Iterator[Case]:
    """Yields layer and RMS norm in transformers, group and instance norm on images."""
    rows: list[tuple[Layer, Shape]] = [
        ("layer", vit),
        ("rms", language),
        ("layer", language),
        ("group", image),
    ]
    rows.append(("instance", image))
    modes: tuple[Mode, ...] = ("forward+backward", "forward")
    yield from (
        Case(layer, mode, shape, dtype)
        for mode, dtype, (layer, shape) in product(modes, dtypes, rows)
    )
