"""A layer with batch norm folded into it does what the two did, in lax and in Flax."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import linen as nn
from jax import lax
from jaxtyping import jaxtyped

import normjax as nj
from tests.compare import assert_close, widest

EPSILON = 1e-3
RELATIVE = 1e-5  # what the issue promises of a folded float32 network


def statistics(rng, features, *, scale=True, bias=True):
    """A batch norm whose variances span orders of magnitude."""
    params = {"scale": rng.normal(size=features)} if scale else {}
    params |= {"bias": rng.normal(size=features)} if bias else {}
    batch_stats = {"mean": 3 * rng.normal(size=features), "var": 10 ** rng.uniform(-3, 3, features)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, batch_stats))


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def norm(params, batch_stats, x, **settings):
    return nj.batch_norm(params, batch_stats, x, train=False, epsilon=EPSILON, **settings)[0]


def fold(kernel, bias, params, batch_stats, **settings):
    return nj.fold_batch_norm(kernel, bias, params, batch_stats, epsilon=EPSILON, **settings)


def assert_agrees(actual, expected, relative=RELATIVE):
    assert np.shape(actual) == np.shape(expected) and np.isfinite(widest(expected)).all()
    error = np.linalg.norm(widest(actual) - widest(expected)) / np.linalg.norm(widest(expected))
    assert error < relative, error


def layouts(rank):
    spatial = "DHW"[:rank]
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


def convolve(x, kernel, bias, **settings):
    settings = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | settings
    y = lax.conv_general_dilated(x, kernel, dimension_numbers=layouts(x.ndim - 2), **settings)
    return y if bias is None else y + bias


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    "leaves", [{}, {"scale": False}, {"bias": False}, {"scale": False, "bias": False}]
)
def test_dense_with_any_leaves(rng, use_bias, leaves):
    x, kernel, bias = normal(rng, 7, 5), normal(rng, 5, 4), normal(rng, 4) if use_bias else None
    after, before = statistics(rng, 4, **leaves), statistics(rng, 5, **leaves)
    folded_kernel, folded_bias = fold(kernel, bias, *after)
    constant = 0 if bias is None else bias
    assert_agrees(x @ folded_kernel + folded_bias, norm(*after, x @ kernel + constant))
    folded_kernel, folded_bias = fold(kernel, bias, *before, before=True)
    assert_agrees(x @ folded_kernel + folded_bias, norm(*before, x) @ kernel + constant)


@pytest.mark.slow
@hypothesis.settings(max_examples=15)
@hypothesis.given(
    rank=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    window=st.integers(1, 3),
    strides=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID"]),
    before=st.booleans(),
    seed=st.integers(0, 9),
)
def test_convolutions(
    rank, groups, inputs, outputs, window, strides, dilation, padding, before, seed
):
    """Of any rank, in groups, one of which may be all inputs (depthwise), strided and dilated."""
    rng = np.random.default_rng(seed)
    features_in, features_out = groups * inputs, groups * outputs
    x, bias = normal(rng, 2, *(6,) * rank, features_in), normal(rng, features_out)
    kernel = normal(rng, *(window,) * rank, inputs, features_out)
    how = {
        "window_strides": (strides,) * rank,
        "rhs_dilation": (dilation,) * rank,
        "feature_group_count": groups,
        "padding": "VALID" if before else padding,
    }
    own = statistics(rng, features_in if before else features_out)
    if before:
        folded = fold(kernel, bias, *own, before=True, feature_group_count=groups, padding="VALID")
        expected = convolve(norm(*own, x), kernel, bias, **how)
    else:
        folded = fold(kernel, bias, *own)
        expected = norm(*own, convolve(x, kernel, bias, **how))
    # Sums with cancellation are judged by what they are sums of.
    size = convolve(abs(x), abs(folded[0]), abs(folded[1]), **how)
    assert abs(convolve(x, *folded, **how) - expected).max() < RELATIVE * size.max()


@pytest.mark.slow
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("strides", [1, 2])
def test_transposed(rng, transpose_kernel, strides):
    layer = nn.ConvTranspose(4, (3, 2), (strides, strides), transpose_kernel=transpose_kernel)
    x = normal(rng, 2, 5, 6, 3)
    variables = layer.init(jax.random.key(0), x)
    own = statistics(rng, 4)
    kernel, bias = fold(*layer_leaves(variables), *own, feature_axes=-2 if transpose_kernel else -1)
    assert_agrees(
        layer.apply({"params": {"kernel": kernel, "bias": bias}}, x),
        norm(*own, layer.apply(variables, x)),
    )


def layer_leaves(variables):
    return variables["params"]["kernel"], variables["params"].get("bias")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(4, use_bias=False), (2, 3)),
        (nn.Conv(4, (3,), use_bias=False), (2, 8, 3)),
        (nn.Conv(6, (3, 3), feature_group_count=3), (2, 6, 6, 3)),
        (nn.Conv(4, (2, 2), padding="CIRCULAR"), (2, 6, 6, 3)),
        (nn.ConvTranspose(4, (3,), (3,), padding="CIRCULAR"), (2, 6, 3)),
        (nn.Conv(4, (2, 2, 2), (2, 1, 1), padding="VALID"), (1, 4, 4, 4, 3)),
    ],
)
def test_layers_of_flax(rng, layer, shape):
    x = normal(rng, *shape)
    variables = layer.init(jax.random.key(0), x)
    own = statistics(rng, layer.features)
    kernel, bias = fold(*layer_leaves(variables), *own)
    folded = layer.clone(use_bias=True)
    assert_agrees(
        folded.apply({"params": {"kernel": kernel, "bias": bias}}, x),
        norm(*own, layer.apply(variables, x)),
    )


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT", "VALID", 0, ((0, 0), (0, 0))])
def test_before_a_convolution_whose_padding_is_normalized_too(rng, padding):
    layer, x, own = nn.Conv(4, (3, 3), padding=padding), normal(rng, 2, 6, 6, 3), statistics(rng, 3)
    variables = layer.init(jax.random.key(0), x)
    kernel, bias = fold(*layer_leaves(variables), *own, before=True, padding=padding)
    assert_agrees(
        layer.apply({"params": {"kernel": kernel, "bias": bias}}, x),
        layer.apply(variables, norm(*own, x)),
    )


@pytest.mark.parametrize(
    "layer", [nn.Conv(4, (3, 3)), nn.ConvTranspose(4, (3, 3), (2, 2))], ids=["padded", "transposed"]
)
def test_before_a_layer_that_sees_zeros_only_without_a_shift(rng, layer):
    x, (params, batch_stats) = normal(rng, 2, 6, 6, 3), statistics(rng, 3, bias=False)
    variables, batch_stats["mean"] = layer.init(jax.random.key(0), x), jnp.zeros(3)
    how = {"before": True, "padding": "SAME", "transposed": isinstance(layer, nn.ConvTranspose)}
    kernel, bias = fold(*layer_leaves(variables), params, batch_stats, **how)
    expected = layer.apply(variables, norm(params, batch_stats, x))
    assert_agrees(layer.apply({"params": {"kernel": kernel, "bias": bias}}, x), expected)
    refuses(
        ValueError,
        "padding='SAME'",
        params=params | {"bias": jnp.ones(3)},
        batch_stats=batch_stats,
        kernel=layer_leaves(variables)[0],
        **how,
    )


@pytest.mark.parametrize(("padding", "window"), [(None, 1), ("SAME", 1), (0, 1), ("VALID", 3)])
def test_before_a_pointwise_convolution_padding_need_not_be_known(rng, padding, window):
    kernel, own = normal(rng, window, window, 3, 4), statistics(rng, 3)
    x = normal(rng, 2, 5, 5, 3)
    folded = fold(kernel, None, *own, before=True, padding=padding)
    assert_agrees(
        convolve(x, *folded, padding="VALID"),
        convolve(norm(*own, x), kernel, None, padding="VALID"),
    )


@pytest.mark.slow
def test_layouts_of_others(rng):
    """PyTorch's kernels, and several feature axes on either side."""
    x, kernel, own = normal(rng, 2, 3, 6, 6), normal(rng, 4, 3, 2, 2), statistics(rng, 4)
    layout = ("NCHW", "OIHW", "NCHW")
    y = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
    folded, bias = fold(kernel, None, *own, feature_axes=0)
    actual = (
        lax.conv_general_dilated(x, folded, (1, 1), "VALID", dimension_numbers=layout)
        + bias[:, None, None]
    )
    assert_agrees(actual, norm(*own, y, feature_axes=1))
    own = statistics(rng, 3)
    expected = lax.conv_general_dilated(
        norm(*own, x, feature_axes=1), kernel, (1, 1), "VALID", dimension_numbers=layout
    )
    folded, bias = fold(
        kernel, None, *own, before=True, feature_axes=1, output_axes=0, padding="VALID"
    )
    actual = (
        lax.conv_general_dilated(x, folded, (1, 1), "VALID", dimension_numbers=layout)
        + bias[:, None, None]
    )
    assert_agrees(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
def test_several_feature_axes(rng, before):
    x, kernel = normal(rng, 5, 2, 3), normal(rng, 2, 3, 4, 6)
    own = statistics(rng, (2, 3) if before else (4, 6))
    how = (
        {"feature_axes": (0, 1), "output_axes": (2, 3), "before": True}
        if before
        else {"feature_axes": (2, 3)}
    )
    folded, bias = fold(kernel, None, *own, **how)

    def linear(x, kernel):
        return jnp.einsum("nij,ijkl->nkl", x, kernel)

    both = {"feature_axes": (1, 2)}
    expected = (
        linear(norm(*own, x, **both), kernel) if before else norm(*own, linear(x, kernel), **both)
    )
    assert_agrees(linear(x, folded) + bias, expected)


@pytest.mark.slow
def test_float64_inside_and_the_kernels_dtype_outside(rng):
    """The exact values, rounded once: to within half a unit in the last place of any dtype."""
    params, batch_stats = statistics(rng, 4)
    scale, bias, mean, var = (
        widest(leaf) for leaf in (*map(params.get, ("scale", "bias")), *batch_stats.values())
    )
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, np.float64):
        make = np.asarray if dtype is np.float64 else jnp.asarray
        kernel, constant = make(rng.normal(size=(5, 4)), dtype), make(rng.normal(size=4), dtype)
        multiplier = scale / np.sqrt(var + EPSILON)
        folded = fold(kernel, constant, params, batch_stats)
        exact = widest(kernel) * multiplier, (widest(constant) - mean) * multiplier + bias
        for actual, expected in zip(folded, exact, strict=True):
            assert isinstance(actual, np.ndarray if dtype is np.float64 else jax.Array)
            assert_close(actual, expected, rtol=float(jnp.finfo(dtype).eps), dtype=dtype)


