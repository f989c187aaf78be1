"""Which kernels are found to be invariant to scale, in networks where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.optim import effective_learning_rate, scale_invariant
from tests.compare import assert_close
from tests.optim import networks

X = networks.batch()[0].astype(np.float32)


def small(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def true(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf
    }


@pytest.mark.slow
def test_whole_kernels():
    found = scale_invariant(
        small(networks.params()), lambda params: networks.outputs(params, X, epsilon=1e-5)
    )
    assert true(found) == {"first/kernel", "second/kernel"}
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {bool}


@pytest.mark.slow
def test_channels():
    """Layer norm is invariant to the scale of a kernel, not to those of its columns apart."""
    params = small(networks.params())
    found = scale_invariant(params, lambda params: networks.outputs(params, X), feature_axes=-1)
    assert true(found) == {"first/kernel"}


@pytest.mark.slow
def test_a_loss_does_as_well_as_outputs():
    params, labels = small(networks.params()), networks.batch()[1]
    assert true(scale_invariant(params, lambda params: networks.loss(params, X, labels))) == {
        "first/kernel",
        "second/kernel",
    }


@pytest.mark.slow
def test_in_the_precision_of_params():
    params = small(networks.params())
    found = scale_invariant(
        params, lambda params: networks.outputs(params, X, epsilon=1e-5), dtype=None
    )
    assert true(found) == {"first/kernel", "second/kernel"}


def test_running_statistics_make_nothing_invariant():
    def evaluated(params):
        h, _ = nj.batch_norm(*nj.batch_norm_init(7), X @ params["w"], train=False)
        return h

    assert scale_invariant({"w": jnp.asarray(networks.params()["first"]["kernel"])}, evaluated) == {
        "w": False
    }


@pytest.mark.slow
def test_what_is_invariant_at_the_start_alone_is_not_found():
    """Layer norm only cancels the kernel's scale if biases are zero, as at initialization."""
    params = {"kernel": jnp.asarray(networks.params()["first"]["kernel"]), "bias": jnp.zeros(7)}

    def function(params):
        return nj.layer_norm({}, {}, X @ params["kernel"] + params["bias"], train=True)[0]

    scaled = params | {"kernel": 2 * params["kernel"]}
    assert_close(function(scaled), function(params), rtol=1e-3, atol=1e-3)
    assert scale_invariant(params, function) == {"bias": False, "kernel": False}


@pytest.mark.slow
def test_what_has_no_influence_is_not_found():
    params = {
        "kernel": jnp.asarray(networks.params()["first"]["kernel"]),
        "bias": jnp.ones(7),
        "unused": jnp.ones((3, 3)),
    }

    def function(params):
        x = X @ params["kernel"] + params["bias"]  # which batch norm cancels
        return nj.batch_norm(*nj.batch_norm_init(7), x, train=True)[0]

    assert true(scale_invariant(params, function)) == {"kernel"}


def test_saturation_is_not_invariance():
    params = {"kernel": 10 * jnp.asarray(networks.params()["first"]["kernel"])}
    assert scale_invariant(params, lambda params: jnp.tanh(X @ params["kernel"])) == {
        "kernel": False
    }


@pytest.mark.slow
def test_an_epsilon_that_rules_the_variance_leaves_no_invariance():
    params = {"kernel": 1e-3 * jnp.asarray(networks.params()["first"]["kernel"])}

    def function(params, epsilon):
        return nj.batch_norm(
            *nj.batch_norm_init(7), X @ params["kernel"], train=True, epsilon=epsilon
        )[0]

    assert scale_invariant(params, lambda p: function(p, 1e-5)) == {"kernel": False}
    assert scale_invariant(params, lambda p: function(p, 1e-12)) == {"kernel": True}


@pytest.mark.slow
def test_kernels_that_are_normalized_themselves():
    kernel = jnp.asarray(networks.params()["first"]["kernel"])

    def normed(params):
        return (
            X
            @ nj.weights.weight_norm({"scale": params["scale"]}, {}, params["kernel"], train=True)[
                0
            ]
        )

    found = scale_invariant({"kernel": kernel, "scale": jnp.ones(7)}, normed, feature_axes=-1)
    assert found == {"kernel": True, "scale": False}


@pytest.mark.slow
def test_integers_and_keys_are_left_alone():
    params = {
        "kernel": jnp.asarray(networks.params()["first"]["kernel"]),
        "table": jnp.arange(3),
        "key": jax.random.key(0),
    }
    found = scale_invariant(
        params, lambda params: nj.layer_norm({}, {}, X @ params["kernel"], train=True)[0]
    )
    assert found == {"kernel": True, "table": False, "key": False}


@pytest.mark.slow
def test_complex_kernels():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(
            rng.standard_normal((5, 7)) + 1j * rng.standard_normal((5, 7)), jnp.complex64
        )
    }
    assert scale_invariant(params, lambda p: nj.rms_norm({}, {}, X @ p["w"], train=True)[0]) == {
        "w": True
    }
    assert scale_invariant(params, lambda p: X @ p["w"]) == {"w": False}


