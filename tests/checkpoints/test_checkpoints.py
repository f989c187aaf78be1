"""What earlier versions wrote is still read, and means what it meant."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization, traverse_util
from safetensors.flax import load_file

import normjax as nj
from tests.checkpoints import trees
from tests.checkpoints.write import HERE, SEPARATOR
from tests.compare import assert_close, assert_identical, assert_same_kind

VERSIONS = sorted(
    folder.name for folder in HERE.iterdir() if (folder / "outputs.safetensors").exists()
)
FORMATS = ("msgpack", "safetensors", "orbax")
EPS = float(jnp.finfo(jnp.float32).eps)
NAMES = {
    f"{layer.name}-{variant}" for layer in trees.STORED for variant in trees.stored_settings(layer)
}


def read(version, name, kind, template):
    """Returns a checkpoint's tree, read into the structure of the template if the format can."""
    folder = HERE / version
    if kind == "msgpack":
        return serialization.from_bytes(template, (folder / f"{name}.msgpack").read_bytes())
    if kind == "safetensors":
        flat = load_file(folder / f"{name}.safetensors")
        tree = traverse_util.unflatten_dict(flat, sep=SEPARATOR)
        empty = {path: {} for path, leaf in _empty(template)}
        return traverse_util.unflatten_dict(traverse_util.flatten_dict(tree) | empty)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "orbax" / name, abstract)


def _empty(template):
    """The dicts without leaves, which a file of arrays has no place for."""
    flat = traverse_util.flatten_dict(template, keep_empty_nodes=True)
    return [(path, leaf) for path, leaf in flat.items() if leaf is traverse_util.empty_node]


def assert_outputs(version, outputs):
    expected = load_file(HERE / version / "outputs.safetensors")
    for name, y in outputs.items():
        # Other machines and versions of XLA may add in another order.
        assert_close(y, expected[name], rtol=100 * EPS, atol=100 * EPS)


def test_this_version_has_its_checkpoints():
    assert nj.__version__ in VERSIONS
    assert set(load_file(HERE / nj.__version__ / "outputs.safetensors")) == NAMES | {"linen", "nnx"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("version", VERSIONS)
def test_functional_trees(version, kind):
    written = {name: tree for name, tree in trees.functional().items() if name in _cases(version)}
    restored = read(version, "functional", kind, written)
    assert_same_kind(jax.tree.map(jnp.asarray, restored), written)
    assert_identical(jax.tree.map(jnp.asarray, restored), written)
    assert_outputs(version, trees.functional_outputs(restored))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("version", VERSIONS)
def test_variables_of_linen(version, kind):
    template = trees.Linen().init(jax.random.key(0), jnp.ones(trees.SHAPE))
    variables = jax.tree.map(jnp.asarray, read(version, "linen", kind, template))
    assert_same_kind(variables, template)
    assert variables["batch_stats"]["BatchNorm"]["count"] == 7
    assert_identical(variables, trees.linen_variables())
    assert_outputs(version, {"linen": trees.linen_output(variables)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_state_of_nnx(version, kind):
    model = trees.NNX(nnx.Rngs(1))
    before = model(trees.x())
    if kind == "orbax":
        state = read(version, "nnx", kind, nnx.state(model))
    else:
        state = nj.convert.linen_to_nnx(
            read(version, "nnx", kind, nj.convert.nnx_to_linen(model)), model
        )
    nnx.update(model, state)
    y = model(trees.x())
    assert np.abs(y - before).max() > 0.1
    assert_outputs(version, {"nnx": y})


def _cases(version):
    return set(load_file(HERE / version / "outputs.safetensors"))
