"""Flattened images from PyTorch: the order of features, against PyTorch's own outputs."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import normjax as nj
from tests.compare import assert_close, assert_trees_close
from tests.convert.torch_networks import TOLERANCE, array, check_there_and_back, like_of, random_

torch.manual_seed(0)
IMAGES = torch.randn(2, 3, 4, 4)
LAST = jnp.asarray(IMAGES.numpy()).transpose(0, 2, 3, 1)


class Flat(nn.Module):
    """A convolution, Flatten, and two layers that see the order of features."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="0")(x).reshape(len(x), -1)
        x = nj.linen.BatchNorm(use_running_average=True, name="2")(x)
        return nn.Dense(5, name="3")(x)


def flat(flatten=torch.nn.Flatten):
    return random_(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            flatten(),
            torch.nn.BatchNorm1d(128),
            torch.nn.Linear(128, 5),
        )
    )


class View(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x).view(len(x), -1)


def logits(model, trees):
    return model.apply({"params": trees[0], "batch_stats": trees[1]}, LAST)


def test_a_flatten_permutes_the_features_of_all_layers_that_see_them():
    network = flat()
    trees = check_there_and_back(network, like_of(Flat(), LAST))
    assert_close(logits(Flat(), trees), array(network(IMAGES)), **TOLERANCE)


def test_the_sizes_or_an_example_do_without_like():
    network = flat()
    expected = nj.convert.from_torch(network, like=like_of(Flat(), LAST))
    shapes = {"2": (8, 4, 4), "3": (8, 4, 4)}
    count = {"count": expected[1]["2"].get("count", jnp.int32(0))}
    for source, settings in (
        (network, {"flattened": shapes}),
        (network.state_dict(), {"flattened": shapes}),
        (network, {"example_input": IMAGES}),
    ):
        found = nj.convert.from_torch(source, **settings)
        found[1]["2"] |= count
        expected[1]["2"] |= count
        assert_trees_close(found, expected, rtol=0, atol=0)


def test_without_them_a_flatten_is_an_error_that_says_what_to_pass():
    message = r"a Flatten precedes '2', '3'.*\(C, H, W\), Flax \(H, W, C\).*'3' 128\. Pass "
    message += r"flattened=\{'2': \(8, height, width\), '3': \(8, height, width\)\}"
    with pytest.raises(ValueError, match=message):
        nj.convert.from_torch(flat())
    network = flat()
    unchanged, _ = nj.convert.from_torch(network, flattened={"2": None, "3": None})
    assert_close(unchanged["3"]["kernel"], array(network[3].weight).T)


