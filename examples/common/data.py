"""Real images: scikit-learn's digits, and MNIST and CIFAR-10 in their official file formats."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

CLASSES = 10
TITLES = {"digits": "Digits", "mnist": "MNIST", "cifar10": "CIFAR-10"}
IDX_IMAGES, IDX_LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
DIGITS_TEST = 500  # of 1,797: an evaluation is good to 0.2 points, and 1,297 are left to train on


SOURCES = {
    "mnist": "MNIST is at https://storage.googleapis.com/cvdf-datasets/mnist/, four files",
    "cifar-10-batches-bin": "CIFAR-10 is cifar-10-binary.tar.gz at "
    "https://www.cs.toronto.edu/~kriz/cifar.html",
}


class DataError(Exception):
    """A missing or wrong data file; the message is one line that names it."""


class MissingData(DataError):
    """A file is not there; the message says where it comes from."""


class Dataset(NamedTuple):
    """Images `(count, height, width, channels)` and labels `(count,)`, uint8; `peak` is white."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    peak: int = 255

    def limit(self, train: int | None, test: int | None) -> Dataset:
        """Returns the first `train` and `test` examples; None for all."""
        return self._replace(
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )


def selected(options: Any) -> Dataset:
    """Returns the data of a command line, with as many examples (flags of `Parser.add_data`).

    Raises:
      DataError: for a file that is missing, truncated or corrupt.
    """
    return load(options.data, options.data_dir).limit(options.train_examples, options.test_examples)


def load(name: str, folder: Path | None = None) -> Dataset:
    """Returns the data set "digits", "mnist" or "cifar10"; the last two are read from `folder`.

    Raises:
      DataError: for a file that is missing, truncated or corrupt.
    """
    if name == "digits":
        return _digits()
    if folder is None:
        raise DataError(f"{name}: no folder given to read it from")
    return {"mnist": _mnist, "cifar10": _cifar10}[name](folder)


def _digits() -> Dataset:
    # Here, because this import takes a second that readers of other data need not wait for.
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    # They come sorted by writer: shuffled, so that training and test images are of the same
    # writers.
    order = np.random.default_rng(0).permutation(len(digits))
    images = pixels.reshape(-1, 8, 8, 1)[order].astype(np.uint8)
    labels = digits[order].astype(np.uint8)
    split = len(labels) - DIGITS_TEST
    return Dataset(images[:split], labels[:split], images[split:], labels[split:], peak=16)


def _mnist(folder: Path) -> Dataset:
    train, test = _mnist_part(folder, "train"), _mnist_part(folder, "t10k")
    size, expected = test[0].shape[1:3], train[0].shape[1:3]
    if size != expected:
        path = _find(folder, "mnist", IDX_IMAGES.format("t10k"), ".gz")
        _refuse(path, f"images of {size} pixels, the training images have {expected}")
    return Dataset(*train, *test)


def _mnist_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images_path = _find(folder, "mnist", IDX_IMAGES.format(part), ".gz")
    labels_path = _find(folder, "mnist", IDX_LABELS.format(part), ".gz")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        of_images = f"the {len(images)} images of {images_path.name}"
        _refuse(labels_path, f"{len(labels)} labels for {of_images}")
    _check_labels(labels_path, labels)
    return images[..., None], labels


def _cifar10(folder: Path) -> Dataset:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    parts = [read_cifar(_find(folder, "cifar-10-batches-bin", name)) for name in names]
    images, labels = zip(*parts, strict=True)
    return Dataset(np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5])


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Returns the unsigned bytes in an IDX file, gzip or not, of the given rank.

    Raises:
      DataError: for a file that cannot be read, is truncated, too long or empty, or has another
        magic number.
    """
    content = _unzip(path, _read(path))
    header = 4 + 4 * rank
    if len(content) < header:
        _refuse(path, f"truncated: {len(content)} bytes, shorter than the header of {header}")
    magic, expected = int.from_bytes(content[:4]), 0x0800 + rank
    if magic != expected:
        instead = f"magic number 0x{magic:08x} instead of 0x{expected:08x}"
        _refuse(path, f"not the expected IDX file: {instead}")
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, header, 4)]
    # math.prod counts in Python's integers: a corrupt header cannot overflow it.
    size, there, says = math.prod(shape), len(content) - header, "x".join(map(str, shape))
    if size != there:
        problem = "truncated" if size > there else "too long"
        _refuse(path, f"{problem}: {there} bytes after a header that says {says}")
    if size == 0:
        _refuse(path, f"empty: its header says {says}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images `(count, 32, 32, 3)` and labels of a file in CIFAR-10's binary format.

    Raises:
      DataError: for a file that cannot be read, has a broken record or a label above 9, or is
        empty.
    """
    content = _read(path)
    if not content:
        _refuse(path, "empty")
    if len(content) % CIFAR_RECORD:
        sizes = f"{len(content)} bytes are no multiple of {CIFAR_RECORD}"
        _refuse(path, f"truncated or corrupt: {sizes}")
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    _check_labels(path, records[:, 0])
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].copy()


def _find(folder: Path, subfolder: str, name: str, *suffixes: str) -> Path:
    """Returns the file of that name, or with a suffix, in the folder or the subfolder."""
    names = [name + suffix for suffix in ("", *suffixes)]
    for place in (folder, folder / subfolder):
        for path in (place / name for name in names):
            if path.exists():
                return path
    raise MissingData(
        f"{folder / name}: not found (looked for {' and '.join(names)}, also in "
        f"{folder / subfolder}). {SOURCES[subfolder]}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")


def _unzip(path: Path, content: bytes) -> bytes:
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        _refuse(path, f"corrupt or truncated gzip file: {error}")


def _check_labels(path: Path, labels: np.ndarray) -> None:
    largest, index = int(labels.max()), int(labels.argmax())
    if largest >= CLASSES:
        _refuse(path, f"corrupt: label {largest} of example {index}, expected 0 to {CLASSES - 1}")


def _refuse(path: Path, problem: str) -> NoReturn:
    raise DataError(f"{path}: {problem}")
