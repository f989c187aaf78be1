"""`flax_settings`: Flax's layers and normjax's functions give the same with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.adapters import ADAPTERS

FUNCTIONS = {
    "batch_norm": nn.BatchNorm(momentum=0.9, use_running_average=False),
    "layer_norm": nn.LayerNorm(reduction_axes=(1, 2)),
    "rms_norm": nn.RMSNorm(scale_init=nn.initializers.normal()),
    "group_norm": nn.GroupNorm(num_groups=None, group_size=2),
    "instance_norm": nn.InstanceNorm(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gives_what_the_linen_layer_gives(name, rng):
    """At 0.02, as embeddings are, where a wrong epsilon is 1 to 2% of y."""
    layer, function = FUNCTIONS[name], getattr(nj, name)
    x = jnp.asarray(0.02 * rng.normal(size=(4, 5, 6)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    expected, _ = layer.apply(variables, x, mutable=["batch_stats"])
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    y, _ = function(params, batch_stats, x, True, **nj.convert.flax_settings(layer))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_group_norm_of_nnx_is_given_by_the_number_of_its_groups():
    layer = nnx.GroupNorm(4, num_groups=None, group_size=2, rngs=nnx.Rngs(0))
    assert nj.convert.flax_settings(layer) == {"num_groups": 2, "epsilon": 1e-6}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_every_layer_of_ours_has_settings(adapter):
    settings = nj.convert.flax_settings(adapter.make())
    assert (
        settings["epsilon"] > 0
        if "epsilon" in settings
        else adapter.name
        in (
            "DynamicTanh",
            "LocalResponseNorm",
        )
    )


def test_the_whole_kernel_is_what_no_feature_axis_means():
    layer = nn.WeightNorm(nn.Dense(2), feature_axes=None)
    assert nj.convert.flax_settings(layer)["feature_axes"] == ()


@pytest.mark.parametrize(
    ("layer", "got"), [(nn.Dense(2), "got Dense"), (nn.LayerNorm, "got the class LayerNorm")]
)
def test_other_layers_are_refused(layer, got):
    with pytest.raises(TypeError, match=got):
        nj.convert.flax_settings(layer)