class Convolutional(nn.Module):
    """Convolutions with and without normalization, under a residual branch that starts at zero."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem", dtype=self.dtype)(x)
        x = nn.relu(nj.linen.BatchNorm(use_running_average=False, dtype=self.dtype)(x))
        y = nn.Conv(8, (3, 3), use_bias=False, name="branch", dtype=self.dtype)(x)
        y = nj.linen.BatchNorm(
            use_running_average=False, scale_init=nn.initializers.zeros, dtype=self.dtype
        )(y)
        x = nn.Conv(8, (1, 1), name="plain", dtype=self.dtype)(x + y)
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("feature_axes", "dtype"), [((), None), (-1, jnp.bfloat16)])
def test_linen(feature_axes, dtype):
    images = np.random.default_rng(0).standard_normal((8, 6, 6, 3), np.float32)
    model = Convolutional(dtype)
    with jax.numpy_dtype_promotion("standard"):
        variables = model.init(jax.random.key(0), images)

    def function(params):
        return model.apply(variables | {"params": params}, images, mutable=["batch_stats"])[0]

    tolerance = 1e-2 if dtype is None else 0.1
    found = scale_invariant(
        variables["params"], function, feature_axes=feature_axes, tolerance=tolerance
    )
    assert true(found) == {"stem/kernel", "branch/kernel"}


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(5, 8, rngs=rngs), nj.nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


@pytest.mark.slow
def test_nnx_modules_and_their_state():
    model = Module(nnx.Rngs(0))
    before = np.asarray(model.norm.mean[...])
    found = scale_invariant(model, lambda model: model(X))
    assert true(found) == {"first/kernel"}
    np.testing.assert_array_equal(model.norm.mean[...], before)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    assert (
        scale_invariant(params, lambda params: nnx.merge(graphdef, params, others, copy=True)(X))
        == found
    )


@pytest.mark.slow
def test_bad_input_is_refused():
    params = {"a": {"w": jnp.array([[1.0, jnp.nan]])}}
    with pytest.raises(
        ValueError,
        match=r"scale_invariant: params is not finite.*1 NaN or infinite of 2 in params\['a'\]",
    ):
        scale_invariant(params, lambda params: params)
    with pytest.raises(
        ValueError, match=r"function\(params\) is not finite.*function\(params\)\['y'\]"
    ):
        scale_invariant({"w": jnp.ones((2, 2))}, lambda params: {"y": params["w"] / 0})
    with pytest.raises(ValueError, match="returns no floating-point output.*int"):
        scale_invariant({"w": jnp.ones((2, 2))}, lambda params: jnp.argmax(params["w"]))
    with pytest.raises(ValueError, match="scales is out of range.*-1.0"):
        scale_invariant({"w": jnp.ones((2, 2))}, lambda params: params["w"], scales=(-1.0,))


@pytest.mark.slow
def test_arguments_in_another_order_and_leaves_that_are_no_arrays_are_refused():
    with pytest.raises(
        TypeError, match=r"function of type dict.*The order is scale_invariant\(params, function\)"
    ):
        scale_invariant(jnp.sum, {"w": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match=r"function\(params\)\['name'\] of type str"):
        scale_invariant({"w": jnp.ones((2, 2))}, lambda params: {"name": "x"})
    for function in (
        lambda p: scale_invariant(p, jnp.sum),
        lambda p: effective_learning_rate(p, 0.1),
    ):
        with pytest.raises(TypeError, match=r"params\['w'\] of type str"):
            function({"w": "kernel"})


@pytest.mark.slow
def test_effective_learning_rates():
    kernel = np.random.default_rng(0).standard_normal((3, 3, 4, 5)).astype(np.float32)
    for optimizer, power in (("sgd", 2), ("adam", 1)):
        rates = effective_learning_rate({"a": kernel}, 0.1, optimizer=optimizer)["a"]
        assert_close(rates, 0.1 / np.linalg.norm(kernel.astype(float)) ** power, rtol=1e-6)
        rates = effective_learning_rate({"a": kernel}, 0.1, feature_axes=-1, optimizer=optimizer)[
            "a"
        ]
        assert_close(
            rates,
            0.1 / np.linalg.norm(kernel.astype(float).reshape(-1, 5), axis=0) ** power,
            rtol=1e-6,
        )


@pytest.mark.slow
def test_effective_learning_rates_in_bfloat16_are_those_of_float32():
    kernel = jnp.full((300, 2), 1.5, jnp.bfloat16)
    rate = effective_learning_rate({"a": kernel}, 0.5)["a"]
    assert_close(rate, 0.5 / (600 * 2.25), rtol=1e-6, dtype=jnp.float32)


@pytest.mark.slow
def test_effective_learning_rates_of_an_nnx_module():
    rates = effective_learning_rate(Module(nnx.Rngs(0)).second, 1.0)
    assert rates["kernel"].shape == () and rates["bias"] == jnp.inf


def test_feature_axes_that_a_leaf_lacks_are_refused_by_its_path():
    with pytest.raises(
        ValueError,
        match=r"effective_learning_rate at params\['a'\]\['b'\].*out of range.*shape=\(3,\)",
    ):
        effective_learning_rate({"a": {"b": jnp.ones(3)}}, 1.0, feature_axes=1)
    with pytest.raises(
        ValueError, match="optimizer is unknown.*'sgd' or 'adam'; got optimizer='lion'"
    ):
        effective_learning_rate({"b": jnp.ones(3)}, 1.0, optimizer="lion")
