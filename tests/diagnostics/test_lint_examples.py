"""No false alarm on the models of `examples/`, with their batches, steps and optimizers."""

import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

import normjax as nj
from normjax.diagnostics import lint

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
KEY = jax.random.key(0)
UNITS = (
    "none", "batch", "renorm", "group", "layer", "filter response", "dynamic tanh", "weight norm",
    "weight standardization",
)  # fmt: skip


def shapes(function, *args):
    return jax.eval_shape(lambda: function(*args))


def values(function, *args):
    return jax.jit(lambda: function(*args))()


@pytest.fixture(autouse=True)
def examples(monkeypatch, promotion_as_in_flax):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def optimizer(steps):
    return optax.chain(
        optax.add_decayed_weights(1e-4, mask=nj.optim.decay_mask),
        optax.sgd(
            optax.warmup_cosine_decay_schedule(0.0, 0.1, steps // 10, steps),
            momentum=0.9,
            nesterov=True,
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_the_networks_of_speedup(normalize, activation):
    from common import networks
    from studies.speedup.inception import inception

    unit = networks.style(normalize, activation)
    for network, image, batch in (
        (networks.mlp(unit), (8, 8, 1), 60),
        (inception(unit), (32, 32, 3), 32),
    ):
        variables = shapes(network.init, KEY, image, 10)
        x = jax.ShapeDtypeStruct((batch, *image), jnp.float32)
        assert (
            lint(lambda v, x, apply=network.apply: apply(*v, x, True), variables, x, steps=500)
            == ()
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("norm", ["PLAIN", "LAYER", "BATCH"])
def test_the_cells_of_recurrent(kind, norm):
    from studies.recurrent import cells

    cell = getattr(cells, kind)(getattr(cells, norm))
    variables = values(cell.init, KEY, 8, 16, 6)

    def apply(variables, x):
        outputs, state, batch_stats = cells.unroll(cell, *variables, x, True)
        return (outputs, state), batch_stats

    for length in (6, 8):  # within and beyond the statistics of each step
        assert (
            lint(apply, variables, jnp.ones((64, length, 8)), steps=600, optimizer=optimizer(600))
            == ()
        )


@pytest.mark.slow
def test_the_ways_of_domains_to_share():
    from studies.domains import ways

    for way in ways.WAYS.values():
        variables = values(way.init, ways.NETWORK, KEY, (1, 64, 1), 3)
        x = jnp.ones((3, 32, 64))

        def apply(variables, x, way=way):
            return way.train(ways.NETWORK, *variables, x)

        assert lint(apply, variables, x, steps=300) == ()


@pytest.mark.slow
def test_the_network_of_quantize():
    from studies.quantize import study as quantize

    model = quantize.Network(8)
    x = jnp.ones((32, 8, 8, 1))
    variables = shapes(model.init, KEY, x)

    def apply(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    assert lint(apply, variables, x, steps=300, optimizer=optimizer(300)) == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, sharing",
    [
        ("resnet8", {}),
        ("resnet8", {"virtual_batch_size": 16}),
        ("resnet8", {"axis_name": "data", "axis_index_groups": ((0, 1), (2, 3))}),
        ("resnet50", {"axis_name": "data"}),
    ],
    ids=str,
)
def test_the_networks_of_train_resnet(network, sharing):
    from train_resnet import resnet

    model = resnet.ResNet(network, 16, 10, resnet.Sharing(**sharing))
    x = jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32)
    variables = shapes(resnet.ResNet(network, 16, 10).init, KEY, jnp.ones((1, 32, 32, 3)), False)
    if network == "resnet8":  # of the other, what scales start at is not looked at
        variables = values(
            resnet.ResNet(network, 16, 10).init, KEY, jnp.ones((1, 32, 32, 3)), False
        )

    def apply(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    mapped = {"axis_name": "data", "axis_size": 4} if "axis_name" in sharing else {}
    assert lint(apply, variables, x, steps=300, optimizer=optimizer(300), **mapped) == ()


@pytest.mark.slow
def test_the_network_of_from_torch():
    import from_torch

    x = jnp.ones((8, 64, 64, 3))
    model, variables = from_torch.load(from_torch.trained(10), 10)

    def apply(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    assert lint(apply, variables, x, steps=300) == ()
    assert lint(apply, values(model.init, KEY, x[:1], False), x, steps=300) == ()


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_the_units_and_the_vgg(unit):
    from common import networks

    assert set(networks.UNITS) == set(UNITS)
    network = networks.vgg(networks.UNITS[unit])
    variables = shapes(network.init, KEY, (8, 8, 1), 10)
    x = jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.float32)
    assert (
        lint(
            lambda v, x: network.apply(*v, x, True),
            variables,
            x,
            steps=300,
            optimizer=optimizer(300),
        )
        == ()
    )


@pytest.mark.slow
def test_the_encoders_of_contrastive():
    from studies.contrastive import encoder as contrastive

    for way in contrastive.WAYS.values():
        encoder = contrastive.Encoder(way.unit, (16, 32))
        variables = shapes(encoder.init, KEY, 1)

        def apply(variables, x, encoder=encoder, way=way):
            params, batch_stats = variables
            first, second = (contrastive.augment(key, x) for key in jax.random.split(KEY))
            queries, batch_stats = encoder.embed(params, batch_stats, first, True)
            keys, batch_stats = encoder.embed(params, batch_stats, second, True)
            if way.own_statistics:
                batch_stats = nj.sync_batch_stats(batch_stats, contrastive.AXIS)
            return (queries, keys), batch_stats

        x = jax.ShapeDtypeStruct((32, 8, 8, 1), jnp.float32)
        assert lint(apply, variables, x, steps=300, axis_name=contrastive.AXIS, axis_size=4) == ()


@pytest.mark.slow
def test_the_ways_of_adversarial_pairs():
    from common.networks import style
    from studies.adversarial_pairs import ways as adversarial
    from studies.speedup.inception import inception

    network = inception(style(True, "relu"))
    x = jnp.ones((32, 8, 8, 1))
    for way in adversarial.WAYS.values():
        variables = values(way.init, network, KEY, (8, 8, 1), 2)

        def apply(variables, x, way=way):
            return way.train(network, *variables, jnp.stack([x, x]))

        assert lint(apply, variables, x, steps=300) == ()


@pytest.mark.slow
def test_the_methods_of_small_batch():
    from common.networks import vgg
    from studies.small_batch import study as small_batch

    for method in small_batch.methods(300).values():
        network = vgg(method.unit, [[8], [8], [8]], stride=2)
        if method.on_devices:
            network = small_batch.on_devices(network)
        variables = shapes(network.init, KEY, (8, 8, 1), 10)
        x = jax.ShapeDtypeStruct(
            (small_batch.DEVICES * small_batch.REFERENCE, 8, 8, 1), jnp.float32
        )
        assert (
            lint(lambda v, x, apply=network.apply: apply(*v, x, True), variables, x, steps=300)
            == ()
        )


@pytest.mark.slow
def test_the_networks_of_covariate_shift():
    from studies.covariate_shift import noise

    for normalize, disturbed in ((False, False), (True, False), (True, True)):
        network = noise.Sigmoids(normalize, disturbed).network
        variables = values(network.init, KEY, (8, 8, 1), 10)
        x = jax.ShapeDtypeStruct((60, 8, 8, 1), jnp.float32)
        assert (
            lint(lambda v, x, apply=network.apply: apply(*v, x, True), variables, x, steps=300)
            == ()
        )


@pytest.mark.parametrize("norm", ["layer norm", "RMS norm"])
def test_the_language_model_of_cross_batch_attention(norm):
    from studies.cross_batch_attention import memory

    model = memory.LanguageModel(memory.NORMS[norm], vocabulary=20, length=12)
    tokens = jax.ShapeDtypeStruct((4, 12), jnp.int32)

    def apply(params, tokens):
        return model.answer(params, tokens, model.remember(params, tokens), jnp.eye(4, dtype=bool))

    assert lint(apply, shapes(model.init, KEY), tokens, steps=300) == ()
