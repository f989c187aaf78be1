"""A folded model, exported as StableHLO, does the same where neither normjax nor Flax is loaded."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import normjax as nj
from tests.compare import assert_close
from tests.deploy.models import linen_model

LOAD = """
import sys, numpy as np
from jax import export
exported = export.deserialize(bytearray(open("model", "rb").read()))
np.save("y.npy", exported.call(np.load("x.npy")))
assert not {"normjax", "flax"} & set(sys.modules)
"""

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


def layers(x):
    norm = partial(nj.linen.BatchNorm, use_running_average=True)
    x = nn.relu(norm()(nn.Conv(4, (3, 3), 2)(x)))
    x = nn.relu(norm()(nn.ConvTranspose(4, (3, 3))(x)))
    return norm()(nn.Dense(5)(x.mean((1, 2))))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)


@pytest.fixture
def source(x):
    return linen_model(layers, x)


@pytest.fixture
def folded(source, x):
    return nj.deploy.fold(*source, x, show=False)


@pytest.mark.slow
def test_any_batch_size_with_the_variables_as_arguments(source, folded, x):
    (batch,) = export.symbolic_shape("batch")
    exported = export.export(folded.apply)(
        folded.variables, jax.ShapeDtypeStruct((batch, 6, 6, 3), x.dtype)
    )
    reloaded = export.deserialize(exported.serialize())
    assert "rsqrt" not in reloaded.mlir_module()
    model, variables = source
    for inputs in (x, x[:1], jnp.concatenate([x, -x])):
        assert_close(
            reloaded.call(folded.variables, inputs),
            jax.jit(model.apply)(variables, inputs),
            atol=1e-5,
        )


@pytest.mark.slow
def test_elsewhere_with_the_variables_inside(source, folded, x, tmp_path):
    exported = export.export(jax.jit(partial(folded.apply, folded.variables)))(x)
    (tmp_path / "model").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model, variables = source
    assert_close(np.load(tmp_path / "y.npy"), jax.jit(model.apply)(variables, x), atol=1e-5)
