"""`lint` on networks of all kinds: findings agree with gradients, no false alarms, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import normjax as nj
from normjax.diagnostics import Finding, Lint, lint
from tests.compare import at_once
from tests.diagnostics.lint_networks import FEATURES, ROWS, Dense, dense, linear, rules

IMAGES = jax.random.normal(jax.random.key(2), (4, 6, 6, 3))
MIX = jnp.sin(jnp.arange(36.0)).reshape(FEATURES, FEATURES)
HEADS = MIX.reshape(FEATURES, 2, 3)


def conv(kernel, x, padding="SAME"):
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def handwritten(x, axes, *, two_passes=False, mean=True):
    center = x.mean(axes, keepdims=True) if mean else 0.0
    var = (
        jnp.mean((x - center) ** 2, axes, keepdims=True)
        if two_passes or not mean
        else x.var(axes, keepdims=True)
    )
    return (x - center) / jnp.sqrt(var + 1e-5)


def folded(x, axes):
    mean = x.mean(axes, keepdims=True)
    multiplier = lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) - mean * mean + 1e-5)
    return x * multiplier - mean * multiplier


def layer(function, init, **settings):
    def apply(x):
        params, batch_stats = init(FEATURES)
        return function(params, batch_stats, x, train=True, **settings)[0]

    return apply


BATCH = layer(nj.batch_norm, nj.batch_norm_init)
NORMS = {
    "batch": BATCH,
    "activated": layer(nj.activated_batch_norm, nj.activated_batch_norm_init),
    "ghost": layer(nj.batch_norm, nj.batch_norm_init, virtual_batch_size=2),
    "instance": layer(nj.instance_norm, nj.instance_norm_init),
    "group": layer(nj.group_norm, nj.group_norm_init, num_groups=2),
    "groups of one": layer(nj.group_norm, nj.group_norm_init, num_groups=FEATURES),
    "layer": layer(nj.layer_norm, nj.layer_norm_init),
    "rms": layer(nj.rms_norm, nj.rms_norm_init),
    "filter response": layer(nj.filter_response_norm, nj.filter_response_norm_init),
    "one pass": lambda x: handwritten(x, (0, 1, 2)),
    "two passes": lambda x: handwritten(x, (0, 1, 2), two_passes=True),
    "rms of the batch": lambda x: handwritten(x, (0, 1, 2), mean=False),
    "by layer": lambda x: handwritten(x, -1, two_passes=True),
    "a power": lambda x: (x - x.mean((0, 1, 2))) * (x.var((0, 1, 2)) + 1e-5) ** -0.5,
    "by the deviation": lambda x: (x - x.mean((0, 1, 2))) / (x.std((0, 1, 2)) + 1e-5),
    "by a power": lambda x: (x - x.mean((0, 1, 2))) / (x.var((0, 1, 2)) + 1e-5) ** 0.5,
    "folded": lambda x: folded(x, (0, 1, 2)),
    "jax.nn.standardize": lambda x: jax.nn.standardize(x, axis=(0, 1, 2)),
}


@jax.custom_jvp
def straight(x):
    return 2.0 * x


straight.defjvp(lambda primals, tangents: (straight(*primals), 2.0 * tangents[0]))


@jax.custom_vjp
def through(x):
    return x + 0.0


through.defvjp(lambda x: (through(x), None), lambda _, g: (g,))

BETWEEN = {
    "nothing": lambda x: x,
    "reshape": lambda x: x.reshape(-1, FEATURES).reshape(x.shape),
    "transpose": lambda x: jnp.swapaxes(jnp.swapaxes(x, 0, 2), 0, 2),
    "average pooling": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "padded average pooling": lambda x: nn.avg_pool(x, (3, 3), padding="SAME"),
    "max pooling": lambda x: nn.max_pool(x, (2, 2), (2, 2), "SAME"),
    "global pooling": lambda x: x.mean((1, 2), keepdims=True) * 3.0,
    "a multiple for each feature": lambda x: x * jnp.arange(1.0, FEATURES + 1),
    "a multiple for each row": lambda x: x * jnp.arange(1.0, x.shape[1] + 1)[:, None, None],
    "a sum of multiples": lambda x: 2.0 * x - x / 3.0,
    "a padded convolution": lambda x: x + conv(jnp.ones((3, 3, FEATURES, FEATURES)), x),
    "a second dense layer": lambda x: x @ MIX,
    "a dense layer over several axes": lambda x: jnp.einsum("nhwi,ijk->nhwjk", x, HEADS).reshape(
        x.shape
    ),
    "a convolution of one position": lambda x: conv(MIX[None, None], x),
    "a valid convolution": lambda x: conv(MIX * jnp.ones((2, 2, 1, 1)), x, "VALID"),
    "a padded convolution alone": lambda x: conv(MIX * jnp.ones((3, 3, 1, 1)), x),
    "a resize": lambda x: jax.image.resize(x, (4, 9, 11, FEATURES), "bilinear"),
    "a smaller resize": lambda x: jax.image.resize(x, (4, 3, 4, FEATURES), "cubic"),
    "a resize to the nearest": lambda x: jax.image.resize(x, (4, 9, 9, FEATURES), "nearest"),
    "two layers and a resize": lambda x: jax.image.resize(x @ MIX @ MIX, (4, 3, 9, 6), "linear"),
    "repeated pixels": lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2),
    "read at indices": lambda x: x[:, jnp.array([0, 3, 3])],
    "read at indices of features": lambda x: x[..., jnp.array([0, 3, 3, 1, 2, 5])],
    "pixels from features": lambda x: x.reshape(4, 6, 6, 2, 3).swapaxes(2, 3).repeat(2, -1),
    "a kernel over positions": lambda x: jnp.einsum("nhwi,hg->ngwi", x, MIX),
    "a kernel for each row": lambda x: jnp.einsum("nhwi,hij->nhwj", x, MIX[:, :, None] * MIX),
    "a transposed convolution": lambda x: lax.conv_transpose(
        x, MIX * jnp.arange(1.0, 5).reshape(2, 2, 1, 1), (2, 2), "VALID"
    ),
    "attention": lambda x: jnp.einsum("nhwi,nhwj->nij", x, x)[:, None],
    "relu": jax.nn.relu,
    "relu beside": lambda x: x + jax.nn.relu(x),
    "remat": jax.checkpoint(lambda x: x * 2.0),
    "custom_jvp": straight,
    "custom_vjp": through,
    "cond": lambda x: lax.cond(jnp.any(IMAGES > 0), lambda x: x, lambda x: -x, x),
    "concatenated": lambda x: jnp.concatenate([x, 2.0 * x])[::-1],
    "sliced": lambda x: x[:, 1:],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))),
    "mask by its value": lambda x: jnp.where(x > 0, x, 0.0),
}


def verdict_and_gradient(norm, between):
    """Whether lint finds a convolution's bias, and its gradient relative to the kernel's."""

    def apply(params, x):
        h = conv(params["conv"]["kernel"], x) + params["conv"]["bias"]
        return norm(between(h))

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = IMAGES.astype(jnp.float64)
        kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, FEATURES), jnp.float64)
        params = {"conv": {"kernel": kernel, "bias": jnp.linspace(-1.0, 1.0, FEATURES)}}
        found = "cancelled-bias" in {finding.rule for finding in lint(apply, params, x)}

        def loss(params):
            y = apply(params, x)
            return jnp.sum(y * jax.random.normal(jax.random.key(1), y.shape, y.dtype))

        gradient = at_once(jax.grad(loss), params)["conv"]
    return found, np.linalg.norm(gradient["bias"]) / np.linalg.norm(gradient["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_bias_is_found_if_and_only_if_its_gradient_is_zero(norm):
    found, gradient = verdict_and_gradient(NORMS[norm], BETWEEN["nothing"])
    assert found == (gradient < 1e-9) and not 1e-9 <= gradient < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("between", BETWEEN)
def test_whatever_lies_between_a_bias_and_the_norm(between):
    found, gradient = verdict_and_gradient(BATCH, BETWEEN[between])
    assert found == (gradient < 1e-9) and not 1e-9 <= gradient < 1e-3


def test_a_normalization_before_a_linear_layer_keeps_its_bias():
    params, batch_stats = nj.batch_norm_init(FEATURES)

    def bottleneck(variables, x):
        params, batch_stats = variables
        x, first = nj.batch_norm(params["first"], batch_stats["first"], x, train=True)
        x, second = nj.batch_norm({}, batch_stats["second"], x @ params["kernel"], train=True)
        return x, {"first": first, "second": second}

    batch_stats = {"first": batch_stats, "second": nj.batch_norm_init(FEATURES)[1]}
    x = jnp.ones((32, FEATURES))
    assert lint(bottleneck, ({"first": params, "kernel": MIX}, batch_stats), x) == ()


def test_a_bias_that_goes_elsewhere_too_is_not_cancelled():
    network = Dense(bias=True, hidden=1)

    def apply(variables, x):
        y, batch_stats = network(variables, x)
        return (y, linear(variables[0]["dense_0"], x)), batch_stats

    assert lint(apply, network.variables, ROWS) == ()

    def penalized(variables, x):
        y, batch_stats = network(variables, x)
        return (y, jnp.sum(variables[0]["dense_0"]["bias"] ** 2)), batch_stats

    assert lint(penalized, network.variables, ROWS) == ()


def test_positions_are_no_bias_of_a_feature():
    def apply(params, x):
        return handwritten(x + params["positions"], (0, 1))

    x = jnp.ones((32, 4, 5))
    assert lint(apply, {"positions": jnp.ones((4, 5))}, x) == ()
    assert rules(lint(apply, {"positions": jnp.ones((1, 5))}, x)) == [("cancelled-bias", "/")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_dtype(dtype):
    network = Dense(bias=True, hidden=1)
    network.variables[0]["dense_0"] = jax.tree.map(
        lambda leaf: leaf.astype(dtype), network.variables[0]["dense_0"]
    )
    x = ROWS[:8].astype(dtype)

    def apply(variables, x):
        h = linear(variables[0]["dense_0"], x)
        y, batch_stats = nj.batch_norm(
            variables[0]["norm_0"], variables[1]["norm_0"], h, train=True, momentum=0.98
        )
        return y, {"norm_0": batch_stats}

    found = lint(apply, network.variables, x, steps=100)
    assert rules(found) == [
        ("few-values", "norm_0"),
        ("slow-momentum", "norm_0"),
        ("cancelled-bias", "dense_0"),
    ]


class TestTransformations:
    @pytest.mark.slow
    def test_jit_remat_vmap_and_grad(self):
        network = Dense(bias=True, hidden=1, momentum=0.98)
        expected = lint(network, network.variables, ROWS, steps=10)
        assert rules(expected) == [("slow-momentum", "norm_0"), ("cancelled-bias", "dense_0")]
        for transformed in (
            jax.jit(network),
            jax.checkpoint(network),
            jax.jit(jax.checkpoint(network)),
        ):
            assert lint(transformed, network.variables, ROWS, steps=10) == expected
        ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), network.variables)
        found = lint(jax.vmap(network, in_axes=(0, None)), ensemble, ROWS, steps=10)
        assert rules(found) == rules(expected)

    @pytest.mark.slow
    def test_layers_in_a_scan(self):
        def apply(variables, x):
            def block(x, variables):
                params, batch_stats = variables
                h, batch_stats = nj.batch_norm(
                    params["norm"], batch_stats, linear(params["dense"], x), train=True
                )
                return jax.nn.relu(h), batch_stats

            return lax.scan(block, x, variables)

        layers = [
            ({"dense": dense(i, 5, 5), "norm": nj.batch_norm_init(5)[0]}, nj.batch_norm_init(5)[1])
            for i in (0, 1)
        ]
        variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        found = lint(apply, variables, ROWS, steps=100, optimizer=optax.adamw(1e-3))
        expected = [
            ("decayed-scale", "norm"),
            ("slow-momentum", "norm"),
            ("cancelled-bias", "dense"),
        ]
        assert rules(found) == expected

    def test_passes_one_after_the_other(self):
        def apply(variables, x):
            params, batch_stats = variables
            first, batch_stats = network((params, batch_stats), x)
            second, batch_stats = network((params, batch_stats), 2.0 * x)
            return (first, second), batch_stats

        network = Dense(bias=True, hidden=2)
        assert rules(lint(apply, network.variables, ROWS)) == rules(
            lint(network, network.variables, ROWS)
        )

    @pytest.mark.slow
    def test_shapes_are_enough(self):
        network = Dense(bias=True, hidden=1)
        shapes = jax.eval_shape(lambda: network.variables)
        x = jax.ShapeDtypeStruct((8, 5), jnp.float32)
        settings = {"steps": 100, "optimizer": optax.adamw(1e-3)}
        assert lint(network, shapes, x, **settings) == lint(
            network, network.variables, ROWS[:8], **settings
        )

    def test_nothing_is_run(self):
        def apply(variables, x):
            jax.debug.callback(lambda: pytest.fail("the network ran"))
            return network(variables, x)

        network = Dense(hidden=1)
        lint(apply, network.variables, ROWS, steps=10, optimizer=optax.adamw(1e-3))
        jax.effects_barrier()


class TestVariables:
    def test_batch_stats_alone_and_frozen_layers(self):
        network = Dense(hidden=2, momentum=0.98)
        params, batch_stats = network.variables
        found = lint(
            lambda batch_stats, x: network((params, batch_stats), x), batch_stats, ROWS, steps=100
        )
        assert rules(found) == [("slow-momentum", "norm_0"), ("slow-momentum", "norm_1")]

        def half_frozen(variables, x):
            params, batch_stats = variables
            h, _ = nj.batch_norm(
                params["norm_0"], batch_stats["norm_0"], linear(params["dense_0"], x), train=False
            )
            h, new = nj.batch_norm(
                params["norm_1"], batch_stats["norm_1"], jax.nn.relu(h), train=True
            )
            return h, batch_stats | {"norm_1": new}

        biased = Dense(bias=True)
        assert rules(lint(half_frozen, biased.variables, ROWS, steps=100)) == [
            ("slow-momentum", "norm_1")
        ]

    @pytest.mark.slow
    def test_a_single_layer_in_linen_and_a_frozen_dict(self, promotion_as_in_flax):
        from flax.core import freeze

        model = nj.linen.BatchNorm(use_running_average=False, momentum=0.5)
        variables = freeze(model.init(jax.random.key(0), ROWS))
        found = lint(partial(model.apply, mutable=["batch_stats"]), variables, ROWS, steps=1)
        assert rules(found) == [("slow-momentum", "/")]

    @pytest.mark.slow
    def test_layers_without_variables_go_by_their_scopes(self, promotion_as_in_flax):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(4, name="dense")(x)
                return nn.InstanceNorm(use_scale=False, use_bias=False, name="inner")(x)

        model = Model()
        x = jnp.ones((2, 5, 5))
        (found,) = lint(model.apply, model.init(jax.random.key(0), x), x)
        assert found.path == "dense" and found.message.startswith("Model/inner subtracts the mean")

    def test_an_nnx_module_with_dropout_keeps_its_state(self):
        class Model(nnx.Module):
            def __init__(self):
                rngs = nnx.Rngs(0)
                self.layers = nnx.List(
                    [nnx.Linear(5, 4, use_bias=False, rngs=rngs), nj.nnx.BatchNorm(4, rngs=rngs)]
                )
                self.dropout = nnx.Dropout(0.5, rngs=rngs)

            def __call__(self, x):
                return self.layers[1](self.layers[0](self.dropout(x)))

        model = Model()
        before = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
        assert rules(lint(lambda model, x: model(x), model, ROWS)) == [
            ("dropout-before", "layers/1")
        ]
        after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
        assert jax.tree.all(jax.tree.map(np.array_equal, before, after))


class TestErrors:
    def raises(self, message, *args, kind=ValueError, **settings):
        with pytest.raises(kind, match=message):
            lint(*args, **settings)

    def test_inference_mode(self):
        _, variables = Dense(), Dense().variables

        def apply(variables, x):
            params, batch_stats = variables
            return nj.batch_norm(
                params["norm_0"], batch_stats["norm_0"], linear(params["dense_0"], x), train=False
            )

        self.raises(
            "runs in inference mode.*2 running statistics.*train=True", apply, variables, ROWS
        )

    def test_missing_statistics(self):
        network = Dense()
        apply = lambda variables, x: network(variables, x)[0]  # noqa: E731
        self.raises("returns no new statistics", apply, network.variables, ROWS, kind=TypeError)

    def test_an_axis_without_a_name(self):
        network = Dense(axis_name="data")
        with pytest.raises(NameError, match="axis name 'data' is not bound") as error:
            lint(network, network.variables, ROWS)
        assert "axis_name='data'" in error.value.__notes__[-1]

    def test_arguments(self):
        network = Dense(hidden=1)
        raises = partial(self.raises, apply_fn=network, variables=network.variables, x=ROWS)
        raises("got steps=0", steps=0)
        raises("got steps=1.5", steps=1.5)
        raises("got axis_size=-1", axis_name="data", axis_size=-1)
        raises("axis_size is given without an axis", axis_size=2)
        raises("optimizer of type float", optimizer=0.1, kind=TypeError)
        self.raises("The order is lint", network.variables, network, ROWS, kind=TypeError)
        alone = nj.batch_norm_init(5)[1]
        apply = partial(nj.batch_norm, {}, train=True)
        self.raises(
            "no parameters", lambda s, x: apply(s, x), alone, ROWS, optimizer=optax.sgd(0.1)
        )


def test_findings_print_as_a_list_of_advice():
    assert str(Lint()) == "nothing found" and not Lint()
    network = Dense(bias=False)
    assert str(lint(network, network.variables, ROWS)) == (
        "nothing found: 2 normalizations of a network with 12 leaves passed; not applied: "
        "decayed-scale (needs optimizer), slow-momentum (needs steps), unsynced (needs axis_name)"
    )
    found = str(lint(lambda kernel, x: x @ kernel, MIX[:5], ROWS))
    assert "no normalization among" in found and "made from 1 leaf." in found and "rsqrt" in found
    same = (
        Finding("a", "few-values", "warning", "8 values", "take more"),
        Finding("b", "few-values", "warning", "4 values", "take more"),
    )
    found = Lint((*same, Finding("c", "cancelled-bias", "note", "cancelled", "leave it out")))
    assert (
        str(found)
        == repr(found)
        == (
            "warning: few-values\n  a: 8 values\n  b: 4 values\n  -> take more\n\n"
            "note: cancelled-bias\n  c: cancelled\n  -> leave it out\n\n2 warnings, 1 note"
        )
    )
    assert found.findings == tuple(found) and found[0].path == "a"


class TestChannelsFirst:
    first = jnp.ones((16, 3, 12, 12))

    def batch(self, x, axis=-1):
        params, batch_stats = nj.batch_norm_init(x.shape[axis])
        return nj.batch_norm(params, batch_stats, x, train=True, feature_axes=axis)[0]

    def test_images_of_pytorch(self, promotion_as_in_flax):
        model = nn.Sequential([nn.Conv(4, (3, 3), use_bias=False), nn.relu])
        variables = model.init(jax.random.key(0), self.first)
        (finding,) = lint(model.apply, variables, self.first)
        assert (finding.path, finding.rule) == ("layers_0", "channels-first")
        assert finding.severity == "warning" and "jnp.moveaxis(x, 1, -1)" in finding.advice
        assert "(16, 3, 12, 12) has its channels along axis 1, but it takes axis 3" in (
            finding.message
        )
        assert lint(model.apply, variables, jnp.ones((16, 12, 3, 12))) == ()
        integers = self.first.astype(jnp.uint8)
        found = lint(lambda v, x: model.apply(v, x / 255.0), variables, integers)
        assert rules(found) == [("channels-first", "layers_0")]
        large = jnp.ones((16, 3, 48, 12)), jnp.ones((16, 3, 64, 32))
        kernels = [{"kernel": jnp.ones((3, 3, x.shape[-1], 4))} for x in large]
        found = [
            lint(lambda p, x: conv(p["kernel"], x), *each)
            for each in zip(kernels, large, strict=True)
        ]
        assert [rules(each) for each in found] == [[], [("channels-first", "/")]]

    @pytest.mark.parametrize(
        ("network", "count"),
        [
            (lambda self, x: self.batch(x / 255.0), 1),
            (lambda self, x: self.batch(x, 1), 0),
            (lambda self, x: self.batch(jnp.moveaxis(x, 1, -1)), 0),
            (lambda self, x: nj.layer_norm(*nj.layer_norm_init(12), x, train=True)[0], 1),
            (lambda self, x: nj.instance_norm({}, {}, x, train=True, feature_axes=1)[0], 0),
            (lambda self, x: self.batch(x.reshape(16, -1)), 0),
        ],
    )
    def test_normalizations_of_the_input(self, network, count):
        found = lint(lambda _, x: network(self, x), {}, self.first)
        assert [finding.rule for finding in found] == ["channels-first"] * count

    def test_after_a_convolution_that_says_where_its_channels_are(self):
        def apply(params, x, axis):
            numbers = ("NCHW", "HWIO", "NCHW")
            h = lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", None, None, numbers)
            return self.batch(nn.max_pool(jax.nn.relu(h), (1, 2), (1, 2)), axis)

        params, x = {"kernel": jnp.ones((3, 3, 5, 4))}, jnp.ones((16, 5, 8, 16))
        (finding,) = lint(partial(apply, axis=-1), params, x)
        assert finding.rule == "channels-first" and "along axis 1" in finding.message
        assert lint(partial(apply, axis=1), params, x) == ()