def test_a_view_is_seen_with_an_example_and_warned_of_without():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), View(), torch.nn.Linear(128, 5)
    ).train()
    like = nj.convert.from_torch(network, flattened={"2": None})
    expected = nj.convert.from_torch(network, flattened={"2": (8, 4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nj.convert.from_torch(network, like=like, example_input=IMAGES)
    assert_trees_close(found, expected, rtol=0, atol=0)
    assert all(module.training for module in network.modules())
    with pytest.warns(UserWarning, match="'2' has 128 inputs, 16 times the 8 channels.*flattened="):
        nj.convert.from_torch(network, like=like)
    with pytest.warns(UserWarning, match="'1' has 48 inputs from a Flatten of the model's input"):
        nj.convert.from_torch(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)))


def test_a_mapping_is_warned_of_if_its_sizes_look_like_it():
    state = {"0.weight": np.ones((8, 3, 3, 3)), "3.weight": np.ones((5, 128))}
    with pytest.warns(UserWarning, match="'3' has 128 inputs, 16 times the 8 channels before it"):
        nj.convert.from_torch(state)
    for settings in ({"flattened": {"3": (8, 4, 4)}}, {"flattened": {"3": None}}):
        nj.convert.from_torch(state, **settings)
    nj.convert.from_torch(state | {"3.weight": np.ones((5, 8))})


def test_one_value_per_channel_and_features_last_need_no_order():
    pooled = (torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    sequences = (torch.nn.Linear(4, 8), torch.nn.Flatten())
    for layers, inputs in ((pooled, 8), (sequences, 40)):
        network = torch.nn.Sequential(*layers, torch.nn.Linear(inputs, 5))
        kernel = nj.convert.from_torch(network)[0][str(len(layers))]["kernel"]
        assert_close(kernel, array(network[-1].weight).T)


@pytest.mark.parametrize("form", ["graph", "layers"])
def test_a_norm_over_whole_images_leaves_channels_first(form):
    norm = torch.nn.LayerNorm((8, 4, 4), elementwise_affine=False)
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    middle = View() if form == "layers" else torch.nn.ReLU()  # a View has no graph
    network = torch.nn.Sequential(
        conv,
        norm,
        torch.nn.Flatten(),
        torch.nn.Linear(128, 5),
        torch.nn.Unflatten(1, (5, 1)),
        middle,
    )
    unchanged = nj.convert.from_torch(network, flattened={"3": None})
    found = nj.convert.from_torch(network, like=unchanged)
    expected = nj.convert.from_torch(network, flattened={"3": (8, 4, 4)})
    assert_trees_close(found, expected, rtol=0, atol=0)


def test_an_unflatten_permutes_the_outputs_before_it():
    network = random_(
        torch.nn.Sequential(
            torch.nn.Linear(6, 128),
            torch.nn.ReLU(),
            torch.nn.Unflatten(1, (8, 4, 4)),
            torch.nn.Conv2d(8, 5, 1),
        )
    )
    params, _ = check_there_and_back(network, None)
    x = torch.randn(2, 6)
    y = nn.Dense(128).apply({"params": params["0"]}, array(x))
    y = nn.Conv(5, (1, 1)).apply({"params": params["3"]}, nn.relu(y).reshape(2, 4, 4, 8))
    assert_close(y.transpose(0, 3, 1, 2), array(network(x)), **TOLERANCE)


class Branches(torch.nn.Module):
    """Two convolutions joined, and two layers that read the same flattened features."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.policy = torch.nn.Linear(96, 5)  # in PyTorch the order of attributes means nothing
        self.flatten = torch.nn.Flatten()
        self.left, self.right = torch.nn.Conv2d(3, 2, 1), torch.nn.Conv2d(3, 4, 1)
        self.value = torch.nn.Linear(96, 5)

    def forward(self, x):
        x = torch.nn.functional.relu(torch.cat((self.left(x), self.right(x)), 1))
        if self.form == "permuted":
            x = x.permute(0, 2, 3, 1)
        flat = {
            "module": self.flatten,
            "permuted": self.flatten,
            "view": lambda x: x.view(x.size(0), -1),
            "function": lambda x: torch.flatten(x, 1),
        }[self.form](x)
        return self.policy(flat) + self.value(flat)


class FlaxBranches(nn.Module):
    @nn.compact
    def __call__(self, x):
        branches = [nn.Conv(n, (1, 1), name=name)(x) for name, n in (("left", 2), ("right", 4))]
        flat = nn.relu(jnp.concatenate(branches, -1)).reshape(len(x), -1)
        return nn.Dense(5, name="policy")(flat) + nn.Dense(5, name="value")(flat)


@pytest.mark.parametrize("example", [None, IMAGES], ids=["graph", "example"])
@pytest.mark.parametrize("form", ["module", "view", "function", "permuted"])
def test_the_forward_pass_of_a_module_says_what_is_flattened(form, example):
    network = random_(Branches(form))
    like = like_of(FlaxBranches(), LAST)
    params, _ = nj.convert.from_torch(network, like=like, example_input=example)
    y = FlaxBranches().apply({"params": params}, LAST)
    assert_close(y, array(network(IMAGES)), **TOLERANCE)


class Branching(torch.nn.Module):
    """A module without a graph: what it does depends on a shape."""

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), torch.nn.Flatten())
        self.policy, self.value = torch.nn.Linear(96, 5), torch.nn.Linear(96, 5)

    def forward(self, x):
        x = self.trunk(x) if len(x) > 1 else self.trunk(2 * x)
        return self.policy(x), self.value(x)


def test_without_a_graph_the_layers_in_their_order_say_it():
    network = Branching()
    like = nj.convert.from_torch(network, flattened={"policy": None, "value": None})
    shapes = {"policy": (6, 4, 4), "value": (6, 4, 4)}
    expected = nj.convert.from_torch(network, flattened=shapes)
    assert_trees_close(nj.convert.from_torch(network, like=like), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("flattened", "message"),
    [
        ({"1": (8, 4, 4)}, r"flattened names '1', which is not a layer.*among \['2', '3'\]"),
        ({"3": (8, 4, 5)}, r"flattened\['3'\] does not fit.*product of 128.*\(8, 4, 5\)"),
    ],
)
def test_sizes_that_do_not_fit(flattened, message):
    with pytest.raises(ValueError, match=message):
        nj.convert.from_torch(flat(), flattened=flattened)


def test_a_file_that_is_sorted_by_its_keys_says_nothing_of_the_order(recwarn):
    """As safetensors' are: bn1 comes before fc there, whatever lies between them."""
    state = {
        "bn1.bias": np.zeros(4, np.float32),
        "bn1.running_mean": np.zeros(4, np.float32),
        "bn1.running_var": np.ones(4, np.float32),
        "bn1.weight": np.ones(4, np.float32),
        "fc.bias": np.zeros(2, np.float32),
        "fc.weight": np.zeros((2, 32), np.float32),
    }
    nj.convert.from_torch(state)
    assert not recwarn.list
    in_order = dict(sorted(state.items(), key=lambda item: (item[0][:2], "bias" in item[0])))
    with pytest.warns(UserWarning, match="'fc' has 32 inputs, 8 times the 4 channels"):
        nj.convert.from_torch(in_order)
