"""The layers of `normjax.linen` that Flax lacks compute what the functions do."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import normjax as nj
from normjax import linen
from tests.compare import assert_close, assert_identical, assert_trees_close, at_once

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")
KEY = jax.random.key(0)
normal = nn.initializers.normal()
FRN, LRN, DYT = linen.FilterResponseNorm, linen.LocalResponseNorm, linen.DynamicTanh
GRN = linen.GlobalResponseNorm
# adapter, its arguments, function, its arguments, leaves
CASES = [
    (FRN, {}, nj.filter_response_norm, {"epsilon": 1e-6}, ["scale", "bias", "threshold"]),
    (
        FRN,
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
    (LRN, {}, nj.local_response_norm, {}, []),
    (
        LRN,
        {
            "size": 3,
            "alpha": 0.5,
            "beta": 0.5,
            "k": 1.5,
            "use_scale": True,
            "use_bias": True,
            "feature_axes": 1,
        },
        nj.local_response_norm,
        {"size": 3, "alpha": 0.5, "beta": 0.5, "k": 1.5, "feature_axes": 1},
        ["scale", "bias"],
    ),
    (GRN, {}, nj.global_response_norm, {}, ["scale", "bias"]),
    (
        GRN,
        {"epsilon": 0.1, "use_bias": False, "feature_axes": (2, 3), "scale_offset": 0.5},
        nj.global_response_norm,
        {"epsilon": 0.1, "feature_axes": (2, 3), "scale_offset": 0.5},
        ["scale"],
    ),
    (
        linen.GroupNorm,
        {"num_groups": 2, "cumulative_axis": 1},
        nj.group_norm,
        {"num_groups": 2, "cumulative_axis": 1, "epsilon": 1e-6},
        ["scale", "bias"],
    ),
    (DYT, {}, nj.dynamic_tanh, {}, ["alpha", "scale", "bias"]),
    (
        DYT,
        {"use_bias": False, "feature_axes": (1, 2)},
        nj.dynamic_tanh,
        {"feature_axes": (1, 2)},
        ["alpha", "scale"],
    ),
]


def batch(rng, dtype=np.float32):
    return jnp.asarray(rng.normal(0.5, 1, (2, 4, 3, 6)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "arguments", "function", "options", "leaves"), CASES)
def test_it_is_the_function_of_its_variables(rng, adapter, arguments, function, options, leaves):
    x, module = batch(rng), adapter(**arguments)
    variables = module.init(KEY, x)
    assert list(variables.get("params", {})) == leaves
    params = {leaf: value + np.float32(0.25) for leaf, value in variables.get("params", {}).items()}
    y = module.apply({"params": params}, x)
    assert_identical(y, function(params, {}, x, False, **options)[0])
    loss = lambda params, x: jnp.sum(jnp.sin(x) * module.apply({"params": params}, x))  # noqa: E731
    grads = at_once(jax.grad(loss), params, x)
    assert all((np.abs(grad) > 0).any() for grad in grads.values())


@pytest.mark.parametrize("adapter", [FRN, GRN, LRN, DYT])
def test_dtypes_promote_as_in_flax(rng, adapter):
    x = batch(rng, jnp.bfloat16)
    arguments = {"use_scale": True, "use_bias": True}
    for given, expected in (
        ({}, jnp.float32),
        ({"param_dtype": jnp.bfloat16}, jnp.bfloat16),
        ({"dtype": jnp.float16}, jnp.float16),
    ):
        y, variables = jax.eval_shape(adapter(**arguments, **given).init_with_output, KEY, x)
        assert y.dtype == expected
        assert all(
            leaf.dtype == given.get("param_dtype", jnp.float32)
            for leaf in variables["params"].values()
        )
    y, _ = jax.eval_shape(adapter().init_with_output, KEY, np.ones((2, 3), np.int32))
    assert y.dtype == jnp.float32


@pytest.mark.slow
def test_initializers_are_used_each_with_a_key_of_its_own(rng):
    inits = {f"{leaf}_init": normal for leaf in ("scale", "bias", "threshold", "epsilon")}
    params = FRN(learn_epsilon=True, **inits).init(KEY, batch(rng))["params"]
    assert len({float(leaf[0]) for leaf in params.values()}) == 4
    assert (
        float(
            DYT(alpha_init=nn.initializers.constant(0.125)).init(KEY, batch(rng))["params"]["alpha"]
        )
        == 0.125
    )


@pytest.mark.slow
def test_masks_and_axis_names_reach_filter_response_norm(rng):
    x = batch(rng)
    mask = rng.random((2, 4, 3, 1)) < 0.7
    variables = FRN().init(KEY, x)
    expected, _ = nj.filter_response_norm(variables["params"], {}, x, False, mask=mask)
    hidden = np.where(mask, x, np.float32(np.nan))
    y = np.asarray(FRN().apply(variables, hidden, mask=np.int32(mask)))
    assert_identical(y * mask, np.asarray(expected) * mask)
    shared = FRN(axis_name="i")
    mapped = jax.vmap(lambda x: shared.apply(shared.init(KEY, x), x), axis_name="i")
    ys = at_once(mapped, np.stack(np.split(np.asarray(x), 2, 1)))
    assert_close(np.concatenate(ys, 1), FRN().apply(variables, x), rtol=1e-5, atol=1e-5)


class TestBatchRenorm:
    def step(self, norm, variables, x):
        return norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])

    @pytest.mark.slow
    def test_it_is_the_function_of_its_variables(self, rng):
        norm = linen.BatchRenorm(r_max=1.5, d_max=0.5, momentum=0.9)
        variables = norm.init(KEY, batch(rng), use_running_average=False)
        params, batch_stats = nj.batch_renorm_init(6)
        assert_identical(variables, {"params": params, "batch_stats": batch_stats})
        for _ in range(3):
            x = batch(rng)
            y, updates = self.step(norm, variables, x)
            expected, batch_stats = nj.batch_renorm(
                params, batch_stats, x, True, r_max=1.5, d_max=0.5, momentum=0.9, epsilon=1e-5
            )
            assert_identical((y, updates["batch_stats"]), (expected, batch_stats))
            variables |= updates
        assert int(batch_stats["count"]) == 3
        expected, _ = nj.batch_renorm(params, batch_stats, x, False)
        assert_identical(norm.apply(variables, x, use_running_average=True), expected)

    @pytest.mark.slow
    def test_without_correction_it_is_batch_norm(self, rng):
        x, ours = batch(rng), linen.BatchRenorm(r_max=1.0, d_max=0.0)
        variables = ours.init(KEY, x, use_running_average=False)
        plain = variables | {
            "batch_stats": {leaf: variables["batch_stats"][leaf] for leaf in ("mean", "var")}
        }
        y, updates = self.step(ours, variables, x)
        expected, flax_updates = self.step(nn.BatchNorm(), plain, x)
        assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert int(updates["batch_stats"].pop("count")) == 1
        assert_trees_close(updates, flax_updates, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_schedules_go_by_the_count(self, rng):
        x = 10 + batch(rng)
        norm = linen.BatchRenorm(r_max=1.0, d_max=lambda count: jnp.where(count < 1, 0.0, 5.0))
        variables = norm.init(KEY, x, use_running_average=False)
        first, updates = self.step(norm, variables, x)
        second, _ = self.step(norm, variables | updates, x)
        assert abs(float(first.mean())) < 1e-4 < 4 < float(second.mean())


class Compact(nn.Module):
    wrap: Callable[[nn.Module], nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.wrap(nn.Conv(5, (2, 2), bias_init=normal))(x)


class SetUp(nn.Module):
    wrap: Callable[[nn.Module], nn.Module]

    def setup(self):
        self.inner = self.wrap(nn.Conv(5, (2, 2), bias_init=normal))

    def __call__(self, x):
        return self.inner(x)


class TestWeightStandardization:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options", [{}, {"scaled": True, "epsilon": 0.1}, {"feature_axes": None}], ids=str
    )
    def test_weights_are_those_of_the_function(self, rng, options):
        x, layer = batch(rng), nn.Conv(5, (2, 2), bias_init=normal)
        norm = linen.WeightStandardization(layer, use_scale=True, **options)
        variables = jax.device_get(norm.init(KEY, x))
        own = variables["params"]["layer_instance"]
        scale = variables["params"]["layer_instance/kernel/scale"] * np.float32(1.5)
        arguments = options | {"feature_axes": () if options.get("feature_axes", 0) is None else -1}
        kernel, _ = nj.weights.weight_standardization(
            {"scale": scale}, {}, own["kernel"], True, **arguments
        )
        params = {"layer_instance": own, "layer_instance/kernel/scale": scale}
        expected = at_once(layer.apply, {"params": {"kernel": kernel, "bias": own["bias"]}}, x)
        y, updates = at_once(lambda p, x: norm.apply({"params": p}, x, mutable=True), params, x)
        assert_close(y, expected, rtol=1e-6, atol=1e-6)
        assert_identical(updates["params"], params)

    @pytest.mark.slow
    def test_what_the_filter_leaves_out_and_vectors_stay(self, rng):
        x, layer = batch(rng), nn.Dense(5, bias_init=normal)
        for chosen in ({"bias"}, {"other"}):
            norm = linen.WeightStandardization(layer, variable_filter=chosen)
            y, variables = norm.init_with_output(KEY, x)
            plain = {"params": variables["params"]["layer_instance"]}
            assert_close(y, at_once(layer.apply, plain, x))
        norm = linen.WeightStandardization(layer, variable_filter=None, use_scale=True)
        params = jax.eval_shape(norm.init, KEY, x)["params"]
        assert set(params) == {"layer_instance", "layer_instance/kernel/scale"}

    @pytest.mark.parametrize("setting", ["alone", "compact", "setup"])
    def test_the_layer_starts_as_without_the_wrapper(self, rng, setting):
        x, layer = batch(rng), nn.Conv(5, (2, 2), bias_init=normal)
        wrap = partial(linen.WeightStandardization, use_scale=True, scale_init=normal)
        starts = {"alone": lambda wrap: wrap(layer), "compact": Compact, "setup": SetUp}
        plain = starts[setting](lambda layer: layer).init(KEY, x)
        variables = starts[setting](wrap).init(KEY, x)
        own, others = ({leaf.tobytes() for leaf in jax.tree.leaves(v)} for v in (variables, plain))
        assert others < own and len(own - others) == 1  # the gain, with a key of its own

    def test_the_output_of_initialization_is_that_of_a_call(self, rng):
        x, norm = batch(rng), linen.WeightStandardization(nn.Dense(3), epsilon=0.1)
        y, variables = norm.init_with_output(KEY, x)
        assert_close(norm.apply(variables, x), y, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_scale_for_each_example_needs_no_adapter(rng):
    class Conditioned(nn.Module):
        @nn.compact
        def __call__(self, x, condition):
            scale, bias = jnp.split(nn.Dense(12)(condition), 2, -1)
            return nj.layer_norm({"scale": 1 + scale, "bias": bias}, {}, x, train=False)[0]

    x, condition = batch(rng), jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)

    def run(x, condition):
        y, variables = Conditioned().init_with_output(KEY, x, condition)
        conditioned = nn.Dense(12).apply({"params": variables["params"]["Dense_0"]}, condition)
        return y, conditioned, nn.LayerNorm(epsilon=1e-5).init_with_output(KEY, x)[0]

    y, conditioned, plain = at_once(run, x, condition)
    scale, bias = np.split(conditioned, 2, -1)
    assert_close(y, plain * (1 + scale)[:, None, None] + bias[:, None, None], rtol=1e-4, atol=1e-5)