def test_leaves_that_are_no_part_of_inference_are_left(rng):
    params, batch_stats = statistics(rng, 4)
    fold(normal(rng, 3, 4), None, params, batch_stats | {"count": jnp.zeros((), jnp.int32)})


GOOD = {
    "kernel": jnp.ones((3, 4)),
    "bias": jnp.ones(4),
    "params": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "batch_stats": {"mean": jnp.ones(4), "var": jnp.ones(4)},
}


def refuses(error, *values, **changed):
    with pytest.raises(error) as refused:
        nj.fold_batch_norm(**GOOD | changed)
    message = str(refused.value)
    assert re.fullmatch(r"fold_batch_norm: .*\. Expected .*; got .*\. .*\.", message, re.DOTALL), (
        message
    )
    for value in values:
        assert str(value) in message, f"{value!r} is not in: {message}"


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    "leaf", ["batch_stats['mean']", "batch_stats['var']", "params['scale']", "params['bias']"]
)
def test_leaves_that_are_not_finite(leaf, value):
    tree, name = leaf[:-2].split("['")
    changed = GOOD[tree] | {name: jnp.ones(4).at[2].set(value)}
    refuses(ValueError, leaf, "(2,)", value, **{tree: changed})


def test_trees_that_do_not_match():
    stats = GOOD["batch_stats"]
    refuses(ValueError, "batch_stats", "['mean']", batch_stats={"mean": jnp.ones(4)})
    refuses(ValueError, "params['scale']", (4,), (3,), params={"scale": jnp.ones(3)})
    refuses(ValueError, "batch_stats['var']", (1, 4), batch_stats=stats | {"var": jnp.ones((1, 4))})
    refuses(ValueError, "['gamma']", params={"gamma": jnp.ones(4)})
    refuses(ValueError, "bias", (3,), (4,), bias=jnp.ones(3))
    refuses(TypeError, "int32", kernel=jnp.ones((3, 4), jnp.int32))
    refuses(TypeError, "params is not a dict", params=[jnp.ones(4)])


