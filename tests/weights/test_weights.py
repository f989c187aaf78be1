"""Weight norm, weight standardization, spectral norm: formulas, properties, torch, no mutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from jax.test_util import check_grads
from torch.nn.utils import parametrizations

import normjax as nj
from tests import reference_family as family
from tests.compare import (
    assert_close,
    assert_finite,
    assert_identical,
    assert_trees_close,
    at_once,
)
from tests.layers.cases import draw_normal
from tests.marks import slow_after

EPS = float(jnp.finfo(jnp.float32).eps)
KERNELS = {
    "dense": ((5, 4), -1),
    "dense, transposed": ((4, 5), 0),
    "conv, 1d": ((3, 5, 4), 2),
    "in the middle": ((3, 4, 5), -2),
    "conv, HWIO": ((3, 2, 5, 4), -1),
    "conv, OIHW": ((4, 5, 3, 2), 0),
    "conv, 3d": ((2, 3, 2, 3, 4), 4),
    "attention": ((6, 2, 4), (1, 2)),
    "two, apart, in disorder": ((2, 5, 3, 4), (-1, 0)),
    "one for the tensor": ((5, 4), ()),
    "a vector": ((7,), ()),
}
every_kernel = pytest.mark.parametrize(("shape", "feature_axes"), KERNELS.values(), ids=KERNELS)


def draw(rng, shape, mean=0.0, dtype=np.float32):
    return jnp.asarray(draw_normal(rng, shape, dtype, mean))


def features(shape, feature_axes):
    return tuple(shape[axis] for axis in family.axes_of(feature_axes, len(shape)))


def init(name, kernel, feature_axes, key=0):
    """`(params, batch_stats)`, by whatever the init function of the layer is to know."""
    if name == "weight_norm":
        return nj.weights.weight_norm_init(kernel, feature_axes=feature_axes)
    if name == "weight_standardization":
        return nj.weights.weight_standardization_init(features(kernel.shape, feature_axes))
    return nj.weights.spectral_norm_init(kernel, key=jax.random.key(key), feature_axes=feature_axes)


def apply(name, params, batch_stats, kernel, train=True, **settings):
    return getattr(nj.weights, name)(params, batch_stats, kernel, train, **settings)


LAYERS = ("weight_norm", "weight_standardization", "spectral_norm")


@every_kernel
@pytest.mark.parametrize("with_scale", [True, False])
def test_weight_norm_is_the_formula(rng, shape, feature_axes, with_scale):
    kernel = draw(rng, shape)
    params = {"scale": draw(rng, features(shape, feature_axes), 1.0)} if with_scale else {}
    y, batch_stats = apply("weight_norm", params, {}, kernel, feature_axes=feature_axes)
    assert_close(
        y,
        family.weight_norm(params, kernel, feature_axes=feature_axes),
        rtol=16 * EPS,
        dtype=jnp.float32,
    )
    assert batch_stats == {}
    axes = family.others(feature_axes, len(shape))
    norms = np.sqrt((np.float64(y) ** 2).sum(axes))
    assert_close(
        norms, np.abs(np.broadcast_to(params.get("scale", 1.0), norms.shape)), rtol=16 * EPS
    )


@every_kernel
def test_weight_norm_starts_at_the_kernel_itself(rng, shape, feature_axes):
    kernel = draw(rng, shape, 0.5)
    params, batch_stats = init("weight_norm", kernel, feature_axes)
    assert params.keys() == {"scale"} and params["scale"].shape == features(shape, feature_axes)
    assert_close(
        apply("weight_norm", params, batch_stats, kernel, feature_axes=feature_axes)[0],
        kernel,
        rtol=16 * EPS,
    )
    axes = family.others(feature_axes, len(shape))
    assert_close(
        params["scale"],
        np.sqrt((np.float64(kernel) ** 2).sum(axes)),
        rtol=16 * EPS,
        dtype=jnp.float32,
    )


@every_kernel
@pytest.mark.parametrize("scaled", [False, True], ids=["unit variance", "unit fan-in variance"])
@pytest.mark.parametrize("with_scale", slow_after(1, [False, True]))
def test_weight_standardization_is_the_formula(rng, shape, feature_axes, scaled, with_scale):
    kernel = draw(rng, shape, 3.0)
    params = {"scale": draw(rng, features(shape, feature_axes), 1.0)} if with_scale else {}
    settings = {"feature_axes": feature_axes, "scaled": scaled}
    # The fan-in is not a factor of epsilon: one that is not small tells.
    y, batch_stats = apply("weight_standardization", params, {}, kernel, epsilon=0.5, **settings)
    expected = family.weight_standardization(params, kernel, epsilon=0.5, **settings)
    # The mean, 3 standard deviations (up to 8 for a few elements), is rounded before it is
    # subtracted.
    assert_close(
        y, expected, rtol=64 * EPS, atol=64 * EPS * np.abs(expected).max(), dtype=jnp.float32
    )
    assert batch_stats == {}
    if not with_scale:
        y, _ = apply("weight_standardization", params, {}, kernel, epsilon=1e-10, **settings)
        axes = family.others(feature_axes, len(shape))
        n = np.prod([shape[axis] for axis in axes])
        kept = np.float64(y).sum(axes)
        assert_close(kept, np.zeros(kept.shape), atol=64 * EPS * n)
        energy = (np.float64(y) ** 2).sum(axes)
        assert_close(energy, np.full(kept.shape, 1.0 if scaled else n), rtol=64 * EPS)


@pytest.mark.parametrize("n_steps", slow_after(1, [1, 3]))
@every_kernel
def test_spectral_norm_takes_its_steps_from_where_it_was(rng, shape, feature_axes, n_steps):
    kernel = draw(rng, shape)
    params, batch_stats = init("spectral_norm", kernel, feature_axes)
    columns = int(np.prod(features(shape, feature_axes)))
    assert (
        params == {} and batch_stats.keys() == {"u", "sigma"} and batch_stats["sigma"].shape == ()
    )
    assert batch_stats["u"].shape == (1, columns)
    assert_close(jnp.linalg.norm(batch_stats["u"]), 1.0, rtol=8 * EPS)
    settings = {"feature_axes": feature_axes, "n_steps": n_steps}
    y, new = apply("spectral_norm", {}, batch_stats, kernel, **settings)
    expected, expected_new = family.spectral_norm(batch_stats, kernel, **settings)
    assert_close(y, expected, rtol=64 * EPS, atol=64 * EPS, dtype=jnp.float32)
    assert_trees_close(new, expected_new, rtol=64 * EPS, atol=64 * EPS)
    evaluated, same = apply("spectral_norm", {}, batch_stats, kernel, False, **settings)
    assert_identical(same, batch_stats)
    assert_identical(evaluated, y)


@pytest.mark.slow
@every_kernel
def test_spectral_norm_converges_to_the_largest_singular_value(rng, shape, feature_axes):
    kernel = draw(rng, shape)
    _, batch_stats = init("spectral_norm", kernel, feature_axes)
    axes = family.axes_of(feature_axes, len(shape))

    def largest(kernel):
        matrix = np.float64(kernel).transpose(*family.others(axes, len(shape)), *axes)
        return np.linalg.svd(matrix.reshape(-1, batch_stats["u"].size), compute_uv=False)[0]

    step = jax.jit(
        lambda stats: apply(
            "spectral_norm", {}, stats, kernel, feature_axes=feature_axes, n_steps=4
        )
    )
    for _ in range(250):
        y, batch_stats = step(batch_stats)
    assert_close(batch_stats["sigma"], largest(kernel), rtol=32 * EPS)
    assert_close(largest(y), 1.0, rtol=32 * EPS)


@pytest.mark.slow
def test_steps_of_spectral_norm_add_up_over_calls(rng):
    kernel = draw(rng, (6, 5))
    _, batch_stats = init("spectral_norm", kernel, -1)
    y, new = apply("spectral_norm", {}, batch_stats, kernel, n_steps=4)
    for _ in range(4):
        one_by_one, batch_stats = apply("spectral_norm", {}, batch_stats, kernel)
    assert_close(one_by_one, y, rtol=32 * EPS, atol=32 * EPS)
    assert_trees_close(batch_stats, new, rtol=32 * EPS, atol=32 * EPS)


# torch


def torch_conv(rng, shape):
    layer = torch.nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor(draw_normal(rng, shape, np.float32)))
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1, 3, -1, None])
def test_weight_norm_is_torchs(rng, dim):
    layer = parametrizations.weight_norm(torch_conv(rng, (4, 3, 2, 5)), dim=dim)
    scale, direction = (
        layer.parametrizations.weight.original0,
        layer.parametrizations.weight.original1,
    )
    with torch.no_grad():
        scale *= torch.tensor(draw_normal(rng, tuple(scale.shape), np.float32, 1.0))
    # torch takes dim=-1 for None: one norm for the tensor.
    feature_axes = () if dim in (None, -1) else dim
    cotangent = draw_normal(rng, (4, 3, 2, 5), np.float32)
    params = {
        "scale": jnp.asarray(scale.detach().numpy()).reshape(features((4, 3, 2, 5), feature_axes))
    }

    def run(params, kernel):
        return apply("weight_norm", params, {}, kernel, feature_axes=feature_axes)[0]

    y, pullback = jax.vjp(run, params, jnp.asarray(direction.detach().numpy()))
    assert_close(y, layer.weight.detach().numpy(), rtol=16 * EPS)
    torch.sum(torch.tensor(cotangent) * layer.weight).backward()
    grads, dkernel = pullback(jnp.asarray(cotangent))
    assert_close(
        grads["scale"].ravel(), scale.grad.numpy().ravel(), atol=64 * EPS * np.abs(cotangent).max()
    )
    assert_close(dkernel, direction.grad.numpy(), rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [1, 2])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_spectral_norm_follows_torch_while_the_kernel_changes(rng, dim, n_steps):
    """torch stores v instead of u if `dim` is the other axis, and starts each step from it."""
    shape = (4, 3, 2, 5)
    layer = parametrizations.spectral_norm(
        torch_conv(rng, shape), n_power_iterations=n_steps, dim=dim
    )
    theirs, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    rest = tuple(axis for axis in range(4) if axis != dim)
    batch_stats = {"u": jnp.asarray(theirs._v.numpy().copy())[None], "sigma": jnp.ones(())}
    for _ in range(5):
        cotangent = draw_normal(rng, shape, np.float32)

        def run(kernel, batch_stats=batch_stats):
            return apply(
                "spectral_norm", {}, batch_stats, kernel, feature_axes=rest, n_steps=n_steps
            )

        y, pullback, batch_stats = jax.vjp(
            run, jnp.asarray(original.detach().numpy().copy()), has_aux=True
        )
        weight = layer.weight  # in training, each access takes the steps
        sigma = (
            original.detach().flatten() @ weight.detach().flatten() / (weight.detach() ** 2).sum()
        )
        original.grad = None
        torch.sum(torch.tensor(cotangent) * weight).backward()
        assert_close(y, weight.detach().numpy(), rtol=64 * EPS, atol=64 * EPS)
        assert_close(batch_stats["sigma"], sigma.numpy(), rtol=64 * EPS)
        assert_close(batch_stats["u"][0], theirs._v.numpy(), atol=64 * EPS)
        assert_close(
            pullback(jnp.asarray(cotangent))[0], original.grad.numpy(), rtol=64 * EPS, atol=64 * EPS
        )
        with torch.no_grad():
            original += torch.tensor(draw_normal(rng, shape, np.float32, 0.0, 0.3))


# Salimans & Kingma 2016, section 3.


CONVS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (8, 6, 5, 3), (3, 3, 3, 4), -1, -1),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (8, 3, 6, 5), (4, 3, 3, 3), 0, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", *CONVS])
def test_weight_norm_from_data_starts_with_mean_0_and_variance_1(rng, layout):
    if layout == "dense":
        x, kernel, feature_axes, output_axes = draw(rng, (64, 5), 2.0), draw(rng, (5, 4)), -1, -1

        def linear(kernel):
            return x @ kernel
    else:
        numbers, shape, kernel_shape, feature_axes, output_axes = CONVS[layout]
        x, kernel = draw(rng, shape, 2.0), draw(rng, kernel_shape)

        def linear(kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )

    settings = {"feature_axes": feature_axes, "output_axes": output_axes, "epsilon": 1e-10}
    params, batch_stats, bias = nj.weights.weight_norm_init_from_data(linear, kernel, **settings)
    assert (
        params.keys() == {"scale"}
        and batch_stats == {}
        and params["scale"].shape == bias.shape == (4,)
    )
    y = linear(apply("weight_norm", params, batch_stats, kernel, feature_axes=feature_axes)[0])
    axes = family.others(output_axes, y.ndim)
    y = np.float64(y) + np.expand_dims(np.float64(bias), axes)
    # Sums of up to 27 products of about |x| = 2 on the way to y, whose mean and variance these are.
    assert_close(y.mean(axes), np.zeros(4), atol=256 * EPS)
    assert_close(y.var(axes), np.ones(4), rtol=256 * EPS)


# All three.


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_overwritten(rng, name):
    kernel = draw(rng, (5, 4))
    arguments = (*init(name, kernel, -1), kernel)
    copies = jax.tree.map(jnp.copy, arguments)
    for _ in range(2):
        apply(name, *arguments)
    assert_identical(arguments, copies)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_kernel_of_zeros_stays_zero_with_finite_gradients(name, train):
    kernel = jnp.zeros((5, 4))
    params, batch_stats = init(name, kernel, -1)

    def run(kernel):
        return apply(name, params, batch_stats, kernel, train)

    y, pullback, new = jax.vjp(run, kernel, has_aux=True)
    assert_close(y, np.zeros((5, 4)))
    assert_finite((pullback(jnp.ones((5, 4))), new))
    again, _ = apply(name, params, new, jnp.eye(5, 4), train)
    assert_finite(again)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25])
def test_no_kernel_makes_spectral_norm_forget_how_to_look(rng, size):
    """A layer that starts at zero, or nearly overflows once, is normalized as soon as it can be."""
    kernel = draw(rng, (5, 4))
    _, batch_stats = init("spectral_norm", kernel, -1)
    _, batch_stats = apply("spectral_norm", {}, batch_stats, jnp.float32(size) * kernel)
    step = jax.jit(lambda stats: apply("spectral_norm", {}, stats, kernel))
    for _ in range(200):
        y, batch_stats = step(batch_stats)
    assert_close(np.linalg.svd(np.float64(y), compute_uv=False)[0], 1.0, rtol=32 * EPS)


@pytest.mark.parametrize("name", ["weight_norm", "weight_standardization"])
def test_complex_kernels(rng, name):
    kernel = draw(rng, (5, 4), dtype=np.complex64)
    params, batch_stats = init(name, kernel, -1)
    y, _ = apply(name, params, batch_stats, kernel)
    assert_close(
        y, getattr(family, name)(params, kernel), rtol=64 * EPS, atol=64 * EPS, dtype=jnp.complex64
    )


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_narrow_kernels_are_rounded_once_and_last(rng, name, narrow):
    kernel = draw(rng, (64, 4), 0.5).astype(narrow)
    params, batch_stats = init(name, kernel.astype(jnp.float32), -1)
    y, new = apply(name, params, batch_stats, kernel)
    wide, wide_new = apply(name, params, batch_stats, kernel.astype(jnp.float32))
    # Where float16 is subnormal, it is its spacing there that is rounded to.
    half = {
        "rtol": float(jnp.finfo(narrow).eps) / 2,
        "atol": float(jnp.finfo(narrow).smallest_subnormal) / 2,
    }
    assert_close(y, wide, rtol=half["rtol"] + 32 * EPS, atol=half["atol"], dtype=narrow)
    assert_trees_close(new, wide_new, rtol=32 * EPS, atol=32 * EPS)
    kept, _ = apply(name, params, batch_stats, kernel, dtype=jnp.float32)
    assert_close(kept, wide, rtol=32 * EPS, atol=32 * EPS, dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_jit_vmap_and_grad(rng, name):
    kernels = draw(rng, (3, 5, 4), 1.0)
    trees = [init(name, kernel, -1, key) for key, kernel in enumerate(kernels)]
    one_by_one = [apply(name, *tree, kernel) for tree, kernel in zip(trees, kernels, strict=True)]
    stacked, expected = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *these) for these in (trees, one_by_one)
    )
    mapped = jax.jit(jax.vmap(lambda tree, kernel: apply(name, *tree, kernel)))(stacked, kernels)
    assert_trees_close(mapped, expected, rtol=32 * EPS, atol=32 * EPS)
    if (
        name != "spectral_norm"
    ):  # its singular vectors are constants, so that differences in them are not in its gradient
        function = jax.jit(lambda params, kernel: apply(name, params, {}, kernel)[0])
        check_grads(function, (trees[0][0], kernels[0]), 2, eps=1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-12, 1e12, 1e22, 1e30])
def test_gradients_of_spectral_norm_do_not_depend_on_the_size_of_the_kernel(rng, size):
    kernel, weights = draw(rng, (5, 4)), draw(rng, (5, 4))
    _, batch_stats = init("spectral_norm", kernel, -1)

    def loss(kernel):
        return jnp.sum(weights * apply("spectral_norm", {}, batch_stats, kernel)[0])

    def of_size(size):
        y, gradient = jax.value_and_grad(loss)(jnp.float32(size) * kernel)
        slope = jax.jvp(lambda s: loss(kernel * size + s * size * weights), (0.0,), (1.0,))[1]
        return y, gradient * size, slope

    assert_trees_close(of_size(size), of_size(1.0), rtol=32 * EPS, atol=32 * EPS)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e-6, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("feature_axes", [-1, (), (0, 1)], ids=str)
def test_weight_norm_init_gives_back_kernels_of_any_size(rng, size, feature_axes):
    kernel = jnp.float32(size) * draw(rng, (5, 4))
    for epsilon in (1e-12, 1e-5):
        params, _ = nj.weights.weight_norm_init(kernel, feature_axes=feature_axes, epsilon=epsilon)
        y, _ = nj.weights.weight_norm(
            params, {}, kernel, True, feature_axes=feature_axes, epsilon=epsilon
        )
        assert_close(y, kernel, rtol=8 * EPS)


def std_conv(kernel, epsilon):
    """What big_vision's and vision_transformer's StdConv do to a kernel."""
    axes = tuple(range(kernel.ndim - 1))
    kernel = kernel - jnp.mean(kernel, axes)
    return kernel / (jnp.std(kernel, axes) + epsilon)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_epsilon_may_be_added_to_the_deviation_as_std_conv_does(rng, size):
    kernel, weights = jnp.float32(size) * draw(rng, (3, 3, 4, 5)), draw(rng, (3, 3, 4, 5))

    def ours(kernel):
        settings = {"epsilon": 1e-5, "epsilon_to": "deviation"}
        return nj.weights.weight_standardization({}, {}, kernel, True, **settings)[0]

    def gradient(standardize):
        return size * jax.grad(lambda kernel: jnp.sum(weights * standardize(kernel)))(kernel)

    def theirs(kernel):
        return std_conv(kernel, 1e-5)

    assert_close(ours(kernel), theirs(kernel), rtol=64 * EPS, atol=64 * EPS)
    assert_close(gradient(ours), gradient(theirs), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="epsilon_to='std'"):
        nj.weights.weight_standardization({}, {}, kernel, True, epsilon_to="std")


@pytest.mark.parametrize("scaled", [False, True])
def test_an_epsilon_added_to_the_deviation_is_the_formula(rng, scaled):
    kernel, params = draw(rng, (3, 4, 5)), {"scale": draw(rng, (5,))}
    settings = {"scaled": scaled, "epsilon": 0.5, "epsilon_to": "deviation"}
    y, _ = nj.weights.weight_standardization(params, {}, kernel, True, **settings)
    expected = family.weight_standardization(params, kernel, **settings)
    assert_close(y, expected, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.slow
def test_constant_kernels_have_finite_gradients_with_epsilon_at_the_deviation():
    kernel = jnp.ones((4, 3)).at[:, 1].set(jnp.arange(4.0))

    def loss(kernel):
        y, _ = nj.weights.weight_standardization(
            {}, {}, kernel, True, epsilon=1e-5, epsilon_to="deviation"
        )
        return jnp.sum(jnp.sin(y))

    assert_finite(
        at_once(lambda kernel: (jax.grad(loss)(kernel), jax.hessian(loss)(kernel)), kernel)
    )


@pytest.mark.slow
def test_adapters_hand_on_where_epsilon_is_added(rng):
    x = jnp.eye(4)
    settings = {"epsilon": 0.5, "epsilon_to": "deviation"}
    module = nj.linen.WeightStandardization(linen.Dense(3), **settings)
    variables = module.init(jax.random.key(0), x)
    y = module.apply(variables, x)
    (kernel,) = [leaf for leaf in jax.tree.leaves(variables) if leaf.ndim == 2]
    assert_close(y, std_conv(kernel, 0.5), rtol=1e-5, atol=1e-6)
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    norm = nj.nnx.WeightStandardization(layer, **settings, rngs=nnx.Rngs(1))
    assert_close(norm(x), std_conv(layer.kernel[...], 0.5), rtol=1e-5, atol=1e-6)


def standardized_in_bit(kernel):
    """The kernels in use of BiT's published checkpoints, in float64."""
    kernel = np.float64(kernel)
    axes = tuple(range(kernel.ndim - 1))
    return (kernel - kernel.mean(axes)) / (kernel.std(axes) + 1e-10)


