import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize import main, parse
from studies.quantize.study import VARIANTS, Network, deployed

from tests.compare import assert_close
from tests.deploy.models import drawn

pytestmark = [
    pytest.mark.usefixtures("promotion_as_in_flax"),  # qwix mixes int8 and float32
    # qwix 0.1.8 asks for it
    pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def variants():
    """A network's variants and a batch, with random statistics."""
    images = np.float32(np.random.default_rng(0).normal(size=(8, 8, 8, 1)))
    network = Network(4)
    with jax.numpy_dtype_promotion("standard"):
        variables = drawn(jax.jit(network.init)(jax.random.key(0), images))
        return deployed(network, variables, images), images


@pytest.mark.slow
def test_int8_is_int8_and_close(variants):
    made, images = variants
    assert list(made) == list(VARIANTS)
    logits = {
        name: jax.jit(variant.apply)(variant.variables, images) for name, variant in made.items()
    }
    logits = jax.device_get(logits)
    size = float(abs(logits["float"]).max())
    assert_close(logits["folded"], logits["float"], atol=1e-5 * size)
    for name in ("folded, int8", "int8"):
        kernels = [leaf for leaf in jax.tree.leaves(made[name].variables) if leaf.dtype == jnp.int8]
        assert (
            len(kernels) == 7
            and str(jax.make_jaxpr(made[name].apply)(made[name].variables, images)).count("i8[") > 7
        )
        assert_close(logits[name], logits["float"], atol=0.15 * size)
        assert abs(logits[name] - logits["float"]).max() > 1e-4 * size  # rounded, after all


@pytest.mark.slow
def test_folded_variants_have_no_batch_norm(variants):
    made, images = variants
    for name, normalized in (
        ("float", True),
        ("folded", False),
        ("folded, int8", False),
        ("int8", True),
    ):
        variant = made[name]
        assert ("batch_stats" in variant.variables) == normalized
        assert (
            "rsqrt" in str(jax.make_jaxpr(variant.apply)(variant.variables, images))
        ) == normalized
    assert made["folded, int8"].size < made["folded"].size / 3


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    arguments = [
        "--steps",
        "30",
        "--eval-every",
        "20",
        "--seeds",
        "1",
        "--width",
        "8",
        "--test-examples",
        "100",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "quantize.json").read_text())
    assert content["status"] == "finished" and "qwix" in content["versions"]
    (outcome,) = content["seeds"]
    assert (
        list(outcome["accuracies"]) == list(VARIANTS) and min(outcome["accuracies"].values()) > 0.5
    )
    assert outcome["as_float"]["folded"] == 1 and min(outcome["as_float"].values()) > 0.9
    assert (
        np.diff(
            [outcome["bytes"][name] for name in ("folded, int8", "int8", "folded", "float")]
        ).min()
        > 0
    )
    assert "batch norm in float32" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit):
        parse(["--data", "cifar10"])
    error = capsys.readouterr().err
    assert "--data cifar10 needs --data-dir" in error and error.count("\n") == 1
