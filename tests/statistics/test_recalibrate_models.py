"""`recalibrate` for models of Flax, and under sharding."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core, nnx
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.statistics.populations import PROMISED, ROUNDED, in_float64, init, make, merged, network

pytestmark = [pytest.mark.usefixtures("promotion_as_in_flax"), pytest.mark.slow]
SETTINGS = [{}, {"estimate": "averaged"}, {"layer_by_layer": True}]


class Net(nn.Module):
    """`network` with the linen adapters."""

    norm: type[nn.Module] = nj.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        for i in range(3):
            x = nn.Dense(5, use_bias=False, name=f"dense_{i}")(x)
            x = nn.relu(self.norm(use_running_average=not train, name=f"norm_{i}")(x))
        return x


class NNXNet(nnx.Module):
    """`network` with the nnx adapters."""

    def __init__(self, variables, norm=nj.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List()
        for params in variables["params"]:
            size, width = params["kernel"].shape
            dense, own = nnx.Linear(size, width, use_bias=False, rngs=rngs), norm(width, rngs=rngs)
            dense.kernel[...], own.scale[...], own.bias[...] = (
                params["kernel"],
                *map(params["norm"].get, LEAVES),
            )
            self.blocks.append(nnx.Sequential(dense, own, nnx.relu))

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


LEAVES = ("scale", "bias")


def linen_apply(variables, x, train=True, net=None):
    return (net or Net()).apply(variables, x, train, mutable=["batch_stats"])


def as_linen(variables):
    params, batch_stats = {}, {}
    for i, (own, running) in enumerate(
        zip(variables["params"], variables["batch_stats"], strict=True)
    ):
        params |= {f"dense_{i}": {"kernel": own["kernel"]}, f"norm_{i}": own["norm"]}
        batch_stats[f"norm_{i}"] = running
    return {"params": params, "batch_stats": batch_stats}


@pytest.mark.parametrize("settings", SETTINGS)
def test_linen_is_the_functional_model(rng, settings):
    variables, batches = init(rng), make(rng)
    expected = as_linen(nj.recalibrate(network, variables, batches, **settings))
    given = as_linen(variables) | {"other": {"kept": jnp.ones(2)}}
    found = nj.recalibrate(linen_apply, given, batches, **settings)
    assert_identical(found.pop("other"), given["other"])
    assert_trees_close(found, expected, **ROUNDED)
    frozen = nj.recalibrate(jax.jit(linen_apply), core.freeze(given), batches, **settings)
    assert isinstance(frozen, core.FrozenDict)
    assert_identical(core.unfreeze(frozen)["batch_stats"], found["batch_stats"])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "apply_fn", [lambda model, x: model(x), nnx.jit(lambda model, x: model(x))]
)
def test_nnx_is_the_functional_model_and_updated_itself(rng, settings, apply_fn):
    variables, batches = init(rng), make(rng)
    expected = nj.recalibrate(network, variables, batches, **settings)["batch_stats"]
    model = NNXNet(variables)
    graph = nnx.graphdef(model)
    assert nj.recalibrate(apply_fn, model, batches, **settings) is model
    found = [
        {leaf: getattr(block.layers[1], leaf)[...] for leaf in ("mean", "var")}
        for block in model.blocks
    ]
    assert_trees_close(found, expected, **ROUNDED)
    assert nnx.graphdef(model) == graph


@pytest.mark.parametrize("train", [True, False])
def test_layer_by_layer_in_either_mode(rng, train):
    variables, batches = init(rng), make(rng)
    expected = in_float64(variables, batches, "population")
    found = nj.recalibrate(
        partial(linen_apply, train=train), as_linen(variables), batches, layer_by_layer=True
    )
    assert_trees_close(list(found["batch_stats"].values()), expected, **ROUNDED)
    model = NNXNet(variables)
    model.train() if train else model.eval()
    nj.recalibrate(lambda model, x: model(x), model, batches, layer_by_layer=True)
    assert_close(model.blocks[2].layers[1].var[...], expected[2]["var"], **ROUNDED)


def test_an_interrupt_leaves_everything_as_it_was(rng):
    model = NNXNet(init(rng))
    before = jax.tree.map(jnp.copy, nnx.state(model))

    def interrupted():
        yield from make(rng)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nj.recalibrate(lambda model, x: model(x), model, interrupted(), progress=True)
    assert_identical(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(before))
    assert not hasattr(model.blocks[0].layers[1], "population")


def test_shared_layers_see_all_their_inputs(rng):
    batches = make(rng)

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nj.linen.BatchNorm(use_running_average=False)
            return norm(x), norm(3 * x[:4])

    class NNXShared(nnx.Module):
        def __init__(self):
            self.norm = nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.same = self.norm

        def __call__(self, x):
            return self.norm(x), self.same(3 * x[:4])

    expected = merged([*batches, *(3 * x[:4] for x in batches)])
    variables = Shared().init(jax.random.key(0), batches[0])
    found = nj.recalibrate(
        lambda v, x: Shared().apply(v, x, mutable=["batch_stats"]), variables, batches
    )
    assert_trees_close(found["batch_stats"]["BatchNorm_0"], expected, **PROMISED)
    model = nj.recalibrate(lambda model, x: model(x), NNXShared(), batches)
    assert_close(model.norm.var[...], expected["var"], **PROMISED)


def test_lifted_transformations_of_linen(rng):
    """Three layers in nn.scan and remat; old statistics must not affect the result."""
    batches = [
        x @ np.ones((3, 5), np.float32) + rng.normal(size=(len(x), 5)).astype(np.float32)
        for x in make(rng)
    ]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nj.linen.BatchNorm(use_running_average=False)(nn.Dense(5)(x))), None

    stack = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )
    variables = stack().init(jax.random.key(0), batches[0], None)
    apply_fn = lambda v, x: stack().apply(v, x, None, mutable=["batch_stats"])  # noqa: E731
    found = nj.recalibrate(apply_fn, variables, batches, layer_by_layer=True)["batch_stats"][
        "BatchNorm_0"
    ]
    dense, norm = variables["params"]["Dense_0"], variables["params"]["BatchNorm_0"]
    params = [
        {"kernel": jnp.concatenate([dense["kernel"][i], dense["bias"][None, i]]),
         "norm": {leaf: norm[leaf][i] for leaf in LEAVES}} for i in range(3)
    ]  # fmt: skip
    xs = [x.astype(np.float64) for x in batches]
    for i, own in enumerate(params):
        xs = [
            np.concatenate([x, np.ones((len(x), 1))], 1) @ np.asarray(own["kernel"], np.float64)
            for x in xs
        ]
        seen = merged(xs)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], found), seen, **ROUNDED)
        xs = [np.maximum((x - seen["mean"]) / np.sqrt(seen["var"] + 1e-5), 0) for x in xs]


def test_nnx_layers_stacked_by_vmap(rng):
    batches = make(rng)

    @nnx.vmap
    def stacked(rngs):
        return nj.nnx.BatchNorm(3, rngs=rngs)

    model = stacked(nnx.Rngs(0).split(2))
    both = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, 0))
    nj.recalibrate(lambda model, x: both(model, jnp.stack([x, 2 * x])), model, batches)
    assert_close(
        model.var[...], np.stack([merged(batches)["var"], 4 * merged(batches)["var"]]), **PROMISED
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_frozen_layers_keep_their_statistics(rng, settings):
    batches = make(rng)

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nj.linen.BatchNorm(use_running_average=False, frozen=True)(x)
            return nj.linen.BatchNorm(use_running_average=False)(x)

    variables = Half().init(jax.random.key(0), batches[0])
    found = nj.recalibrate(
        lambda v, x: Half().apply(v, x, mutable=["batch_stats"]), variables, batches, **settings
    )
    assert_identical(found["batch_stats"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    assert (found["batch_stats"]["BatchNorm_1"]["mean"] != 0).all()
    frozen = nj.nnx.BatchNorm(3, frozen=True, rngs=nnx.Rngs(0))
    model = nnx.Sequential(frozen, nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    nj.recalibrate(lambda model, x: model(x), model, batches, **settings)
    assert (frozen.mean[...] == 0).all() and (model.layers[1].mean[...] != 0).all()


def test_dtypes_of_the_adapters(rng):
    """bfloat16 inputs and statistics, complex x, batch renorm with a count, a cumulative mean."""
    batches = make(rng)
    norm = nj.linen.BatchNorm(use_running_average=False, param_dtype=jnp.bfloat16)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in batches]
    variables = norm.init(jax.random.key(0), halves[0])
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    apply_fn = lambda v, x: norm.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    found = nj.recalibrate(apply_fn, variables, halves)["batch_stats"]
    assert found["mean"].dtype == jnp.bfloat16
    assert_identical(found["var"], merged(halves)["var"].astype(jnp.bfloat16))
    complex_norm = nj.linen.BatchNorm(use_running_average=False)
    turned = [x + 1j * x[::-1] for x in batches]
    variables = complex_norm.init(jax.random.key(0), batches[0])
    found = nj.recalibrate(
        lambda v, x: complex_norm.apply(v, x, mutable=["batch_stats"]), variables, turned
    )
    assert_close(
        found["batch_stats"]["mean"], np.concatenate(turned).mean(0), rtol=1e-5, dtype=jnp.complex64
    )
    renorm = nj.nnx.BatchRenorm(3, rngs=nnx.Rngs(0))
    renorm.count[...] = jnp.int32(5)
    nj.recalibrate(lambda model, x: model(x), renorm, batches)
    assert renorm.count[...] == 5
    assert_close(renorm.mean[...], merged(batches)["mean"], **PROMISED)
    cumulative = nj.nnx.BatchNorm(3, momentum=None, running_var="unbiased", rngs=nnx.Rngs(0))
    nj.recalibrate(lambda model, x: model(x), cumulative, batches)
    assert cumulative.count[...] == len(batches)
    assert_close(cumulative.var[...], merged(batches, ddof=1)["var"], **PROMISED)


# Under sharding: 8 devices, batches of 16 and a smaller last one.


@pytest.fixture
def sharded(rng):
    return init(rng), make(rng, sizes=(16, 16, 8))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((AxisType.Explicit, settings) for settings in SETTINGS), (AxisType.Auto, SETTINGS[-1])],
)
def test_batches_sharded_under_jit_are_one_batch(sharded, kind, settings):
    variables, batches = sharded
    expected = nj.recalibrate(network, variables, batches, **settings)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    traced = []

    def apply_fn(variables, x):
        traced.append(x.shape)
        return network(variables, x)

    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches]
        given = jax.device_put(variables, NamedSharding(mesh, P()))
        found = nj.recalibrate(apply_fn, given, placed, **settings)
        assert traced == [(16, 3), (8, 3)]
        assert found["batch_stats"][0]["mean"].sharding.is_fully_replicated
    assert_trees_close(found, expected, **ROUNDED)


@pytest.mark.parametrize(
    ("kind", "check_vma", "settings"),
    [
        (AxisType.Explicit, True, SETTINGS[0]),
        (AxisType.Auto, False, SETTINGS[1]),
        (AxisType.Explicit, True, SETTINGS[2]),
        (AxisType.Auto, False, SETTINGS[2]),
    ],
)
def test_models_with_an_axis_name_under_shard_map(sharded, kind, check_vma, settings):
    variables, batches = sharded
    expected = nj.recalibrate(network, variables, batches, **settings)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    apply_fn = jax.shard_map(
        partial(network, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
        check_vma=check_vma,
    )
    placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches]
    assert_trees_close(nj.recalibrate(apply_fn, variables, placed, **settings), expected, **ROUNDED)


def test_a_progress_bar_is_shown_when_asked_for(rng, capsys):
    variables, batches = init(rng), make(rng)
    nj.recalibrate(network, variables, batches)
    assert capsys.readouterr().out == ""
    nj.recalibrate(network, variables, batches, progress=True)
    assert "4/4" in capsys.readouterr().out
    nj.recalibrate(network, variables, iter(batches), progress=True)
    assert "recalibrate" in capsys.readouterr().out
    nj.recalibrate(network, variables, batches, progress=True, layer_by_layer=True)
    assert "pass 4" in capsys.readouterr().out


def test_without_rich_there_is_no_bar(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    nj.recalibrate(network, init(rng), make(rng))
    with pytest.raises(
        ImportError, match="recalibrate: progress=True shows a bar of rich.*pip install rich"
    ):
        nj.recalibrate(network, init(rng), make(rng), progress=True)