BIT = {"epsilon": 1e-10, "epsilon_to": "deviation"}


@pytest.mark.parametrize("shape", [(7, 7, 3, 16), (3, 3, 32, 16), (1, 1, 256, 16)])
@pytest.mark.parametrize("deviation", [0.02, 1e-9])
def test_kernels_of_published_checkpoints_are_standardized_as_there(rng, shape, deviation):
    kernel = np.float32(deviation) * draw(rng, shape, mean=0.5)
    w, _ = nj.weights.weight_standardization({}, {}, kernel, False, **BIT)
    assert_close(w, standardized_in_bit(kernel), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 0.1])
def test_adapters_standardize_as_in_published_checkpoints(rng, mean):
    kernel = draw(rng, (1, 1, 32, 8), mean=mean)
    x = jnp.eye(32)[:, None, None]
    layer = linen.Conv(8, (1, 1), use_bias=False)
    module = nj.linen.WeightStandardization(layer, **BIT)
    y = module.apply({"params": {"layer_instance": {"kernel": kernel}}}, x)
    expected = standardized_in_bit(kernel)[0, 0]
    assert_close(y[:, 0, 0], expected, rtol=1e-6, atol=1e-6)
    layer = nnx.Conv(32, 8, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
    start = layer.kernel[...]
    norm = nj.nnx.WeightStandardization(layer, **BIT, rngs=nnx.Rngs(0))
    assert_identical(norm.layer_instance.kernel[...], start)
    layer.kernel[...] = kernel
    assert_close(norm(x)[:, 0, 0], expected, rtol=1e-6, atol=1e-6)
