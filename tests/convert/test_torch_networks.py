"""Whole networks from PyTorch: recurrent layers, attention, Conv1D, other arrays, and names.

Numbers are compared with PyTorch's own outputs, through Flax's layers.
"""

import ast
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import normjax as nj
from tests.compare import assert_close, assert_trees_close
from tests.convert.torch_networks import TOLERANCE, array, check_there_and_back, like_of, random_

torch.manual_seed(0)

# Recurrent layers.

SEQUENCE = torch.randn(2, 5, 3)
CELLS = {"LSTM": nn.OptimizedLSTMCell, "GRU": nn.GRUCell, "RNN": nn.SimpleCell}


class Stack(nn.Module):
    """Two layers in both directions, as PyTorch has them."""

    kind: str

    def setup(self):
        cell = CELLS[self.kind]
        self.lower = nn.Bidirectional(nn.RNN(cell(4)), nn.RNN(cell(4)))
        self.upper = nn.Bidirectional(nn.RNN(cell(4)), nn.RNN(cell(4)))

    def __call__(self, x):
        return self.upper(self.lower(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_a_recurrent_layer_gives_the_numbers_of_the_cell(kind, bias):
    module = random_(getattr(torch.nn, kind)(3, 4, batch_first=True, bias=bias))
    params, _ = check_there_and_back(module, None)
    y = nn.RNN(CELLS[kind](4)).apply({"params": {"cell": params}}, array(SEQUENCE))
    assert_close(y, array(module(SEQUENCE)[0]), **TOLERANCE)


@pytest.mark.parametrize("kind", CELLS)
def test_a_single_cell_gives_the_same_leaves(kind):
    layer = random_(getattr(torch.nn, kind)(3, 4))
    cell = getattr(torch.nn, f"{kind}Cell")(3, 4)
    cell.load_state_dict({key[:-3]: value for key, value in layer.state_dict().items()})
    assert_trees_close(
        check_there_and_back(cell, None), nj.convert.from_torch(layer.state_dict()), rtol=0, atol=0
    )


def test_layers_and_directions_go_to_the_cells_of_like():
    network = torch.nn.ModuleDict(
        {"rnn": torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)}
    )
    random_(network)
    assert [*nj.convert.from_torch(network)[0]["rnn"]] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    rnn = Stack("LSTM")
    params, _ = like_of(rnn, array(SEQUENCE))
    trees = check_there_and_back(network["rnn"], None)
    assert_trees_close(
        nj.convert.from_torch(nj.convert.to_torch(*trees)), trees, rtol=0, atol=0
    )  # without like, as an LSTM
    order = ["lower/forward_rnn", "lower/backward_rnn", "upper/forward_rnn", "upper/backward_rnn"]
    cells = dict(zip(order, ["l0", "l0_reverse", "l1", "l1_reverse"], strict=True))
    moved = {
        layer: {
            direction: {"cell": trees[0][cells[f"{layer}/{direction}"]]} for direction in directions
        }
        for layer, directions in params.items()
    }
    y = rnn.apply({"params": moved}, array(SEQUENCE))
    assert_close(y, array(network["rnn"](SEQUENCE)[0]), **TOLERANCE)
    found, _ = nj.convert.from_torch(
        network, like=({"rnn": {"a_0": moved["lower"], "a_1": moved["upper"]}}, {})
    )
    assert_trees_close(found["rnn"], {"a_0": moved["lower"], "a_1": moved["upper"]}, rtol=0, atol=0)


def test_an_lstm_with_projections_is_handed_through():
    module = torch.nn.LSTM(3, 4, proj_size=2)
    params, _ = nj.convert.from_torch(module)
    assert params["weight_hr_l0"].shape == (2, 4) and params["weight_ih_l0"].shape == (16, 3)
    with pytest.raises(ValueError, match="'weight_ih_l0' has no counterpart, the first of 5"):
        nj.convert.from_torch(module, others="refuse")


# Attention.


@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=["plain", "no bias", "three"]
)
def test_attention_gives_the_numbers_of_flax(settings):
    module = random_(torch.nn.MultiheadAttention(8, 2, batch_first=True, **settings))
    sizes = (8, settings.get("kdim", 8), settings.get("vdim", 8))
    inputs = [torch.randn(2, 5, size) for size in sizes]
    flax = nn.MultiHeadDotProductAttention(2, use_bias=settings.get("bias", True))
    q, k, v = (array(each) for each in inputs)
    params, _ = check_there_and_back(module, like_of(flax, q, k, v))
    assert_close(flax.apply({"params": params}, q, k, v), array(module(*inputs)[0]), **TOLERANCE)
    state = {f"attn.{key}": value for key, value in module.state_dict().items()}
    from_mapping, _ = nj.convert.from_torch(state, like=({"attn": params}, {}))
    assert_trees_close(from_mapping["attn"], params, rtol=0, atol=0)
    unsplit = nj.convert.from_torch(state)[0]["attn"]
    assert unsplit["query"]["kernel"].shape == (8, 8)
    assert_close(unsplit["query"]["kernel"].reshape(8, 2, 4), params["query"]["kernel"])
    alone = nj.convert.to_torch({"attn": params}, {})
    assert {*alone} == {*state}


