"""Each rule of `report`, triggered and not, on variables of every kind."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import normjax as nj
from normjax.diagnostics import plot, report
from normjax.diagnostics.report.page import page
from tests.diagnostics.networks import CLASSES, NNX, Residual, healthy, init, trained

FAMILY = {
    **{
        name: getattr(nj.linen, name)
        for name in ("BatchNorm", "LayerNorm", "RMSNorm", "FilterResponseNorm")
    },
    **{name: getattr(nj.linen, name) for name in ("BatchRenorm", "DynamicTanh")},
    "GroupNorm": partial(nj.linen.GroupNorm, num_groups=4),
}


def rules(variables, **settings):
    return [
        (finding.path, finding.rule, finding.severity)
        for finding in report(variables, **settings).findings
    ]


def sick(collection, leaf, channels, value, **settings):
    """What is found where some channels of a leaf have another value."""
    tree = healthy()
    tree[collection]["norm"][leaf][channels] = value
    (finding,) = report(tree, **settings).findings
    assert finding.path == "norm"
    return finding


def test_a_healthy_layer_is_reported_in_numbers_and_nothing_is_found():
    tree = healthy()
    (layer,), findings = report(tree)
    assert findings == () and layer.severity is None
    assert (layer.path, layer.kind, layer.shape, layer.gap) == ("norm", "batch norm", (32,), None)
    batch_stats, params = tree["batch_stats"]["norm"], tree["params"]["norm"]
    expected = {"mean": batch_stats["mean"], "var": batch_stats["var"], "scale": params["scale"]}
    for name, values in expected.items():
        assert getattr(layer, name) == (values.min(), np.median(values), values.max())


def test_constant_inputs_are_dead_channels():
    finding = sick("batch_stats", "var", [3, 17], [0, 9e-8])
    assert (finding.rule, finding.severity) == ("dead-channels", "warning")
    assert (
        "2 of 32" in finding.message
        and "(channels 3, 17)" in finding.message
        and "9e-08" in finding.message
    )
    assert "ReLU" in finding.advice
    assert sick("batch_stats", "var", slice(None), 0).severity == "error"
    tree = healthy()
    var = tree["batch_stats"]["norm"]["var"]
    var /= 100
    var[3] = 2e-7
    assert rules(tree) == []  # above a hundredth of epsilon, 1e-7
    assert rules(tree, epsilon=1e-3) == [("norm", "dead-channels", "note")]  # 1 of 32, 3%
    var *= 1e6
    var[[3, 4]] = 1e-3  # far below the layer's median, if not epsilon
    assert rules(tree) == [("norm", "dead-channels", "warning")]


def test_the_same_dead_channels_of_several_layers_are_one_finding():
    """As around a depthwise convolution, which hands a constant channel on."""
    names = [f"block_{block}_bn_{i}" for block in range(2) for i in range(2)]
    trees = {name: healthy() for name in names}
    tree = {
        part: {name: each[part]["norm"] for name, each in trees.items()}
        for part in ("params", "batch_stats")
    }
    for name, dead in zip(names, ([5], [5], [5, 9], [5, 9]), strict=True):
        tree["batch_stats"][name]["var"][dead] = 0
        tree["params"][name]["scale"][dead] = 0  # a dead channel has no finding of its scale
    found = report(tree)
    assert [(each.path, each.severity) for each in found.findings] == [
        ("block_1_bn_0", "warning"),
        ("block_0_bn_0", "note"),
    ]
    assert found.findings[0].message.endswith(
        "(channels 5, 9); so do the same channels of " + names[3]
    )
    assert [layer.severity for layer in found.layers] == ["note", "note", "warning", "warning"]
    assert "4 normalization layers: 1 warning, 1 note" in str(found)
    for name in names:
        tree["batch_stats"][name]["var"][:] = 0
    assert len(report(tree).findings) == 4  # whole layers are errors, each by itself


def test_channels_far_larger_than_the_layer_s_explode():
    for leaf, value in (("var", 1e6), ("mean", -1e3)):
        finding = sick("batch_stats", leaf, [5], value)
        assert (finding.rule, finding.severity) == ("exploding-channels", "warning")
        assert (
            "1 of 32" in finding.message
            and "as large as 1e+03, against a median" in finding.message
            and "(channel 5)" in finding.message
        )
    assert sick("params", "scale", [5], -300).rule == "exploding-channels"
    assert (
        "32 of 32 channels is as large as 3.16e+04"
        in sick("batch_stats", "var", slice(None), 1e9).message
    )
    assert sick("batch_stats", "mean", [5], 9e5).severity == "warning"
    tree = healthy()
    tree["batch_stats"]["norm"]["mean"][5] = 1e9
    assert ("norm", "exploding-channels", "error") in rules(tree)
    tree = healthy()
    tree["batch_stats"]["norm"]["mean"][5] = 50
    tree["batch_stats"]["norm"]["var"][6] = 1000
    assert rules(tree) == []
    tree["batch_stats"]["norm"]["var"][:] = 1e-6  # small as they all are, 0.1 is no explosion
    tree["batch_stats"]["norm"]["mean"][:] = 0
    tree["batch_stats"]["norm"]["var"][6] = 1e-2
    assert rules(tree) == []


def test_scales_near_0_of_single_channels_and_of_whole_layers():
    finding = sick("params", "scale", [0, 9], [1e-5, 0])
    assert (finding.rule, finding.severity) == ("near-zero-scale", "warning")
    assert (
        "2 of 32" in finding.message
        and "(channels 0, 9)" in finding.message
        and "prune" in finding.advice
    )
    finding = sick("params", "scale", slice(None), 0)
    assert (finding.rule, finding.severity) == (
        "zero-scale",
        "note",
    ) and "residual" in finding.advice
    wide = healthy(channels=1000)
    wide["params"]["norm"]["scale"][3] = 0  # one of a thousand
    assert rules(wide) == [("norm", "near-zero-scale", "note")]
    spread = healthy()
    # as from zeros
    spread["params"]["norm"]["scale"] = np.random.default_rng(1).normal(0, 0.05, 32)
    spread["params"]["norm"]["scale"][4] = 1e-7
    assert rules(spread) == [("norm", "near-zero-scale", "note")]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "place",
    [("batch_stats", "mean"), ("batch_stats", "var"), ("params", "scale"), ("params", "bias")],
)
def test_what_is_not_finite_is_an_error(place, value):
    tree = healthy()
    tree[place[0]]["norm"][place[1]][[1, 2, 3, 4, 5, 6, 7]] = value
    found = report(tree)
    finding = found.findings[0]
    infinite = place[1] == "var" and value == np.inf
    rule, named = (
        ("infinite-variance", "variances are infinite")
        if infinite
        else ("non-finite", f"in {place[1]}")
    )
    assert (finding.rule, finding.severity) == (rule, "error")
    assert f"7 of 32 {named} (channels 1, 2, 3, 4, 5 and 2 more)" in finding.message
    assert found.layers[0].severity == "error"
    json.loads(found.to_json(), parse_constant=pytest.fail)  # no NaN in it


def test_a_network_that_diverged_is_said_to_have_diverged():
    params, batch_stats = nj.batch_norm_init(4)
    x = jnp.float32([[1e20, 1e9, 1, 2], [-1e20, 1e9, 3, 4]])
    _, batch_stats = nj.batch_norm(params, batch_stats, x, train=True)
    tree = {"params": {"norm": params}, "batch_stats": {"norm": batch_stats}}
    finding = report(tree).findings[0]
    assert (finding.rule, finding.severity) == ("infinite-variance", "error")
    assert "1 of 4 variances are infinite (channel 0): the network diverged" in finding.message
    assert "the bias, whatever the input is" in finding.message and "checkpoint" in finding.advice


@pytest.mark.parametrize("mean", [2e6, -2e12])
def test_means_of_a_million_deviations_are_errors(mean):
    tree = healthy()
    tree["batch_stats"]["norm"]["mean"][7] = mean
    deviations = abs(mean) / np.sqrt(tree["batch_stats"]["norm"]["var"][7] + 1e-5)
    (finding,) = [each for each in report(tree).findings if each.rule == "distant-mean"]
    assert finding.severity == "error" and "1 of 32" in finding.message
    assert f"up to {deviations:.3g} deviations from 0 (channel 7)" in finding.message
    tree["batch_stats"]["norm"]["var"][7] = (mean / 2e5) ** 2
    assert "distant-mean" not in [rule for _, rule, _ in rules(tree)]
    tree = healthy()
    tree["batch_stats"]["norm"]["mean"][7], tree["batch_stats"]["norm"]["var"][7] = 1e4, 0
    assert "distant-mean" not in [rule for _, rule, _ in rules(tree)]  # dead, which is said


def test_a_leaf_of_nothing_but_nan():
    tree = healthy()
    tree["batch_stats"]["norm"]["var"][:] = np.nan
    found = report(tree)
    assert "NaN" in str(found) and np.isnan(found.layers[0].var.median)
    written = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert written["layers"][0]["var"] == {"low": None, "median": None, "high": None}
    assert page(found, "a").count("<svg") == 2  # of scale: the axis and the layer
    assert len(plot.report(found).axes) == 1


def test_a_variance_below_0_is_an_error():
    finding = sick("batch_stats", "var", [2], -0.5)
    assert (finding.rule, finding.severity) == (
        "negative-variance",
        "error",
    ) and "-0.5" in finding.message


def test_statistics_that_were_thrown_away():
    tree = healthy()
    tree["batch_stats"]["norm"] = {"mean": np.zeros(32), "var": np.ones(32)}
    (finding,) = report(tree).findings
    assert (finding.rule, finding.severity) == ("statistics-not-stored", "warning")
    assert "scale and bias" in finding.message
    tree["params"]["norm"] = {"scale": np.ones(32), "bias": np.zeros(32)}
    assert rules(tree) == []


def test_layers_that_their_own_parameters_silence():
    frn = nj.filter_response_norm_init(4)[0]
    assert rules((frn, {})) == []
    frn["threshold"] = jnp.array([0.0, 6.5, 0.0, 0.0])
    assert rules((frn, {})) == [("/", "dead-channels", "warning")]
    tanh = nj.dynamic_tanh_init(4)[0]
    assert rules((tanh, {})) == []
    assert rules((tanh | {"alpha": jnp.zeros(())}, {})) == [("/", "dead-channels", "error")]


@pytest.mark.slow
@pytest.mark.parametrize("norm", FAMILY)
def test_no_alarm_for_a_network_at_its_start_and_one_that_has_trained(norm):
    model = Residual(FAMILY[norm])
    fresh = report(init(model))
    assert len(fresh.layers) == 3 and {finding.rule for finding in fresh.findings} == {"zero-scale"}
    after = report(trained(model, steps=20))
    assert after.count("error") == after.count("warning") == 0


@pytest.mark.slow
def test_paths_and_kinds_in_each_kind_of_model():
    linen = report(init(Residual()))
    names = ["BatchNorm_0", "BatchNorm_1", "stem_norm"]
    assert [layer.path for layer in linen.layers] == names
    model = NNX()
    assert [(layer.path, layer.kind) for layer in report(model).layers] == [
        ("norms/0", "batch norm"),
        ("norms/1", "batch norm"),
    ]
    assert (
        report(nnx.state(model)).layers[0].path
        == report(nnx.to_pure_dict(nnx.state(model))).layers[0].path
    )
    params, batch_stats = nj.batch_norm_init(3)
    assert [layer.path for layer in report((params, batch_stats)).layers] == ["/"]
    assert [layer.path for layer in report({"a": {"b": batch_stats}}).layers] == ["a/b"]
    listed = report(([{"n": params}, {"n": params}], [{"n": batch_stats}, {"n": batch_stats}]))
    assert [layer.path for layer in listed.layers] == ["0/n", "1/n"]
    assert all(layer.scale and layer.var for layer in listed.layers)


def test_boxes_frozen_dicts_and_names_of_any_kind():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            ones = nn.with_partitioning(nn.initializers.ones, (None,))
            return nj.linen.BatchNorm(use_running_average=True, scale_init=ones, name="äö ü.1")(x)

    variables = nn.FrozenDict(Boxed().init(jax.random.key(0), jnp.ones((2, 3))))
    (layer,) = report(variables).layers
    assert layer.path == "äö ü.1" and layer.scale == (1, 1, 1)


@pytest.mark.parametrize("name", ["optimizer", "opt", "scales", "value", "mean", "0", "a/b"])
def test_modules_of_unlucky_names(name):
    params, batch_stats = nj.batch_norm_init(3)
    for variables in (
        {"params": {name: {"n": params}}, "batch_stats": {name: {"n": batch_stats}}},
        {"params": {"n": {name: params}}, "batch_stats": {"n": {name: batch_stats}}},
    ):
        (layer,) = report(variables).layers
        assert layer.path in (f"{name}/n", f"n/{name}") and sorted(layer.leaves) == [
            "bias",
            "mean",
            "scale",
            "var",
        ]


@pytest.mark.slow
def test_a_state_of_training_is_reported_without_its_optimizer_and_copies_by_their_name():
    variables = init(Residual())
    import optax

    class State(train_state.TrainState):
        batch_stats: dict
        ema_params: dict

    state = State.create(
        apply_fn=None,
        params=variables["params"],
        tx=optax.adam(1e-3),
        batch_stats=variables["batch_stats"],
        ema_params=variables["params"],
    )
    paths = [layer.path for layer in report(state).layers]
    assert len(paths) == 6 and paths.count("stem_norm") == paths.count("ema/stem_norm") == 1


def test_names_of_pytorch_and_keras():
    from torch.nn import BatchNorm1d

    torch = {
        "bn1.running_mean": np.zeros(4),
        "bn1.running_var": np.ones(4),
        "bn1.weight": np.ones(4),
        "bn1.num_batches_tracked": np.array(3),
        "fc.weight": np.ones((4, 4)),
        "ln.weight": np.ones(4),
        "4.weight": np.ones(4),
        "4.bias": np.ones(4),
        "5.weight": np.ones(1),
    }
    split = {tuple(name.split(".")): value for name, value in torch.items()}
    for tree in (torch, split):  # with the dots of a state_dict, too
        assert [
            (layer.path, layer.kind, sorted(layer.leaves)) for layer in report(tree).layers
        ] == [
            ("4", "norm", ["bias", "scale"]),
            ("bn1", "batch norm", ["count", "mean", "scale", "var"]),
            ("ln", "layer norm", ["scale"]),
        ]
    tensors = BatchNorm1d(4).state_dict()
    assert sorted(report(tensors).layers[0].leaves) == ["bias", "count", "mean", "scale", "var"]
    keras = {
        "gamma": np.ones(2),
        "beta": np.zeros(2),
        "moving_mean": np.zeros(2),
        "moving_variance": np.ones(2),
    }
    assert sorted(report({"norm": keras}).layers[0].leaves) == ["bias", "mean", "scale", "var"]


def test_layers_stacked_in_a_scan_are_judged_each_by_its_own_median():
    tree = {"params": {"norms": {"scale": np.outer([1.0, 1e4 - 1], np.ones(8))}}}
    assert rules(tree) == []
    tree["params"]["norms"]["scale"][1, 3] = 1e-2
    (finding,) = report(tree).findings
    assert finding.rule == "near-zero-scale" and "(channel (1, 3))" in finding.message


@pytest.mark.slow
def test_bfloat16_and_complex():
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), healthy())
    tree["batch_stats"]["norm"]["var"] = tree["batch_stats"]["norm"]["var"].at[3].set(0)
    assert rules(tree) == [("norm", "dead-channels", "note")]
    params, batch_stats = nj.batch_norm_init(3)
    mean = jnp.array([3 + 4j, 0, 1j])
    assert report((params, batch_stats | {"mean": mean})).layers[0].mean == (0, 1, 5)


def test_it_prints_and_becomes_json():
    tree = healthy()
    tree["batch_stats"]["norm"]["var"][[3, 4]] = 0
    found = report(tree)
    text = str(found)
    assert repr(found) == text
    (row,) = [line for line in text.splitlines() if line.startswith("!  norm")]
    assert "batch norm" in row and "32" in row
    assert found.findings[0].message in text and found.findings[0].advice in text
    assert text.endswith("1 normalization layer: 1 warning")
    contents = json.loads(found.to_json())
    assert contents["counts"] == {"error": 0, "warning": 1, "note": 0}
    assert contents["findings"][0] == found.findings[0]._asdict()
    assert (
        contents["layers"][0]["var"] == found.layers[0].var._asdict()
        and contents["layers"][0]["gap"] is None
    )
    assert str(report(healthy())).endswith("1 normalization layer: nothing wrong")


def test_it_refuses_what_it_cannot_examine():
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}
    with pytest.raises(
        ValueError,
        match="no normalization layer.*'mean' beside 'var' .also running_mean.*'LayerNorm_0'.*"
        "2 arrays: params/Dense_0/bias, params/Dense_0/kernel",
    ):
        report(variables)
    with pytest.raises(TypeError, match="bias of type .*Tracer"):
        jax.jit(lambda tree: report(tree) and 0)(nj.batch_norm_init(2)[0])
    with pytest.raises(TypeError, match="batch_stats/mean of type ShapeDtypeStruct"):
        report(jax.eval_shape(lambda: nj.batch_norm_init(2)))
    with pytest.raises(ValueError, match="epsilon=-1"):
        report(healthy(), epsilon=-1)
    with pytest.raises(ValueError, match="got batch. Pass"):
        report(healthy(), batch=jnp.ones((CLASSES, 2)))
    with pytest.raises(TypeError, match="apply_fn of type int"):
        report(healthy(), apply_fn=3, batch=jnp.ones(2))
