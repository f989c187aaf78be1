import jax
import numpy as np
import pytest
from from_torch import compare_logits, compare_training, images, load, main, trained
from safetensors.numpy import save_file

CLASSES = 10


@pytest.fixture(scope="module")
def network():
    return trained(CLASSES)


@pytest.fixture
def moved(network):
    return load(network, CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 65, 32])
def test_logits_are_those_of_torch(network, moved, size):
    difference, largest = compare_logits(network, *moved, images(2, size))
    assert largest > 1 and difference < 1e-4 * largest


@pytest.mark.slow
def test_statistics_go_on_as_those_of_torch(network, moved):
    assert compare_training(network, *moved, images(4, 32)) < 1e-5


@pytest.mark.slow
def test_running_statistics_are_not_those_at_the_start(network, moved):
    _, variables = moved
    assert all(abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(variables["batch_stats"]))
    var = variables["batch_stats"]["layer4_1_bn2"]["var"]
    assert abs(np.asarray(var) - 1).max() > 0.1
    assert "count" not in variables["batch_stats"]["bn1"]


@pytest.mark.slow
def test_a_file_gives_what_the_network_gives(network, moved, tmp_path):
    save_file(
        {key: value.numpy() for key, value in network.state_dict().items()},
        tmp_path / "weights.safetensors",
    )
    _, variables = load(tmp_path / "weights.safetensors", CLASSES)
    jax.tree.map(np.testing.assert_array_equal, variables, moved[1])


@pytest.mark.slow
def test_a_key_that_is_missing_is_named(network):
    state = dict(network.state_dict())
    del state["layer2.0.downsample.1.running_var"]
    with pytest.raises(ValueError, match=r"'layer2_0_downsample_1\.running_var' is missing"):
        load(state, CLASSES)
    state = {
        key: value
        for key, value in network.state_dict().items()
        if not key.startswith("layer2.0.bn1")
    }
    with pytest.raises(ValueError, match=r"'layer2_0_bn1\.\w+' is missing"):
        load(state, CLASSES)


def test_a_file_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--weights", "nowhere.safetensors"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
