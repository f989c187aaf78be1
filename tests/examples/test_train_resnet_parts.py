"""The parts of the training program that need no process of their own."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.data import DataError
from flax import linen as nn
from jax.sharding import Mesh
from PIL import Image
from train_resnet import batches, checksums, digest, options, preflight, sources
from train_resnet.batches import Part
from train_resnet.metrics import forget
from train_resnet.resnet import BasicBlock, BottleneckBlock, ResNet, Sharing
from train_resnet.steps import AXIS, Program, SetupError, learning_rate, optimizer, sharing

from benchmarks import hlo
from normjax.linen import BatchNorm


def parse(*arguments):
    return options.parse(arguments, None)


def abstract_params(network, classes, pixels):
    model = ResNet(network, 64, classes)
    image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    return jax.eval_shape(lambda key, x: model.init(key, x, train=False), jax.random.key(0), image)[
        "params"
    ]


# torchvision's resnet18 and resnet50, documented with these numbers.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)]
)
def test_networks_have_as_many_parameters_as_torchvisions(network, parameters):
    params = abstract_params(network, 1000, 224)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.slow
def test_kernels_are_decayed_and_scales_and_biases_are_not(promotion_as_in_flax):
    params = abstract_params("resnet8", 10, 32)
    asked = parse("--weight-decay", "0.5", "--learning-rate", "1", "--warmup", "0")
    chosen = optimizer(asked, 10)
    zeros, ones = (
        jax.tree.map(lambda leaf, n=n: np.full(leaf.shape, n, np.float32), params) for n in (0, 1)
    )
    updates, _ = jax.jit(lambda *trees: chosen.update(trees[0], chosen.init(trees[1]), trees[1]))(
        zeros, ones
    )
    for path, leaf in jax.tree.leaves_with_path(updates):
        # no layer of a ResNet has a scale or bias of rank above 1
        assert np.asarray(leaf).any() == (leaf.ndim > 1), path


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_blocks_start_as_the_identity(block):
    conv, norm = partial(nn.Conv, use_bias=False), partial(BatchNorm, use_running_average=True)
    x = np.float32(np.random.default_rng(0).uniform(size=(2, 4, 4, 3 * block.expansion)))
    y, variables = jax.jit(block(3, 1, conv, norm).init_with_output)(jax.random.key(1), x)
    np.testing.assert_array_equal(y, x)
    norms = [leaves["scale"] for leaves in variables["params"].values() if "scale" in leaves]
    assert [np.asarray(scale).any() for scale in norms] == [True] * (len(norms) - 1) + [False]


@pytest.mark.parametrize(
    ("group", "devices", "expected"),
    [
        (32, 4, Sharing(axis_name=AXIS)),
        (16, 4, Sharing(axis_name=AXIS, axis_index_groups=((0, 1), (2, 3)))),
        (8, 4, Sharing()),
        (4, 4, Sharing(virtual_batch_size=4)),
        (8, 1, Sharing(virtual_batch_size=8)),
        (32, 1, Sharing(axis_name=AXIS)),
    ],
)
def test_one_flag_says_who_shares(group, devices, expected):
    assert sharing(parse("--batch-size", "32", "--norm-group", str(group)), devices) == expected


@pytest.mark.parametrize(
    ("batch", "group", "devices"), [(30, 30, 4), (32, 12, 4), (32, 5, 1), (48, 24, 3), (32, 64, 4)]
)
def test_groups_that_do_not_partition_are_refused(batch, group, devices):
    with pytest.raises(SetupError, match=rf"{batch}.*{devices} devices"):
        sharing(parse("--batch-size", str(batch), "--norm-group", str(group)), devices)


@pytest.mark.slow
def test_learning_rate_warms_up_and_ends_at_zero():
    rate = learning_rate(parse("--learning-rate", "0.4", "--warmup", "0.1"), 100)
    assert rate(0) == 0 and abs(rate(5) - 0.2) < 1e-6 and abs(rate(10) - 0.4) < 1e-6
    assert abs(rate(55) - 0.2) < 1e-6 and abs(rate(100)) < 1e-6


@pytest.fixture
def source():
    return sources.Synthetic(parse("--image-size", "8"), 0, 40)


def collect(loaded):
    return [{name: np.array(rows) for name, rows in batch.items()} for batch in loaded]


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_processes_make_up_the_batches_of_one(source, count):
    whole = collect(batches.training(source, Part(16, 0, 1), 3, 0, 96, workers=0))
    parts = [
        collect(batches.training(source, Part(16, i, count), 3, 0, 96, workers=0))
        for i in range(count)
    ]
    assert len(whole) == 6
    for i, batch in enumerate(whole):
        for name in batch:
            np.testing.assert_array_equal(
                np.concatenate([part[i][name] for part in parts]), batch[name]
            )


def test_a_position_is_all_that_is_needed_to_go_on(source):
    whole = collect(batches.training(source, Part(16, 0, 1), 3, 0, 96, workers=0))
    rest = collect(batches.training(source, Part(16, 0, 1), 3, 48, 96, workers=0))
    for batch, expected in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(batch["image"], expected["image"])


def test_an_epoch_has_every_example_once(source):
    class Names:
        def __len__(self):
            return 40

        def load(self, index, rng):
            return np.zeros((1, 1, 3), np.uint8), index

    labels = np.concatenate(
        [b["label"] for b in batches.training(Names(), Part(8, 0, 1), 0, 0, 80, workers=0)]
    )
    assert sorted(labels[:40]) == sorted(labels[40:]) == list(range(40))
    assert list(labels[:40]) != list(labels[40:])


def test_evaluation_counts_every_example_once(source):
    parts = [collect(batches.evaluation(source, Part(16, i, 2), workers=0)) for i in range(2)]
    assert len(parts[0]) == len(parts[1]) == 3
    assert sum(batch["weight"].sum() for part in parts for batch in part) == 40


@pytest.fixture
def folder(tmp_path):
    for part, size in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(size):
                Image.new("RGB", (20 + i, 30), (100 * label, 0, 0)).save(
                    tmp_path / part / name / f"{i}.png"
                )
    return tmp_path


def test_folders_are_classes(folder):
    read = sources.load(parse("--data", "folder", "--data-dir", str(folder), "--image-size", "16"))
    assert (len(read.train), len(read.test), read.classes, read.image_size) == (12, 4, 2, 16)
    for part in (read.train, read.test):
        for index in range(len(part)):
            for rng in (None, np.random.default_rng(index)):
                image, label = part.load(index, rng)
                assert image.shape == (16, 16, 3) and (image[..., 0] == 100 * label).all()


def test_what_is_wrong_with_a_folder_is_named(folder):
    (folder / "val" / "fox").mkdir()
    with pytest.raises(DataError, match="val: not the classes of the training images: fox"):
        sources.load(parse("--data", "folder", "--data-dir", str(folder)))
    (folder / "val" / "fox").rmdir()
    (folder / "train" / "cat" / "0.png").write_text("no image")
    read = sources.load(parse("--data", "folder", "--data-dir", str(folder)))
    with pytest.raises(DataError, match=r"0\.png: not an image that can be read"):
        read.train.load(0, None)


def test_what_hosts_have_to_agree_on(folder, tmp_path_factory):
    """One image of validation less; a class with another name; another image of another size."""
    asked = ["--data", "folder", "--image-size", "16", "--data-dir"]
    expected = digest.facts(sources.load(parse(*asked, str(folder))))

    def difference(change):
        other = tmp_path_factory.mktemp("other") / "data"
        shutil.copytree(folder, other)
        change(other)
        return digest.difference(digest.facts(sources.load(parse(*asked, str(other)))), expected)

    def rename(root):
        for part in ("train", "val"):
            (root / part / "dog").rename(root / part / "bird")

    assert difference(lambda root: None) is None
    fewer = difference(lambda root: (root / "val" / "dog" / "1.png").unlink())
    assert fewer == "test images: 3, not 4"
    assert difference(rename) == "names of the classes: bird, cat, not cat, dog"
    larger = difference(lambda root: (root / "train" / "cat" / "1.png").write_bytes(b"longer"))
    assert larger is not None and larger.startswith("checksum of the training images: ")


def test_every_byte_of_the_checksums_counts(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "a").write_bytes(b"content")
    (tmp_path / "b").write_bytes(b"")
    checksums.write(tmp_path)
    path = tmp_path / checksums.NAME
    content = path.read_bytes()
    assert checksums.wrong_files(tmp_path) == [] and content.count(b"\n") == 3
    for i in range(len(content)):
        for changed in (content[:i], content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]):
            path.write_bytes(changed)
            assert checksums.wrong_files(tmp_path), (i, changed)


def test_too_little_room_is_an_error_before_the_first_step(tmp_path):
    state = [jax.ShapeDtypeStruct((1 << 50,), jnp.float32)]
    with pytest.raises(SetupError, match=r"MB are free, and checkpoints \(--keep 3\) need 18,014"):
        preflight.room(parse("--out", str(tmp_path)), state)


def test_metrics_of_steps_that_are_taken_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)) + '{"step": 8, "lo'
    )
    forget(path, 5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "of_layers"), [(32, 18), (16, 18), (4, 0)])
def test_a_step_sends_what_its_layers_share_and_the_gradients(
    group, of_layers, promotion_as_in_flax
):
    """On 4 devices of 8 examples: one collective forward and one backward per layer, or none."""
    asked = parse(
        "--batch-size", "32", "--norm-group", str(group), "--network", "resnet8", "--width", "4"
    )
    program = Program(asked, Mesh(np.array(jax.devices()[:4]), (AXIS,)), 10, 10, 8)
    shapes = {"image": ((32, 8, 8, 3), jnp.uint8), "label": ((32,), jnp.int32)}
    shapes |= {"weight": ((32,), jnp.float32), "stop": ((4,), jnp.int32)}
    batch = {
        name: jax.ShapeDtypeStruct(*shape, sharding=program.split) for name, shape in shapes.items()
    }
    # Compiled quickly: what is sent does not depend on LLVM's optimizations.
    found = hlo.collectives(program.train.lower(program.abstract_state(), batch).compile())
    sent = [one for one in found if not one.in_branch]
    assert {one.kind for one in sent} == {"all-reduce"}  # whose bytes do not grow with a group
    # Beside them the vote to stop, the gradients with the metrics, and the statistics of groups;
    # XLA packs what it can.
    assert of_layers - 4 < len(sent) <= of_layers + 4
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state().params))
    assert max(one.elements for one in sent) <= parameters + 200


def test_options_that_go_together(capsys):
    with pytest.raises(SystemExit):
        parse("--coordinator", "127.0.0.1:1")
    assert "--process-count and --process-index go together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--coordinator", "127.0.0.1:1", "--process-count", "2", "--process-index", "2")
    assert "--process-index 2 is not one of 0 to 1" in capsys.readouterr().err
    assert (
        SimpleNamespace(**parse("--data", "folder", "--data-dir", "x").course()).image_size == 224
    )
