"""One clear error for what cannot be converted, which names the leaf as the source does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj

ONES = np.ones(3, np.float32)
BN = {
    "weight": ONES,
    "bias": ONES,
    "running_mean": ONES,
    "running_var": ONES,
    "num_batches_tracked": np.array(3),
}
NET = {f"layer1.0.bn1.{key}": value for key, value in BN.items()}
LIKE = (
    {"layer1": {"0": {"bn1": nj.batch_norm_init(3)[0]}}},
    {"layer1": {"0": {"bn1": nj.batch_norm_init(3)[1]}}},
)
KERNEL = np.ones((4, 3), np.float32)
SN = {"weight_orig": KERNEL, "weight_u": np.ones(4, np.float32), "weight_v": np.ones(3, np.float32)}
BAD = np.array([1, np.nan, np.inf], np.float32)

FROM_TORCH = {
    "a statistic that is not finite": (
        NET | {"layer1.0.bn1.running_mean": BAD},
        None,
        r"'layer1\.0\.bn1\.running_mean' has values.*2 of 3 that are not, such as nan at \(1,\)",
    ),
    "a negative variance": (
        NET | {"layer1.0.bn1.running_var": -ONES},
        None,
        r"running_var' has values.*such as -1\.0",
    ),
    "half of the statistics": (
        {key: value for key, value in NET.items() if "var" not in key},
        None,
        r"'layer1\.0\.bn1\.running_var' is missing",
    ),
    "a leaf that the model has": (
        {key: value for key, value in NET.items() if "bias" not in key},
        LIKE,
        r"'layer1\.0\.bn1\.bias' is missing.*params/layer1/0/bn1/bias of `like`.*bn1\.weight",
    ),
    "a module that the model has": (
        {},
        LIKE,
        r"'layer1\.0\.bn1\.\w+' is missing.*nothing of the same module, among 0",
    ),
    "a leaf that the model has not": (
        NET | {"fc.bias": ONES},
        LIKE,
        r"'fc\.bias' has no counterpart.*got params/fc/bias of shape \(3,\)",
    ),
    "another number of features": (
        {key: np.ones(5) if value.ndim else value for key, value in NET.items()},
        LIKE,
        r"'layer1\.0\.bn1\.\w+' has the wrong shape. "
        r"Expected shape \(3,\), as in `like`; got shape \(5,\)",
    ),
    "leaves that do not fit together": (
        NET | {"layer1.0.bn1.running_var": np.ones(4), "layer1.0.bn1.running_mean": np.ones(4)},
        None,
        r"running_mean' has the wrong shape. "
        r"Expected shape \(3,\), as 'layer1\.0\.bn1\.weight' has; got shape \(4,\)",
    ),
    "an unknown key": (
        NET | {"head.in_proj_weight": ONES},
        None,
        r"'head\.in_proj_weight' has no counterpart",
    ),
    "what is no array": (
        {"bn.weight": "ones"},
        None,
        "'bn.weight' is not an array. Expected numbers; got <U4",
    ),
    "weight_norm by halves": (
        {"fc.weight_v": KERNEL},
        None,
        r"weight_g is missing.*\['fc\.weight_v'\]",
    ),
    "spectral_norm by halves": (
        {"fc.weight_orig": KERNEL},
        None,
        r"weight_u is missing.*\['fc\.weight_orig'\]",
    ),
    "a u of another kernel": (
        SN | {"weight_u": ONES},
        None,
        r"'weight_u' does not fit its kernel.*\(4, 3\)",
    ),
    "a u that is not finite": (
        SN | {"weight_u": np.full(4, np.nan)},
        None,
        "'weight_u' has values",
    ),
    "a checkpoint around the state_dict": (
        {"state_dict": NET},
        None,
        "'state_dict' is not an array",
    ),
    "like of one tree": (NET, LIKE[0], "like is not a pair of trees.*got dict"),
}


@pytest.mark.parametrize("case", FROM_TORCH)
def test_from_torch(case):
    source, like, message = FROM_TORCH[case]
    with pytest.raises((ValueError, TypeError), match=f"(?s)from_torch: .*{message}"):
        nj.convert.from_torch(source, like=like)


def test_a_count_beyond_int32_stays_at_its_end():
    _, batch_stats = nj.convert.from_torch(BN | {"num_batches_tracked": np.array(2**40)})
    assert batch_stats["count"] == 2**31 - 1
    with pytest.raises(
        ValueError, match="'num_batches_tracked' has values.*at least 0.*such as -1"
    ):
        nj.convert.from_torch(BN | {"num_batches_tracked": np.array(-1)})


def test_a_conversion_under_jit():
    with pytest.raises(TypeError, match="to_torch: params/scale is traced.*outside of jax.jit"):
        jax.jit(lambda params: nj.convert.to_torch(params, {}))({"scale": ONES})


def test_a_source_that_holds_no_arrays():
    with pytest.raises(TypeError, match="from_torch: the source contains no arrays.*got list"):
        nj.convert.from_torch([ONES])
    with pytest.raises(
        ValueError,
        match=r"from_torch: the file is not a .safetensors file.*'net\.pth'.*torch\.load",
    ):
        nj.convert.from_torch("net.pth")


PARAMS, STATS = nj.batch_norm_init(3)
TO_TORCH = {
    "a statistic that is not finite": (
        PARAMS,
        STATS | {"var": jnp.asarray(BAD)},
        None,
        "'batch_stats/var' has values",
    ),
    "half of the statistics": (
        PARAMS,
        {"mean": STATS["mean"]},
        None,
        "'batch_stats/var' is missing",
    ),
    "leaves that do not fit together": (
        PARAMS,
        nj.batch_norm_init(4)[1],
        None,
        r"'batch_stats/mean' has the wrong shape",
    ),
    "what is no tree": ([ONES], {}, None, "params is not a tree.*got list"),
    "what is no array": ({"scale": [1.0]}, {}, None, "params/scale is not a leaf.*got list"),
    "another module": (
        PARAMS,
        STATS,
        NET,
        r"'weight' is only in params and batch_stats.*the 5 keys of `like`",
    ),
    "a missing leaf": ({"scale": ONES}, STATS, BN, "'bias' is only in `like`"),
    "another number of features": (
        *nj.batch_norm_init(4),
        BN,
        r"'weight' has the wrong shape. Expected shape \(3,\), as in `like`; got shape \(4,\)",
    ),
    "a scale of another kernel": (
        {"kernel": KERNEL, "scale": np.ones(5)},
        {},
        None,
        "'params/scale' does not fit its",
    ),
    "a u of another kernel": (
        {"kernel": KERNEL},
        {"u": np.ones((1, 5)), "sigma": np.ones(())},
        None,
        r"'batch_stats/u' does not fit its kernel.*shape \(1, 5\)",
    ),
}


@pytest.mark.parametrize("case", TO_TORCH)
def test_to_torch(case):
    params, batch_stats, like, message = TO_TORCH[case]
    with pytest.raises((ValueError, TypeError), match=f"(?s)to_torch: .*{message}"):
        nj.convert.to_torch(params, batch_stats, like=like)


def test_an_unknown_leaf_is_refused_if_asked():
    params = nj.dynamic_tanh_init(3)[0]
    with pytest.raises(ValueError, match="to_torch: 'params/alpha' has no counterpart"):
        nj.convert.to_torch(params, {}, others="refuse")
    assert {*nj.convert.to_torch(params, {})} == {"weight", "bias", "alpha"}


KERAS = {"bn/gamma": ONES, "bn/moving_mean": ONES, "bn/moving_variance": ONES}
KERAS_LIKE = tuple({"bn": tree} for tree in nj.batch_norm_init(3, use_bias=False))
FROM_KERAS = {
    "a statistic that is not finite": (
        KERAS | {"bn/moving_mean": BAD},
        None,
        "'bn/moving_mean' has values",
    ),
    "half of the statistics": ({"bn/moving_mean": ONES}, None, "'bn/moving_variance' is missing"),
    "a missing leaf": (
        {k: v for k, v in KERAS.items() if "gamma" not in k},
        KERAS_LIKE,
        "'bn/gamma' is missing",
    ),
    "another number of features": (
        KERAS | {"bn/gamma": np.ones(4)},
        None,
        "'bn/moving_mean' has the wrong shape|gamma",
    ),
    "an unknown weight": (
        KERAS | {"lstm/recurrent_kernel": KERNEL},
        None,
        "'lstm/recurrent_kernel' has no counterpart",
    ),
    "a u without a kernel": (
        {"sn/vector_u": np.ones((1, 3))},
        None,
        "'sn/vector_u' does not fit the kernel",
    ),
}


@pytest.mark.parametrize("case", FROM_KERAS)
def test_from_keras(case):
    source, like, message = FROM_KERAS[case]
    with pytest.raises((ValueError, TypeError), match=f"(?s)from_keras: .*{message}"):
        nj.convert.from_keras(source, like=like)


def test_to_keras():
    with pytest.raises(ValueError, match="to_keras: 'params/alpha' has no counterpart"):
        nj.convert.to_keras(nj.dynamic_tanh_init(3)[0], {})
    with pytest.raises(ValueError, match="to_keras: 'gamma' has the wrong shape"):
        nj.convert.to_keras({"scale": ONES}, {}, like={"gamma": np.ones(4)})


AVERAGE = {"average": np.ones((1, 3)), "hidden": np.ones((1, 3)), "counter": np.array(2)}
HAIKU = (
    {"bn": {"scale": np.ones((1, 3)), "offset": np.ones((1, 3))}},
    {"bn/~/mean_ema": AVERAGE, "bn/~/var_ema": AVERAGE},
)
FROM_HAIKU = {
    "a statistic that is not finite": (
        (HAIKU[0], HAIKU[1] | {"bn/~/var_ema": AVERAGE | {"average": BAD[None]}}),
        "'bn/~/var_ema/average' has values",
    ),
    "half of the statistics": (
        (HAIKU[0], {"bn/~/mean_ema": AVERAGE}),
        "'bn/~/var_ema/average' is missing",
    ),
    "two counters": (
        (HAIKU[0], HAIKU[1] | {"bn/~/var_ema": AVERAGE | {"counter": np.array(9)}}),
        "'bn/~/var_ema/counter' differs from the counter of the mean. "
        "Expected 2, as in 'bn/~/mean_ema/counter'; got 9",
    ),
    "an unknown leaf": (({"lstm": {"gates": ONES}}, {}), "'lstm/gates' has no counterpart"),
    "an unknown state": (({}, {"rnn": {"carry": ONES}}), "'rnn/carry' has no counterpart"),
    "no names of modules": (
        ({"scale": ONES}, {}),
        r"some leaves are outside of any module.*\['scale'\]",
    ),
}


@pytest.mark.parametrize("case", FROM_HAIKU)
def test_from_haiku(case):
    haiku, message = FROM_HAIKU[case]
    with pytest.raises(ValueError, match=f"(?s)from_haiku: .*{message}"):
        nj.convert.from_haiku(*haiku, others="refuse")


def test_to_haiku():
    params, batch_stats = nj.convert.from_haiku(*HAIKU)
    with pytest.raises(
        ValueError, match="to_haiku: the state for 'batch_stats/bn/mean' depends.*decay_rate=None"
    ):
        nj.convert.to_haiku(params, batch_stats, like=HAIKU)
    with pytest.raises(ValueError, match=r"to_haiku: decay_rate is out of range.*decay_rate=1\.5"):
        nj.convert.to_haiku(params, batch_stats, like=HAIKU, decay_rate=1.5)
    with pytest.raises(ValueError, match="to_haiku: 'bn/offset' is only in `like`"):
        nj.convert.to_haiku({"bn": {"scale": ONES}}, batch_stats, like=HAIKU, decay_rate=0.9)
    with pytest.raises(ValueError, match="to_haiku: some leaves are outside of any module"):
        nj.convert.to_haiku(*nj.layer_norm_init(3))
    with pytest.raises(ValueError, match="to_haiku: 'params/tanh/alpha' has no counterpart"):
        nj.convert.to_haiku({"tanh": nj.dynamic_tanh_init(3)[0]}, {})
    with pytest.raises(ValueError, match="haiku_momentum: decay_rate is out of range"):
        nj.convert.haiku_momentum(-0.1, 3)


VARIABLES = {"params": PARAMS, "batch_stats": STATS}
LINEN = {
    "a missing leaf": ({"params": PARAMS}, r"'batch_stats/mean' is missing"),
    "a leaf too many": (
        VARIABLES | {"cache": {"index": ONES}},
        r"'cache/index' has no counterpart",
    ),
    "another number of features": (
        VARIABLES | {"params": nj.batch_norm_init(4)[0]},
        r"'params/\w+' has the wrong shape|'batch_stats/mean' has the wrong shape",
    ),
    "a statistic that is not finite": (
        VARIABLES | {"batch_stats": STATS | {"mean": BAD}},
        "'batch_stats/mean' has values",
    ),
}


@pytest.mark.parametrize("case", LINEN)
def test_linen_to_nnx(case):
    variables, message = LINEN[case]
    with pytest.raises(ValueError, match=f"(?s)linen_to_nnx: .*({message})"):
        nj.convert.linen_to_nnx(variables, nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


def test_nnx_to_linen():
    model = nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"nnx_to_linen: 'mean' has no counterpart|'mean' has the wrong shape"
    ):
        nj.convert.nnx_to_linen(model, like=VARIABLES | {"batch_stats": nj.batch_norm_init(4)[1]})
    with pytest.raises(TypeError, match="nnx_to_linen: .* has no type.*got ArrayImpl"):
        nj.convert.nnx_to_linen(
            jax.tree.map(lambda leaf: leaf, nnx.State(nnx.to_pure_dict(nnx.state(model))))
        )
    model.var[...] = jnp.asarray(BAD)
    with pytest.raises(ValueError, match="nnx_to_linen: 'var' has values"):
        nj.convert.nnx_to_linen(model)
