import gzip

import numpy as np
import pytest
from common.data import DataError, load

RNG = np.random.default_rng(0)


def idx(array):
    header = [0x0800 + array.ndim, *array.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes()


def write_mnist(folder, compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 6, 5), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = RNG.integers(0, 10, count, np.uint8)
    for name, array in arrays.items():
        content = gzip.compress(idx(array)) if compress else idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(content)
    return list(arrays.values())


def write_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        record = RNG.integers(0, 256, (4, 3073), np.uint8)
        record[:, 0] %= 10
        (folder / name).write_bytes(record.tobytes())
        records.append(record)
    return records


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_mnist_round_trip(tmp_path, subfolder, compress):
    train_images, train_labels, test_images, test_labels = write_mnist(
        tmp_path / subfolder, compress
    )
    data = load("mnist", tmp_path)
    np.testing.assert_array_equal(data.train_images, train_images[..., None])
    np.testing.assert_array_equal(data.train_labels, train_labels)
    np.testing.assert_array_equal(data.test_images, test_images[..., None])
    np.testing.assert_array_equal(data.test_labels, test_labels)


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-bin"])
def test_cifar_round_trip(tmp_path, subfolder):
    records = write_cifar(tmp_path / subfolder)
    data = load("cifar10", tmp_path)
    assert data.train_images.shape == (20, 32, 32, 3)
    # The record of example 5: a label, then the red, green and blue planes, row by row.
    record = records[1][1]
    assert data.train_labels[5] == record[0]
    assert data.train_images[5, 7, 9].tolist() == [
        record[1 + plane * 1024 + 7 * 32 + 9] for plane in range(3)
    ]
    np.testing.assert_array_equal(data.test_labels, records[5][:, 0])


def test_digits_are_split():
    data = load("digits")
    assert data.train_images.shape == (1297, 8, 8, 1) and data.test_images.shape == (500, 8, 8, 1)
    assert data.train_images.max() == data.peak == 16


def change(start=None, stop=None, at=None, value=None, append=b""):
    """Returns a function that cuts a file's content, sets one byte of it and appends to it."""

    def changed(content):
        content = bytearray(content[start:stop])
        if at is not None:
            content[at] = value
        return bytes(content) + append

    return changed


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
BROKEN_IDX = {
    "header cut": (IMAGES, change(stop=10), "truncated: 10 bytes"),
    "data cut": (IMAGES, change(stop=-1), "truncated: 899 bytes after a header that says 30x6x5"),
    "too long": (IMAGES, change(append=b"x"), "too long: 901 bytes"),
    "empty file": (LABELS, change(stop=0), "truncated: 0 bytes"),
    "no examples": (LABELS, lambda content: content[:4] + bytes(4), "empty"),
    "magic number": (IMAGES, change(at=2, value=9), "0x00000903 instead of 0x00000803"),
    "label": (LABELS, change(at=8, value=10), "label 10 of example 0"),
    "counts": (LABELS, lambda content: idx(np.zeros(19, np.uint8)), "19 labels for the 20 images"),
    "image size": (
        "t10k-images-idx3-ubyte",
        lambda content: idx(np.zeros((20, 4, 5), np.uint8)),
        "(4, 5) pixels",
    ),
}


@pytest.mark.parametrize(("name", "broken", "says"), BROKEN_IDX.values(), ids=BROKEN_IDX)
@pytest.mark.parametrize("compress", [False, True])
def test_broken_mnist(tmp_path, name, broken, says, compress):
    write_mnist(tmp_path, compress)
    path = tmp_path / (name + ".gz" * compress)
    if compress:
        path.write_bytes(gzip.compress(broken(gzip.decompress(path.read_bytes()))))
    else:
        path.write_bytes(broken(path.read_bytes()))
    refuses("mnist", tmp_path, path, says)


BROKEN_GZIP = {
    "cut": change(stop=-9),
    "no gzip": change(start=5),
    "empty": change(stop=0),
    "checksum": change(at=-5, value=7),
    "deflate": change(at=20, value=255),
}


@pytest.mark.parametrize("broken", BROKEN_GZIP.values(), ids=BROKEN_GZIP)
def test_broken_gzip(tmp_path, broken):
    write_mnist(tmp_path, compress=True)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(broken(path.read_bytes()))
    refuses("mnist", tmp_path, path, "")


BROKEN_CIFAR = {
    "cut": (change(stop=-1), f"{4 * 3073 - 1} bytes are no multiple of 3073"),
    "empty": (change(stop=0), "empty"),
    "label": (change(at=3073, value=200), "label 200 of example 1"),
}


@pytest.mark.parametrize(("broken", "says"), BROKEN_CIFAR.values(), ids=BROKEN_CIFAR)
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_broken_cifar(tmp_path, name, broken, says):
    write_cifar(tmp_path)
    path = tmp_path / name
    path.write_bytes(broken(path.read_bytes()))
    refuses("cifar10", tmp_path, path, says)


@pytest.mark.parametrize(
    ("data", "write", "name"),
    [("mnist", write_mnist, LABELS), ("cifar10", write_cifar, "data_batch_5.bin")],
)
def test_missing_and_unreadable(tmp_path, data, write, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    refuses(data, tmp_path, tmp_path / name, "not found")
    (tmp_path / name).mkdir()
    refuses(data, tmp_path, tmp_path / name, "cannot be read")


def refuses(data, folder, path, says):
    with pytest.raises(DataError) as caught:
        load(data, folder)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message, message
