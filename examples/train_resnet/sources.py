"""Sources of images: synthetic, CIFAR-10's binary files, or a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from common import data
from common.data import DataError
from PIL import Image, UnidentifiedImageError

from train_resnet.options import Options

SYNTHETIC = 2048, 512  # the numbers of training and evaluation images
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class Source(Protocol):
    """Images by index. `load` may use `rng` to augment an image; in evaluation, it is None."""

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """Returns an image `(height, width, 3)` of uint8, and its label."""
        ...


class Sources(NamedTuple):
    """The images to train on and to evaluate on."""

    train: Source
    test: Source
    classes: int
    image_size: int


def load(options: Options) -> Sources:
    """Returns the sources that the options select; raises DataError for invalid files."""
    limits = options.train_examples, options.test_examples
    if options.data == "synthetic":
        train, test = (Synthetic(options, part, limits[part] or SYNTHETIC[part]) for part in (0, 1))
        return Sources(train, test, options.classes, options.image_size)
    assert options.data_dir is not None
    if options.data == "cifar10":
        images = data.load("cifar10", options.data_dir).limit(*limits)
        train = InMemory(images.train_images, images.train_labels, pad=4)
        return Sources(
            train, InMemory(images.test_images, images.test_labels, pad=4), data.CLASSES, 32
        )
    classes = _folders(options.data_dir / "train")
    train = Folder(options.data_dir / "train", classes, limits[0], options.image_size)
    test = Folder(options.data_dir / "val", classes, limits[1], options.image_size)
    return Sources(train, test, len(classes), options.image_size)


class Synthetic:
    """A coarse pattern for each class, with noise; learned in a few hundred steps."""

    def __init__(self, options: Options, part: int, size: int):
        self.size, self.pixels, self.seed = size, options.image_size, (options.seed, part)
        patterns = np.random.default_rng(options.seed).integers(64, 192, (options.classes, 4, 4, 3))
        repeats = -(-options.image_size // 4)
        large = patterns.repeat(repeats, axis=1).repeat(repeats, axis=2)
        self.patterns = large[:, : self.pixels, : self.pixels].astype(np.int16)

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """Returns the example with this index; `rng` determines whether it is mirrored."""
        own = np.random.default_rng((*self.seed, index))
        label = int(own.integers(len(self.patterns)))
        image = self.patterns[label] + own.integers(
            -64, 64, (self.pixels, self.pixels, 3), dtype=np.int16
        )
        return _mirrored(image.astype(np.uint8), rng), label


class InMemory:
    """Arrays of images, with random crops after padding and mirroring (He et al. 2016, 4.2)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, pad: int):
        self.images, self.labels, self.pad = images, labels, pad

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """Returns the example of that index."""
        image, label = self.images[index], int(self.labels[index])
        if rng is None:
            return image, label
        height, width, _ = image.shape
        top, left = rng.integers(2 * self.pad + 1, size=2)
        padded = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        return _mirrored(padded[top : top + height, left : left + width], rng), label


class Folder:
    """Files such as `PART/CLASS/*.jpg`; a random crop in training, the centre in evaluation."""

    def __init__(self, root: Path, classes: Sequence[str], limit: int | None, pixels: int):
        if (found := _folders(root)) != list(classes):
            odd = sorted(set(found) ^ set(classes))
            raise DataError(f"{root}: not the classes of the training images: {', '.join(odd[:5])}")
        self.classes = tuple(classes)
        files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((root / name).iterdir())
        ]
        self.files = [(path, label) for path, label in files if path.suffix.lower() in SUFFIXES]
        if not self.files:
            raise DataError(f"{root}: no images in its folders ({', '.join(sorted(SUFFIXES))})")
        if limit is not None:
            # Shuffled, since files are sorted by class, and the first ones would be of few classes.
            order = np.random.default_rng(0).permutation(len(self.files))[:limit]
            self.files = [self.files[i] for i in order]
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """Returns the example with this index; raises DataError if its file is not an image."""
        path, label = self.files[index]
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: not an image that can be read: {error}") from error
        box = _central_box(image.size) if rng is None else _random_box(image.size, rng)
        small = image.resize(
            (self.pixels, self.pixels), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0
        )
        return _mirrored(np.asarray(small), rng), label


def _folders(root: Path) -> list[str]:
    try:
        names = sorted(path.name for path in root.iterdir() if path.is_dir())
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror}") from error
    if not names:
        raise DataError(f"{root}: no folders in it; expected one for each class")
    return names


def _mirrored(image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    return image[:, ::-1] if rng is not None and rng.random() < 0.5 else image


def _random_box(
    size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Returns a box of 8% to 100% of the area, with sides of 3:4 to 4:3 (Szegedy et al. 2015)."""
    width, height = size
    for _ in range(10):
        area, ratio = (
            width * height * rng.uniform(0.08, 1),
            np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))),
        )
        w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return _central_box(size)


def _central_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Returns the central square of 7/8 of the shorter side: 224 of 256 pixels."""
    side = min(size) * 7 / 8
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side
