"""What parameters are, by their names: over linen, nnx, Haiku and plain trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.optim import decay_mask, kind_of


class Linen(nn.Module):
    """One of each layer that has parameters."""

    @nn.compact
    def __call__(self, tokens, images):
        x = nn.Embed(10, 8)(tokens)
        x = nj.linen.LayerNorm()(x)
        x = nn.MultiHeadDotProductAttention(2)(x, x)
        x = nj.linen.RMSNorm()(x)
        x = nj.linen.WeightNorm(nn.Dense(8))(x)
        x = nj.linen.SpectralNorm(nn.Dense(8))(x, update_stats=True)
        x = nn.RNN(nn.OptimizedLSTMCell(8))(x)
        x = nj.linen.DynamicTanh()(x)
        x = nn.Dense(
            8, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        )(x)
        y = nn.Conv(4, (3, 3))(images)
        y = nj.linen.BatchNorm(use_running_average=False)(y)
        y = nj.linen.FilterResponseNorm()(nn.ConvTranspose(4, (3, 3))(y))
        return x.sum() + nn.PReLU()(y).sum()


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(10, 8, rngs=rngs)
        self.norms = nnx.List([nj.nnx.LayerNorm(8, rngs=rngs), nj.nnx.RMSNorm(8, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.weight_norm = nj.nnx.WeightNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.spectral_norm = nj.nnx.SpectralNorm(nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.cell = nnx.OptimizedLSTMCell(8, 8, rngs=rngs)
        self.tanh = nj.nnx.DynamicTanh(8, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.bn = nj.nnx.BatchNorm(4, rngs=rngs)
        self.lora = nnx.LoRA(8, 2, 8, rngs=rngs)


@pytest.fixture(scope="module")
def linen():
    """The shapes of the variables, which suffice."""
    inputs = np.zeros((2, 3), int), np.ones((2, 5, 5, 3), np.float32)
    with jax.numpy_dtype_promotion("standard"):
        return jax.eval_shape(Linen().init, jax.random.key(0), *inputs)


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))


def flat(tree):
    """Leaves by the names on their paths."""
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_linen(linen):
    kinds = flat(kind_of(linen))
    expected = {"kernel", "embedding", "scale", "bias", "activation", "statistic"}
    assert set(kinds.values()) == expected
    own = {"kernel": "kernel", "bias": "bias", "scale": "scale", "embedding": "embedding"}
    own |= {"alpha": "activation", "threshold": "activation", "negative_slope": "activation"}
    for path, kind in kinds.items():
        name = path.removesuffix(".value").rstrip("']").split("'")[-1].split("/")[-1]
        assert kind == ("statistic" if "batch_stats" in path else own[name]), path
    assert kinds["['params']['WeightNorm_0']['Dense_0/kernel/scale']"] == "scale"
    assert linen["params"]["MultiHeadDotProductAttention_0"]["query"]["bias"].ndim == 2


@pytest.mark.slow
def test_the_mask_of_linen_has_the_structure_of_params(linen):
    params = linen["params"]
    mask = decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert {type(leaf) for leaf in jax.tree.leaves(mask)} == {bool}
    decayed = {path for path, leaf in flat(mask).items() if leaf}
    assert decayed == {
        path for path in flat(mask) if path.split("'")[-2] in ("kernel", "embedding")
    }


@pytest.mark.parametrize(
    "of",
    [
        lambda m: m,
        lambda m: nnx.state(m, nnx.Param),
        lambda m: nnx.as_pure(nnx.state(m, nnx.Param)),
    ],
)
def test_nnx(of, model):
    kinds = flat(kind_of(of(model)))
    assert kinds["['weight_norm']['scales'][('kernel',)]"] == "scale"
    assert kinds["['weight_norm']['layer_instance']['kernel']"] == "kernel"
    assert kinds["['attention']['query']['bias']"] == "bias"
    assert kinds["['norms'][1]['scale']"] == "scale"
    assert kinds["['tanh']['alpha']"] == "activation"
    assert kinds["['lora']['lora_b']"] == "kernel"
    assert kinds["['cell']['dense_i']['kernel']"] == "kernel"
    assert "statistic" not in kinds.values()


def test_the_whole_state_of_an_nnx_model_has_statistics(model):
    kinds = flat(kind_of(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    assert kinds["['spectral_norm']['batch_stats'][('kernel', 'u')]"] == "statistic"
    assert kinds["['bn']['var']"] == "statistic"


FUNCTIONAL = {
    "layers": [{"w": (3, 4), "b": (4,)}, {"weight": (4, 4), "bias": (4,)}, {"kernel": (4,)}],
    "norm": {"scale": (10, 4), "bias": (10, 4)},
    "block": {
        "bn_1": {"weight": (4,), "bias": (4,)},
        "LayerNorm_0": {"w": (2, 4)},
        "w_q": (4, 2, 2),
        "b_q": (2, 2),
    },
    "weight_norm": {"w": (4, 4), "scale": (4,)},
    "frn": {"threshold": (4,), "epsilon": (4,)},
    "spectral": {"u": (1, 4), "sigma": ()},
    "pos_embedding": (1, 7, 4),
    "w1": (4, 4),
    "linear/~/w": {"w_i": (4,)},
}
EXPECTED = {
    "layers": [
        {"w": "kernel", "b": "bias"},
        {"weight": "kernel", "bias": "bias"},
        {"kernel": "kernel"},
    ],
    "norm": {"scale": "scale", "bias": "bias"},
    "block": {
        "bn_1": {"weight": "scale", "bias": "bias"},
        "LayerNorm_0": {"w": "scale"},
        "w_q": "kernel",
        "b_q": "bias",
    },
    "weight_norm": {"w": "kernel", "scale": "scale"},
    "frn": {"threshold": "activation", "epsilon": "activation"},
    "spectral": {"u": "statistic", "sigma": "statistic"},
    "pos_embedding": "embedding",
    "w1": "kernel",
    "linear/~/w": {"w_i": "kernel"},
}


def zeros(shapes):
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.slow
def test_plain_trees():
    assert kind_of(zeros(FUNCTIONAL)) == EXPECTED


def test_shapes_suffice():
    assert kind_of(jax.eval_shape(lambda: zeros(FUNCTIONAL))) == EXPECTED


@pytest.mark.parametrize(
    "init",
    [nj.batch_norm_init, nj.layer_norm_init, nj.dynamic_tanh_init, nj.filter_response_norm_init],
)
def test_no_parameter_of_a_normalization_decays(init):
    assert not any(jax.tree.leaves(decay_mask({"dense": init(4)[0]})))


def test_haiku():
    import haiku as hk

    network = hk.transform(lambda x: hk.LayerNorm(-1, True, True)(hk.Linear(4)(hk.Embed(10, 4)(x))))
    params = jax.eval_shape(network.init, jax.random.key(0), np.zeros((2,), int))
    assert kind_of(params) == {
        "embed": {"embeddings": "embedding"},
        "layer_norm": {"offset": "bias", "scale": "scale"},
        "linear": {"b": "bias", "w": "kernel"},
    }


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({"vit": {"cls": (1, 1, 4)}}, "params['vit']['cls'] of shape (1, 1, 4)"),
        ({"0": {"weight": (4,)}}, "params['0']['weight'] of shape (4,)"),
        ({"a": [(4, 4)]}, "params['a'][0] of shape (4, 4)"),
        ({"u": (4, 4)}, "params['u'] of shape (4, 4)"),
        ({"w_scale": (4,)}, "params['w_scale'] of shape (4,)"),
        ((3, 4), "params of shape (3, 4)"),
    ],
)
def test_a_name_that_says_nothing_is_refused_by_its_path(params, path):
    with pytest.raises(
        ValueError, match="kind_of: names do not determine the kinds of parameters"
    ) as error:
        kind_of(zeros(params))
    assert path in str(error.value) and "names={" in str(error.value)


def test_users_have_the_last_word():
    params = zeros({"vit": {"cls": (1, 1, 4), "head": {"table": (4, 4)}, "bias": (4,)}})
    names = {"cls": "bias", "head/table": "kernel", "vit/bias": "scale"}
    assert kind_of(params, names=names) == {
        "vit": {"bias": "scale", "cls": "bias", "head": {"table": "kernel"}}
    }
    assert decay_mask(params, names=names) == {
        "vit": {"bias": False, "cls": False, "head": {"table": True}}
    }


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ValueError, match=r"kind_of: names\['w'\] is unknown.*names\['w'\]='kernels'"
    ):
        kind_of({"w": jnp.zeros(2)}, names={"w": "kernels"})
    with pytest.raises(ValueError, match="decay_mask: kinds is unknown.*'kernels'"):
        decay_mask({"w": jnp.zeros(2)}, kinds=("kernels",))


def test_embeddings_can_be_left_out():
    params = zeros({"embed": {"embedding": (4, 4)}, "dense": {"kernel": (4, 4)}})
    assert decay_mask(params) == {"embed": {"embedding": True}, "dense": {"kernel": True}}
    assert decay_mask(params, kinds=("kernel",)) == {
        "embed": {"embedding": False},
        "dense": {"kernel": True},
    }


def test_adamw_under_jit_decays_kernels_alone():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "cls": jnp.ones(2)}
    mask = functools.partial(decay_mask, names={"cls": "bias"})
    optimizer = optax.chain(optax.add_decayed_weights(0.1, mask=mask), optax.sgd(1.0))
    step = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    updates = step(jax.tree.map(jnp.zeros_like, params), params)
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.1, rtol=1e-6)
    assert not updates["dense"]["bias"].any() and not updates["cls"].any()


@pytest.mark.slow
def test_nnx_optimizer_decays_kernels_alone():
    # of any values: those that JAX draws take a program for each kernel
    graphdef, shapes, rest = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param, ...)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    model = nnx.merge(graphdef, ones, rest)
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.add_decayed_weights(0.5, mask=decay_mask), optax.sgd(1.0)),
        wrt=nnx.Param,
    )
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    kept = jax.tree.map(
        lambda old, new, decays: new == (old / 2 if decays else old),
        before,
        nnx.as_pure(nnx.state(model, nnx.Param)),
        decay_mask(model),
    )
    assert all(leaf.all() for leaf in jax.tree.leaves(kept))