def test_variances_without_a_root():
    stats = GOOD["batch_stats"]
    refuses(
        ValueError,
        "batch_stats['var']",
        "feature 1",
        "got -1",
        batch_stats=stats | {"var": jnp.ones(4).at[1].set(-1)},
        epsilon=0.0,
    )
    refuses(ValueError, "epsilon=0.0", batch_stats=stats | {"var": jnp.zeros(4)}, epsilon=0.0)
    refuses(ValueError, "epsilon=-0.1", epsilon=-0.1)


@pytest.mark.slow
def test_results_that_the_dtype_cannot_hold():
    refuses(
        ValueError,
        "folded kernel",
        "float16",
        kernel=jnp.ones((3, 4), jnp.float16),
        bias=None,
        params={"scale": jnp.full(4, 1e6)},
    )


def test_axes_and_groups_that_do_not_fit():
    square = {"kernel": jnp.ones((4, 4)), "before": True}
    refuses(ValueError, "feature_axes=5", feature_axes=5)
    refuses(ValueError, "(1,)", "(4, 4)", **square, feature_axes=-1)
    refuses(ValueError, "feature_group_count=3", **square, feature_group_count=3)
    refuses(ValueError, "feature_group_count=0", **square, feature_group_count=0)


@pytest.mark.parametrize("padding", [None, "SAME", "CAUSAL", 1, ((0, 1), (0, 0))])
def test_shifts_that_do_not_reach_the_border(padding):
    refuses(
        ValueError,
        f"padding={padding!r}",
        (3, 3, 4, 4),
        kernel=jnp.ones((3, 3, 4, 4)),
        before=True,
        padding=padding,
    )


def test_transformations_are_refused():
    for name in GOOD:

        def call(value, name=name):
            return nj.fold_batch_norm(**GOOD | {name: value})

        with pytest.raises(TypeError, match=rf"fold_batch_norm: {name}.* is traced.*float32\["):
            jax.jit(call)(GOOD[name])


def test_annotations_are_true(rng):
    typed = jaxtyped(nj.fold_batch_norm, typechecker=beartype)
    for make in (jnp.asarray, np.asarray):
        typed(make(normal(rng, 5, 4)), make(normal(rng, 4)), *statistics(rng, 4), epsilon=EPSILON)
    typed(normal(rng, 5, 4), None, *statistics(rng, 5), before=True, padding=((0, 0),))


@pytest.mark.parametrize("axes", [{"feature_axes": -1}, {"feature_axes": 0}, {}], ids=str)
def test_padding_is_named_before_axes_that_do_not_fit_either(axes):
    rng = np.random.default_rng(0)
    kernel = normal(rng, 3, 3, 4, 5)
    refuses(
        ValueError,
        "padding='SAME'",
        kernel=kernel,
        bias=None,
        params=statistics(rng, 7)[0],
        batch_stats=statistics(rng, 7)[1],
        before=True,
        padding="SAME",
        **axes,
    )
