"""`make test-flax` puts normjax's layers where Flax's tests look for them, and needs a checkout."""

import os
import subprocess
import sys
from pathlib import Path

import flax

from tests import flax_suite

ROOT = Path(__file__).parents[1]
TEST = """
from flax import linen as nn, nnx
from flax.linen import normalization

def test_that_a_layer_is_normjaxs():
    for layer in (nn.LayerNorm, normalization.LayerNorm, nn.attention.LayerNorm):
        assert layer().__module__ == "normjax.linen.layer_norm"
    for layer in (nnx.RMSNorm, nnx.nn.normalization.RMSNorm):
        assert layer(2, rngs=nnx.Rngs(0)).__module__ == "normjax.nnx.rms_norm"

def test_that_fails():
    assert type(helper()) is None

def helper():
    return nn.BatchNorm(use_running_average=True)

"""


def test_names_in_flax_are_swapped_and_failures_found(tmp_path):
    (tmp_path / "tests" / "linen").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "tests" / "linen" / "a_test.py").write_text(TEST)
    done = subprocess.run(
        [sys.executable, "tests/flax_suite.py", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Of the 2 tests of Flax" in done.stdout
    assert ", 1 pass with normjax's." in done.stdout
    assert "a_test.py::test_that_fails does not: see above." in done.stdout


def test_without_a_checkout_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flax_suite.py"])
    assert flax_suite.main() == 2
    assert f"git clone --depth 1 --branch v{flax.__version__} " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["flax_suite.py", str(tmp_path)])
    assert flax_suite.main() == 2
    assert str(tmp_path) in capsys.readouterr().out
