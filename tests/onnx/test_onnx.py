"""Inference of every layer, and of a folded network, as an ONNX file that onnxruntime agrees with.

`make test-onnx` runs it, apart: jax2onnx wants an older orbax-checkpoint than `diagnostics` does.
"""

from functools import partial

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnxruntime
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend.core import jaxpr_as_fun

import normjax as nj
from tests.compare import assert_close
from tests.contract.cases import CASES
from tests.contract.layers import SHAPE

pytestmark = [
    pytest.mark.usefixtures("promotion_as_in_flax"),
    pytest.mark.filterwarnings("ignore"),  # of jax2onnx and what it imports
]
KERNELS = ("weight_norm", "weight_standardization", "spectral_norm")


def assert_onnx_agrees(function, x, sizes):
    """Compares what a function gives of x, and of fewer examples if the first size is a name."""
    with nj.plain_phrasing():
        model = jax2onnx.to_onnx(function, inputs=[sizes])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    for inputs in (x, x if sizes == x.shape else x[:1]):
        (y,) = session.run(None, {given.name: np.asarray(inputs)})
        assert_close(jnp.asarray(y), function(inputs), rtol=1e-5, atol=1e-5)
    with nj.plain_phrasing():  # which has kept nothing of what jax2onnx traced
        assert_close(
            function(x),
            jnp.asarray(session.run(None, {given.name: np.asarray(x)})[0]),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_layer(case, rng):
    params, batch_stats, x = case.arguments(rng)
    run = lambda x: case.apply(False)(params, batch_stats, x)[0]  # noqa: E731
    assert_onnx_agrees(run, x, SHAPE)
    if not (case.masked or case.layer.name in KERNELS):
        assert_onnx_agrees(run, x, ("batch", *SHAPE[1:]))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = partial(nj.linen.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = x + norm()(nn.Conv(8, (3, 3), use_bias=False)(x))
        x = nj.linen.GroupNorm(num_groups=2)(x)
        return nn.Dense(10)(nn.gelu(nj.linen.LayerNorm()(x.mean((1, 2)))))


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)


@pytest.fixture
def variables(images):
    network, key = Network(), jax.random.key(0)
    variables = network.init(key, images, train=True)
    _, new = network.apply(variables, images, train=True, mutable=["batch_stats"])
    return variables | new


def test_a_linen_network_of_any_batch_size(images, variables):
    run = partial(Network().apply, variables, train=False)
    assert_onnx_agrees(run, images, ("batch", 8, 8, 3))


def test_an_nnx_network_of_any_batch_size(images):
    conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    norms = nj.nnx.BatchNorm(8, rngs=nnx.Rngs(0)), nj.nnx.RMSNorm(8, rngs=nnx.Rngs(0))
    model = nnx.Sequential(conv, norms[0], nnx.relu, norms[1])
    model.eval()
    assert_onnx_agrees(model, images, ("batch", 8, 8, 3))


def test_a_folded_network(images, variables):
    """Traced before jax2onnx replaces Flax's layers, which hides their kernels from the folding."""
    source = partial(Network().apply, train=False)
    folded = nj.deploy.fold(source, variables, images, show=False)

    def image(x):
        return folded.apply(folded.variables, x[None])[0]

    with nj.plain_phrasing():
        program = jaxpr_as_fun(jax.make_jaxpr(image)(images[0]))
    assert_onnx_agrees(jax.vmap(lambda x: program(x)[0]), images, ("batch", 8, 8, 3))
