"""What a newcomer writes by habit: the error names what it is called here, and where it is."""

import importlib
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from tests.contract.layers import LAYERS, arguments

X = jnp.arange(12.0).reshape(4, 3)
PARAMS, STATS = nj.batch_norm_init(3)
KEY = jax.random.key(0)


def batch_norm(**given):
    return nj.batch_norm(PARAMS, STATS, X, **given)


def of_nnx(kind, **given):
    return getattr(nj.nnx, kind)(3, rngs=nnx.Rngs(0), **given)


def of_linen(kind, **given):
    return getattr(nj.linen, kind)().init(KEY, X, **given)


# The call, and what its error says.
FOREIGN = {
    "training": (lambda: batch_norm(training=True), r"batch_norm: training=.*Write train=True\."),
    "is_training": (lambda: batch_norm(is_training=False), r"Write train=False\."),
    "use_running_average": (
        lambda: batch_norm(use_running_average=True),
        r"got use_running_average=True\. Write train=False\.",
    ),
    "deterministic": (lambda: batch_norm(deterministic=False), r"Write train=True\."),
    "axis": (lambda: batch_norm(train=True, axis=1), r"Write feature_axes=1\."),
    "eps": (lambda: batch_norm(train=True, eps=1e-3), r"Write epsilon=0\.001\."),
    "axis of layer_norm": (
        lambda: nj.layer_norm(PARAMS, {}, X, True, axis=-1),
        r"layer_norm: axis=.*Write feature_axes=-1 or reduction_axes=-1\.",
    ),
    "groups": (lambda: nj.group_norm(PARAMS, {}, X, True, groups=3), r"Write num_groups=3\."),
    "axis of moments": (lambda: nj.moments(X, axis=0), r"moments: .*Write reduction_axes=0\."),
    "eps of a weight": (
        lambda: nj.weights.weight_norm({}, {}, X, True, eps=1),
        r"weight_norm: .*epsilon=1\.",
    ),
    "decay_rate": (
        lambda: nj.update_batch_stats(STATS, nj.moments(X, 0), decay_rate=0.9),
        r"update_batch_stats: .*Write momentum=0\.9\.",
    ),
    "features": (lambda: nj.batch_norm_init(features=3), r"batch_norm_init: .*num_features=3\."),
    "affine": (lambda: nj.batch_norm_init(3, affine=False), "use_scale=False or use_bias=False"),
    "momentum of an init": (
        lambda: nj.batch_norm_init(3, momentum=0.9),
        r"batch_norm_init: momentum= is an argument of batch_norm\.",
    ),
    "use_scale of a layer": (
        lambda: batch_norm(train=True, use_scale=False),
        "use_scale= is an argument of batch_norm_init",
    ),
    "affine of a layer": (
        lambda: batch_norm(train=True, affine=False),
        "affine= is an argument of batch_norm_init.*Pass use_scale=False or use_bias=False there",
    ),
    "training of an init": (
        lambda: nj.batch_norm_init(3, training=True),
        r"training= is an argument of batch_norm\..*Pass train=True there\.",
    ),
    "dim of an init": (
        lambda: nj.batch_norm_init(3, dim=1),
        r"dim= is an argument of batch_norm\..*Pass feature_axes=1 there\.",
    ),
    "track_running_stats": (
        lambda: batch_norm(train=False, track_running_stats=False),
        "track_running_stats= has no counterpart.*pass train=True",
    ),
    "nnx: track_running_stats": (
        lambda: of_nnx("BatchNorm", track_running_stats=False),
        "BatchNorm: track_running_stats=.*use_running_average=False",
    ),
    "a typing error": (lambda: batch_norm(train=True, epsilom=1), "Did you mean epsilon=1"),
    "an unknown name": (lambda: batch_norm(train=True, zzz=X), r"zzz= is unknown.*got zzz=\.\.\."),
    "no train": (lambda: batch_norm(), "batch_norm: `train` is not a bool.*got train=nothing"),
    "nnx: eps": (lambda: of_nnx("BatchNorm", eps=1e-3), "BatchNorm: eps=.*epsilon=0.001"),
    "nnx: inherited": (lambda: of_nnx("GroupNorm", groups=3), "GroupNorm: groups=.*num_groups=3"),
    "nnx: arguments passed on": (lambda: of_nnx("BatchRenorm", eps=1), "eps=.*epsilon=1"),
    "nnx: feature_axes": (lambda: of_nnx("BatchNorm", feature_axes=1), "Write axis=1"),
    "nnx: mask": (lambda: of_nnx("BatchNorm", mask=None), "mask= is an argument of the call of"),
    "nnx: training": (
        lambda: of_nnx("BatchNorm")(X, training=True),
        r"BatchNorm: training=.*the opposite.*Write use_running_average=False\.",
    ),
    "nnx: no mode": (lambda: of_nnx("LayerNorm")(X, train=True), "LayerNorm: train=.*Drop it"),
    "linen: eps": (lambda: nj.linen.LayerNorm(eps=1e-3), "LayerNorm: eps=.*epsilon=0.001"),
    "linen: axis": (lambda: nj.linen.RMSNorm(axis=1), "feature_axes=1 or reduction_axes=1"),
    "linen: training": (
        lambda: of_linen("BatchNorm", training=False),
        r"BatchNorm: training=.*Write use_running_average=True\.",
    ),
    "linen: no mode": (lambda: of_linen("RMSNorm", train=True), "RMSNorm: train=.*Drop it"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_arguments_of_other_libraries_are_translated(case):
    call, message = FOREIGN[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_other_errors_of_a_constructor_are_its_own():
    with pytest.raises(TypeError, match="missing 1 required.*'num_features'"):
        nj.nnx.BatchNorm(rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_signatures_are_exact(layer, rng):
    parameters = inspect.signature(layer.apply).parameters
    assert [*parameters][:2] == ["params", "batch_stats"] and "_foreign" not in parameters
    assert parameters["train"].default is inspect.Parameter.empty
    params, batch_stats, x = arguments(layer, {}, rng)
    with pytest.raises(TypeError, match="train=False"):
        layer.apply(params, batch_stats, x, use_running_average=True)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_swapped_trees_are_named(layer, rng):
    params, batch_stats, x = arguments(layer, {}, rng)
    if not (params or batch_stats):
        params = {"scale": jnp.ones(x.shape[-1])}
    with pytest.raises(ValueError, match=f"{layer.name.split('.')[-1]}: .*the two are swapped"):
        layer.apply(batch_stats, params, x, True)


SWAPPED = {
    "update_batch_stats": (lambda: nj.update_batch_stats(PARAMS, nj.moments(X, 0)), "are swapped"),
    "fold_batch_norm": (lambda: nj.fold_batch_norm(X, None, STATS, PARAMS), "are swapped"),
    "variables": (
        lambda: nj.batch_norm({"params": PARAMS, "batch_stats": STATS}, STATS, X, True),
        r"params contains whole collections.*variables\[\"params\"\]",
    ),
    "x first": (lambda: nj.batch_norm(X, PARAMS, STATS, True), "x of type dict.*The order is"),
    "x in the middle": (lambda: nj.batch_norm(PARAMS, X, STATS, True), "x of type dict.*The order"),
    "x for params": (lambda: nj.batch_norm(X, STATS, X, True), "params is an array.*The order is"),
    "a batch for x": (
        lambda: nj.batch_norm(PARAMS, STATS, (X, X), True),
        r"x of type tuple with 2 arrays.*\(images, labels\)",
    ),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_arguments_in_another_order_are_named(case):
    call, message = SWAPPED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


PLACES = {
    "BatchNorm": "normjax.linen.BatchNorm and normjax.nnx.BatchNorm.*normjax.batch_norm",
    "RMSNorm": "normjax.linen.RMSNorm and normjax.nnx.RMSNorm.*normjax.rms_norm",
    "DynamicTanh": "normjax.nnx.DynamicTanh.*normjax.dynamic_tanh",
    "WeightNorm": "normjax.linen.WeightNorm.*normjax.weights.weight_norm",
    "BatchNorm2d": "normjax.linen.BatchNorm and",
    "BatchNormalization": "normjax.nnx.BatchNorm;",
    "spectral_norm": "Did you mean normjax.weights.spectral_norm",
    "lint": "Did you mean normjax.diagnostics.lint",
    "batchnorm": "Did you mean normjax.batch_norm",
    "zzz": "'zzz'.$",
}


@pytest.mark.parametrize("name", PLACES)
def test_the_top_level_says_where_a_name_is(name):
    with pytest.raises(AttributeError, match=f"module 'normjax' has no attribute.*{PLACES[name]}"):
        getattr(nj, name)


@pytest.mark.parametrize("package", [nj.linen, nj.nnx], ids=lambda package: package.__name__)
@pytest.mark.parametrize(
    ("name", "here"), [("BatchNorm2d", "BatchNorm"), ("Groupnorm", "GroupNorm")]
)
def test_the_packages_of_flax_know_the_classes_of_other_libraries(package, name, here):
    message = f"module '{package.__name__}' has no attribute '{name}'. Did you mean .*{here}?"
    with pytest.raises(AttributeError, match=message):
        getattr(package, name)
    assert not hasattr(package, "zzz")


IMAGES, LABELS = np.ones((8, 3), np.float32), np.arange(8)
BATCHES = {
    "a tuple": ((IMAGES, LABELS), r"batch\[0\].*tuple of 2: float32\(8, 3\), int64\(8,\)"),
    "of one shape": ((IMAGES, IMAGES), r"batch\[0\]"),
    "strings": ((IMAGES, ["cat"] * 8), r"batch\[0\].*, list"),
    "a dict": ({"label": LABELS, "image": IMAGES}, r"batch\['image'\].*dict of 2"),
}


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("case", BATCHES)
def test_recalibrate_says_which_part_of_a_batch_the_model_takes(case, layer_by_layer):
    def apply_fn(variables, x):
        return nj.batch_norm(*variables, x, train=True)

    batch, message = BATCHES[case]
    with pytest.raises(
        TypeError, match=f"recalibrate: apply_fn does not accept batch 0.*{message}"
    ):
        nj.recalibrate(apply_fn, (PARAMS, STATS), [batch], layer_by_layer=layer_by_layer)


def test_recalibrate_lets_errors_of_the_model_through():
    with pytest.raises(ZeroDivisionError):
        nj.recalibrate(lambda variables, batch: 1 // 0, (PARAMS, STATS), [(IMAGES, LABELS)])
    with pytest.raises(ZeroDivisionError):
        nj.recalibrate(lambda variables, batch: 1 // 0, (PARAMS, STATS), [IMAGES])


EXTRAS = {
    "matplotlib": (
        lambda: importlib.import_module("normjax.diagnostics.plot"),
        "normjax.diagnostics.plot: plots are drawn with matplotlib",
        r'pip install "normjax\[diagnostics\]"',
    ),
    "safetensors.numpy": (
        lambda: nj.convert.from_torch("net.safetensors"),
        "from_torch: reading 'net.safetensors' requires the package safetensors",
        r'pip install "normjax\[diagnostics\]"',
    ),
}


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    use, problem, install = EXTRAS[package]
    for name in [name for name in sys.modules if name.startswith("normjax.diagnostics.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{problem}, which is not installed.*{install}"):
        use()
