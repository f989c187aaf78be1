"""The three examples that a newcomer opens: from training to a folded network."""

import importlib
import re
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("functional", "linen", "nnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_trained_restored_recalibrated_and_folded(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "STEPS", 60)
    with jax.numpy_dtype_promotion("standard"):
        module.main()
    out = capsys.readouterr().out
    accuracies = dict(re.findall(r"(\w+): test accuracy ([\d.]+)%", out))
    assert list(accuracies) == ["restored", "recalibrated", "folded"]
    assert float(accuracies["recalibrated"]) > 80
    assert accuracies["folded"] == accuracies["recalibrated"]
    assert "3 of 3 folded" in out


@pytest.mark.parametrize("name", NAMES)
def test_it_is_read_in_a_minute(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 100
