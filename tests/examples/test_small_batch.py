import json
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.networks import UNITS, batch, vgg
from small_batch import main, parse
from studies.small_batch.study import DEVICES, SmallBatch, limits, methods, on_devices

from tests.compare import assert_identical, assert_trees_close

# one layer: what the first device hands on does not differ by what it was normalized with
WIDTHS = ((8,),)
SHARE = 4  # images a device


@pytest.fixture
def images(rng):
    """As many as the devices hold, each device's brighter than the last one's."""
    brightness = np.repeat(np.arange(DEVICES), SHARE)[:, None, None, None]
    return np.float32(rng.normal(size=(DEVICES * SHARE, 4, 4, 1)) + brightness)


def trained(network, images):
    """The logits and new statistics of a step."""

    @jax.jit
    def step(key, images):
        return network.apply(*network.init(key, images.shape[1:], 10), images, True)

    return jax.device_get(step(jax.random.key(0), images))


@pytest.mark.slow
def test_batch_norm_of_each_device_is_ghost_batch_norm_of_as_many(images):
    logits, batch_stats = trained(on_devices(vgg(batch(), WIDTHS)), images)
    expected, _ = trained(vgg(batch(virtual_batch_size=SHARE), WIDTHS), images)
    whole, union = trained(vgg(batch(), WIDTHS), images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits - whole).max() > 0.1
    # What inference uses is what one device would have seen, if it had had all images.
    assert_trees_close(batch_stats, union, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_sync_batch_norm_is_that_of_the_whole_batch(images):
    found = trained(on_devices(vgg(methods(80)["sync"].unit, WIDTHS)), images)
    assert_trees_close(found, trained(vgg(batch(), WIDTHS), images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_group_norm_does_not_care_for_devices(images):
    network = vgg(UNITS["group"], WIDTHS)
    assert_trees_close(trained(on_devices(network), images), trained(network, images), atol=1e-5)


@pytest.mark.slow
def test_inference_needs_no_devices(images):
    network = on_devices(vgg(batch(axis_name="devices"), WIDTHS))

    @jax.jit
    def infer(key, images):
        params, batch_stats = network.init(key, images.shape[1:], 10)
        return batch_stats, *network.apply(params, batch_stats, images, False)

    batch_stats, logits, same = infer(jax.random.key(0), images[:3])
    assert logits.shape == (3, 10)
    assert_identical(same, batch_stats)


@pytest.mark.slow
def test_the_limits_of_renorm_rise_as_in_its_paper():
    """5,000, 25,000 and 40,000 of its steps are 10, 50 and 80 of 80."""
    rising = limits(80)
    for name, counts, expected in (
        ("r_max", (0, 10, 45, 80, 99), (1, 1, 2, 3, 3)),
        ("d_max", (0, 10, 30, 50, 99), (0, 0, 2.5, 5, 5)),
    ):
        assert tuple(float(jnp.asarray(rising[name](count))) for count in counts) == expected


def test_every_batch_size_sees_as_many_examples():
    study = SmallBatch(Namespace(steps=100, sizes=(32, 8, 2)))
    assert [study.steps(size) for size in (32, 8, 2)] == [100, 400, 1600]


def test_the_paper_stands_beside_what_is_finished():
    study = SmallBatch(Namespace(sizes=(32, 16, 2), norms=("batch", "group"), seeds=3))
    study.results = {
        "batch, 32": {"errors": [2.0, 1.0, 4.0]},
        "batch, 2": {"errors": [30.0, 31.0, 8.0]},
    }
    study.results["group, 16"] = {"errors": [3.0, 3.0, 5.0]}
    assert study.by_size("batch") == {32: 2.0, 2: 30.0}
    claims = {claim.what: (claim.reported, claim.measured) for claim in study.claims()}
    assert claims["batch norm, 2 images a device"] == ("34.7%", "30.0%")
    assert claims["batch norm, from 32 to 2"] == ("+11.1 points", "+28.0 points")
    assert claims["group norm, 16 images a device"] == ("24.2%", "3.0%") and len(claims) == 4


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    arguments = [
        "--norms",
        "batch",
        "ghost",
        "--sizes",
        "2",
        "--steps",
        "2",
        "--test-examples",
        "100",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "small_batch.json").read_text())
    assert content["status"] == "finished" and list(content["results"]) == ["batch, 2", "ghost, 2"]
    assert all(0 <= result["errors"][0] <= 100 for result in content["results"].values())
    assert content["claims"][0]["reported"] == "34.7%"
    assert (tmp_path / "small_batch.png").read_bytes().startswith(b"\x89PNG")
    assert "Test error (%)" in capsys.readouterr().out


def test_mistakes_get_one_line(tmp_path, capsys):
    assert main(["--train-examples", "100", "--out", str(tmp_path)]) == 1
    assert "--sizes 32: 256 examples on 8 devices, and there are 100\n" in capsys.readouterr().err
    for size, says in (
        ("1", "--sizes: expected an integer above 1"),
        ("3", "--sizes 3: 8 times as many do not divide"),
    ):
        with pytest.raises(SystemExit):
            parse(["--sizes", size])
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert parse(["--norms", "batch", "--sizes", "3"]).sizes == [3]