def test_matrices_are_split_into_heads_as_like_has_them():
    parts = {name: torch.nn.Linear(8, 8) for name in ("query", "key", "value", "out")}
    module = random_(torch.nn.ModuleDict(parts))
    like = like_of(nn.MultiHeadDotProductAttention(2), jnp.ones((1, 3, 8)))
    params, _ = check_there_and_back(module, like)
    assert_close(params["query"]["kernel"].reshape(8, 8), array(parts["query"].weight).T)
    assert_close(params["out"]["kernel"].reshape(8, 8), array(parts["out"].weight).T)


# Conv1D of Hugging Face's.


class Conv1D(torch.nn.Module):
    """As in transformers.pytorch_utils."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))
        self.bias = torch.nn.Parameter(torch.randn(outputs))


def gpt():
    return torch.nn.ModuleDict(
        {
            "attn": torch.nn.ModuleDict({"c_attn": Conv1D(12, 4), "c_proj": Conv1D(4, 4)}),
            "mlp": torch.nn.ModuleDict({"c_fc": Conv1D(16, 4), "c_proj": Conv1D(4, 16)}),
            "head": torch.nn.Linear(4, 3),
        }
    )


def test_the_class_says_that_a_conv1d_is_not_transposed():
    network = gpt()
    params, _ = check_there_and_back(network, None)
    for block in ("attn", "mlp"):
        for name, layer in network[block].items():
            assert_close(params[block][name]["kernel"], array(layer.weight))
    assert params["head"]["kernel"].shape == (4, 3)


def test_a_mapping_has_a_conv1d_by_its_shape_and_a_warning_for_square_ones():
    network = gpt()
    expected = nj.convert.from_torch(network)
    state = network.state_dict()
    with pytest.warns(UserWarning, match=r"square.*'attn\.c_proj' as Conv1D's.*Pass the module"):
        assert_trees_close(nj.convert.from_torch(state), expected, rtol=0, atol=0)
    del state["mlp.c_proj.weight"], state["mlp.c_proj.bias"]
    with pytest.warns(UserWarning, match=r"square.*'attn\.c_proj' as Linear's"):
        nj.convert.from_torch(state)
    square = torch.nn.Linear(4, 4)
    assert_close(nj.convert.from_torch(square.state_dict())[0]["kernel"], array(square.weight).T)


# What is not a layer's.


class Vision(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 5, 4))
        self.norm = torch.nn.LayerNorm(4)
        self.gamma = torch.nn.Parameter(torch.ones(4))
        self.act = torch.nn.PReLU()
        self.bilinear = torch.nn.Bilinear(2, 3, 4)
        self.register_buffer("relative_position_index", torch.arange(4))
        self.register_buffer("mean", torch.tensor([0.5]))


def test_other_arrays_are_kept_as_they_are_and_buffers_are_not_trained():
    module = Vision()
    params, batch_stats = check_there_and_back(module, None)
    assert_close(params["cls_token"], array(module.cls_token))
    assert_close(params["gamma"], array(module.gamma))
    assert params["bilinear"]["weight"].shape == (4, 2, 3)
    assert params["act"]["negative_slope"].shape == ()
    assert nn.PReLU().apply({"params": params["act"]}, jnp.float32(-2.0)) == -0.5
    assert batch_stats["relative_position_index"].dtype == jnp.int32
    assert_close(batch_stats["mean"], jnp.array([0.5]))
    with pytest.raises(ValueError, match="first of 7.*'pos_embed' of shape.*'gamma'.*'mean'"):
        nj.convert.from_torch(module, others="refuse")
    with pytest.raises(ValueError, match="others is unknown.*others='drop'"):
        nj.convert.from_torch(module, others="drop")


def test_integers_that_like_does_not_have_are_left_out_and_come_back():
    module = Vision()
    params, batch_stats = nj.convert.from_torch(module)
    like = params, {"mean": batch_stats["mean"]}
    trees = nj.convert.from_torch(module, like=like)
    assert [*trees[1]] == ["mean"]
    state = nj.convert.to_torch(*trees, like=module)
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def test_integers_are_kept_exactly_or_refused():
    _, batch_stats = nj.convert.from_torch({"seed": np.array([2**31 - 1])})
    assert batch_stats["seed"] == 2**31 - 1
    with pytest.raises(
        ValueError, match="'seed' has integers that do not fit into int32.*2147483648"
    ):
        nj.convert.from_torch({"seed": np.array([2**31])})


def test_a_weight_that_like_calls_so_stays_as_it_is():
    state = {"gate.weight": np.ones((3, 2), np.float32)}
    like = {"gate": {"weight": np.ones((3, 2), np.float32)}}, {}
    assert_trees_close(nj.convert.from_torch(state, like=like), like)
    assert [*nj.convert.to_torch(*like, like=state)] == [*state]


# Names.

BN = {"weight": np.ones(3, np.float32), "bias": np.ones(3, np.float32)}


def state_of(*modules):
    return {f"{module}.{leaf}": value for module in modules for leaf, value in BN.items()}


def tree_of(*paths):
    trees = {}
    for path in paths:
        inner = trees
        for part in path.split("/"):
            inner = inner.setdefault(part, {})
        inner |= {"scale": BN["weight"], "bias": BN["bias"]}
    return trees


LIKE = tree_of("layer1_0/bn1", "layer1_1/bn1"), {}


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("module.").replace("layer1.", "layer1_"),
        {"module.layer1.0": "layer1_0", "module.layer1.1": "layer1_1"},
        {"module.layer1.0.bn1": "layer1_0/bn1", "module.layer1.1.bn1": "layer1_1.bn1"},
    ],
    ids=["function", "table", "paths"],
)
def test_rename_takes_a_function_or_a_table(rename):
    state = state_of("module.layer1.0.bn1", "module.layer1.1.bn1")
    params, stats = nj.convert.from_torch(state, like=LIKE, rename=rename)
    assert_trees_close(params, LIKE[0], rtol=0, atol=0)
    back = nj.convert.to_torch(params, stats, like=state, rename=rename)
    assert [*back] == [*state]


def test_the_longest_entry_counts_and_a_leaf_may_have_a_name_of_its_own():
    state = state_of("module.bn1") | {"module.cls": np.ones(2, np.float32)}
    names = {"module": "", "module.bn1": "BatchNorm_0", "module.bn1.bias": "BatchNorm_0.beta"}
    params, _ = nj.convert.from_torch(state, rename=names)
    assert {*params} == {"BatchNorm_0", "cls"}
    assert {*params["BatchNorm_0"]} == {"scale", "beta"}


@pytest.mark.parametrize(
    ("modules", "advice"),
    [
        (["layer1.0.bn1", "layer1.1.bn1"], "separators"),
        (["module.layer1_0.bn1", "module.layer1_1.bn1"], "begin with 'module.'"),
        (["module.layer1.0.bn1", "module.layer1.1.bn1"], "begin with 'module.'.*separators"),
        (["layer1_0.bn", "layer1_1.bn"], "nearest names"),
    ],
)
def test_names_that_differ_are_named_with_the_rename_that_mends_them(modules, advice):
    state = state_of(*modules)
    with pytest.raises(ValueError, match=advice) as error:
        nj.convert.from_torch(state, like=LIKE)
    assert all(key in str(error.value) for key in state)
    found = re.search("pass rename=(.*)[.]$", str(error.value))
    rename = ast.literal_eval(found.group(1))
    assert_trees_close(nj.convert.from_torch(state, like=LIKE, rename=rename), LIKE, rtol=0, atol=0)


def test_all_shapes_that_differ_are_listed():
    state = {key: np.ones(4, np.float32) for key in state_of("layer1_0.bn1", "layer1_1.bn1")}
    with pytest.raises(ValueError, match=r"3 more: .*'layer1_1\.bn1\.bias' \(4,\) for"):
        nj.convert.from_torch(state, like=LIKE)


@pytest.mark.parametrize(
    ("state", "rename", "message"),
    [
        (
            state_of("0", "1"),
            {"0": "a", "1": "a"},
            "two arrays would be stored at 'a.weight'.*'0.weight' and '1.weight'",
        ),
        (state_of("0"), {"00": "a"}, "rename has an entry for '00'.*The nearest is '0'"),
        (state_of("0"), lambda key: None, "rename returned no name for '0.weight'"),
        (state_of("0"), 3, "rename cannot be called"),
        (
            state_of("a") | {"a.scale": BN["bias"]},
            None,
            "two arrays.*at 'params/a/scale'.*'a.weight' and 'a.scale'",
        ),
        (
            state_of("a") | {"b": BN["bias"]},
            {"b": "a"},
            "two arrays .*at 'params/a',.*'b' and 'a.bias'",
        ),
    ],
)
def test_names_that_cannot_be_had(state, rename, message):
    with pytest.raises((ValueError, TypeError), match=f"from_torch: {message}"):
        nj.convert.from_torch(state, rename=rename)


def test_without_like_to_torch_reads_a_table_backwards():
    names = {"module": "", "module.bn1": "BatchNorm_0"}
    state = state_of("module.bn1") | {"module.cls": np.ones(2, np.float32)}
    trees = nj.convert.from_torch(state, rename=names)
    assert {*nj.convert.to_torch(*trees, rename=names)} == {*state}
    prefixed, _ = nj.convert.from_torch(state_of("bn"), rename={"": "backbone"})
    assert_trees_close(prefixed, tree_of("backbone/bn"), rtol=0, atol=0)
    for rename, message in (
        (str.upper, "rename is a function, which cannot be inverted without like="),
        ({"a": "c", "b": "c"}, "rename has two entries with the same new name"),
    ):
        with pytest.raises(ValueError, match=f"to_torch: {message}"):
            nj.convert.to_torch(*trees, rename=rename)
    clash = {"a": {"scale": BN["weight"]}, "b": {"scale": BN["weight"]}}
    with pytest.raises(ValueError, match="to_torch: two arrays.*'a.weight' and 'b.weight'"):
        nj.convert.to_torch(clash, {}, rename={"b": "a"})
    twice = {"a": {"scale": BN["weight"], "weight": BN["weight"]}}
    with pytest.raises(
        ValueError, match="to_torch: two.*at 'a.weight'.*'params/a/scale' and 'params/a/weight'"
    ):
        nj.convert.to_torch(twice, {})
    cell = nj.convert.from_torch(torch.nn.LSTM(2, 3))[0] | {"weight_ih_l0": BN["weight"]}
    message = "to_torch: two.*at 'rnn.weight_ih_l0'.*'params/rnn/.* and 11 more' and 'params/rnn/w"
    with pytest.raises(ValueError, match=message):
        nj.convert.to_torch({"rnn": cell}, {})
    with pytest.raises(ValueError, match="to_torch: two.*at 'x'.*'a.weight' and 'a.bias'"):
        nj.convert.to_torch({}, {}, like=state_of("a", "b"), rename=lambda key: "x")
    with pytest.raises(ValueError, match="to_torch: flattened takes like="):
        nj.convert.to_torch(*trees, flattened={"fc": None})
