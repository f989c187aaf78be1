"""The layers of `normjax.nnx` that Flax lacks compute what functions and `linen` do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_same_kind

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
normal = nnx.initializers.normal()
# name, arguments, function, its arguments, leaves; of several feature axes the sizes are 3 and 6
CASES = [
    (
        "FilterResponseNorm",
        {},
        nj.filter_response_norm,
        {"epsilon": 1e-6},
        ["scale", "bias", "threshold"],
    ),
    (
        "FilterResponseNorm",
        {
            "epsilon": 0.1,
            "learn_epsilon": True,
            "use_threshold": False,
            "use_scale": False,
            "feature_axes": (2, 3),
        },
        nj.filter_response_norm,
        {"epsilon": 0.1, "feature_axes": (2, 3)},
        ["bias", "epsilon"],
    ),
    ("LocalResponseNorm", {}, nj.local_response_norm, {}, []),
    (
        "LocalResponseNorm",
        {"size": 3, "alpha": 0.5, "beta": 0.5, "k": 1.5, "use_scale": True, "use_bias": True},
        nj.local_response_norm,
        {"size": 3, "alpha": 0.5, "beta": 0.5, "k": 1.5},
        ["scale", "bias"],
    ),
    ("GlobalResponseNorm", {}, nj.global_response_norm, {}, ["scale", "bias"]),
    (
        "GlobalResponseNorm",
        {"epsilon": 0.1, "use_bias": False, "feature_axes": (2, 3), "scale_offset": 0.5},
        nj.global_response_norm,
        {"epsilon": 0.1, "feature_axes": (2, 3), "scale_offset": 0.5},
        ["scale"],
    ),
    (
        "GroupNorm",
        {"num_groups": 2, "cumulative_axis": 1},
        nj.group_norm,
        {"num_groups": 2, "cumulative_axis": 1, "epsilon": 1e-6},
        ["scale", "bias"],
    ),
    ("DynamicTanh", {}, nj.dynamic_tanh, {}, ["alpha", "scale", "bias"]),
    (
        "DynamicTanh",
        {"use_bias": False, "feature_axes": (2, 3)},
        nj.dynamic_tanh,
        {"feature_axes": (2, 3)},
        ["alpha", "scale"],
    ),
]


def batch(rng, dtype=np.float32):
    return jnp.asarray(rng.normal(0.5, 1, (2, 4, 3, 6)), dtype)


@pytest.mark.parametrize(("name", "arguments", "function", "options", "leaves"), CASES)
def test_it_is_the_function_of_its_variables(rng, name, arguments, function, options, leaves):
    x, several = batch(rng), "feature_axes" in arguments
    norm = getattr(nj.nnx, name)(18 if several else 6, **arguments, rngs=nnx.Rngs(0))
    flat = nnx.to_pure_dict(nnx.state(norm, nnx.Param))
    linens = getattr(nj.linen, name)(**arguments).init(jax.random.key(0), x).get("params", {})
    assert sorted(flat) == sorted(leaves) == sorted(linens)
    nnx.update(norm, jax.tree.map(lambda leaf: leaf + 0.25, nnx.state(norm)))
    params = {
        leaf: value.reshape(3, 6) if several and value.ndim else value
        for leaf, value in nnx.to_pure_dict(nnx.state(norm, nnx.Param)).items()
    }
    assert_same_kind(params, dict(linens))
    assert_identical(norm(x), function(params, {}, x, False, **options)[0])
    gradient = nnx.jit(nnx.grad(lambda norm: jnp.sum(jnp.sin(x) * norm(x))))
    grads = nnx.to_pure_dict(gradient(norm))
    assert sorted(grads) == sorted(leaves)
    assert all((np.abs(grad) > 0).any() for grad in grads.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["FilterResponseNorm", "GlobalResponseNorm", "LocalResponseNorm", "DynamicTanh"]
)
def test_dtypes_promote_as_in_flax(rng, name):
    x, make = batch(rng, jnp.bfloat16), getattr(nj.nnx, name)
    for given, expected in (
        ({}, jnp.float32),
        ({"param_dtype": jnp.bfloat16}, jnp.bfloat16),
        ({"dtype": jnp.float16}, jnp.float16),
        (
            {
                "promote_dtype": lambda arrays, dtype: nnx.nn.dtypes.promote_dtype(
                    arrays, dtype=jnp.float16
                )
            },
            jnp.float16,
        ),
    ):
        norm = make(6, use_scale=True, use_bias=True, **given, rngs=nnx.Rngs(0))
        assert norm(x).dtype == expected
        assert norm.scale[...].dtype == given.get("param_dtype", jnp.float32)
    assert make(3, rngs=nnx.Rngs(0))(jnp.ones((2, 3), jnp.int32)).dtype == jnp.float32


def test_initializers_are_used_each_with_a_key_of_its_own():
    inits = {f"{leaf}_init": normal for leaf in ("scale", "bias", "threshold", "epsilon")}
    norm = nj.nnx.FilterResponseNorm(
        1, learn_epsilon=True, **inits, metadata={"tag": "x"}, rngs=nnx.Rngs(0)
    )
    variables = [norm.scale, norm.bias, norm.threshold, norm.epsilon]
    assert len({float(variable[0]) for variable in variables}) == 4
    assert {variable.tag for variable in variables} == {"x"}
    tanh = nj.nnx.DynamicTanh(1, alpha_init=nnx.initializers.constant(0.125), rngs=nnx.Rngs(0))
    assert float(tanh.alpha[...]) == 0.125


@pytest.mark.slow
def test_masks_and_axis_names_reach_filter_response_norm(rng):
    x, mask = batch(rng), jnp.asarray(rng.random((2, 4, 3, 1)) < 0.7)
    norm, shared = (
        nj.nnx.FilterResponseNorm(6, axis_name=name, rngs=nnx.Rngs(0)) for name in (None, "i")
    )
    expected, _ = nj.filter_response_norm(
        nj.filter_response_norm_init(6)[0], {}, x, False, mask=mask
    )
    y = norm(jnp.where(mask, x, jnp.nan), mask=mask.astype(jnp.int32))
    assert_identical(y * mask, expected * mask)
    ys = jax.vmap(shared, axis_name="i")(jnp.stack(jnp.split(x, 2, 1)))
    assert_close(jnp.concatenate(ys, 1), norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_batch_renorm_is_the_function_of_its_variables(rng):
    norm = nj.nnx.BatchRenorm(6, r_max=1.5, d_max=0.5, momentum=0.9, rngs=nnx.Rngs(0))
    params, batch_stats = nj.batch_renorm_init(6)
    assert_identical(nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat)), batch_stats)
    for _ in range(3):
        x = batch(rng)
        y, batch_stats = nj.batch_renorm(
            params, batch_stats, x, True, r_max=1.5, d_max=0.5, momentum=0.9
        )
        assert_identical(nnx.jit(lambda norm, x: norm(x))(norm, x), y)
        assert_identical(nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat)), batch_stats)
    assert int(norm.count[...]) == 3
    norm.eval()
    assert_identical(norm(x), nj.batch_renorm(params, batch_stats, x, False)[0])
    assert isinstance(norm, nj.nnx.BatchNorm)


@pytest.mark.slow
def test_without_correction_batch_renorm_is_flaxs_batch_norm(rng):
    x = batch(rng)
    ours, theirs = (
        nj.nnx.BatchRenorm(6, r_max=1.0, d_max=0.0, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(6, rngs=nnx.Rngs(0)),
    )
    assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    for leaf in ("mean", "var"):
        assert_close(getattr(ours, leaf)[...], getattr(theirs, leaf)[...], rtol=1e-5, atol=1e-6)


def test_schedules_go_by_the_count(rng):
    x = 10 + batch(rng)
    norm = nj.nnx.BatchRenorm(
        6, r_max=1.0, d_max=lambda count: jnp.where(count < 1, 0.0, 5.0), rngs=nnx.Rngs(0)
    )
    first, second = norm(x), norm(x)
    assert abs(float(first.mean())) < 1e-4 < 4 < float(second.mean())
