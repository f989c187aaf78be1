"""Converts a network of each timm family to Flax trees and back, and counts successes.

    pip install timm          # and torchvision
    python benchmarks/timm_families.py
    python benchmarks/timm_families.py resnet vgg     # these families alone

A family is a module of timm.models; the smallest of at most 12 of its networks is used, with random
weights. It is accepted if `from_torch(network)` and `to_torch(..., like=network)` return each array
unchanged. Since Flax has one bias where an LSTM has two, their sums are compared.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import warnings
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import torch  # noqa: E402 (the platform is chosen before JAX starts)

import normjax as nj  # noqa: E402

SMALL = ("atto", "nano", "tiny", "pico", "femto", "xxs", "test", "18", "_s", "lite0", "b0", "050")
TRIED = 12


def main() -> None:
    """Converts each family, and prints errors, warnings and counts."""
    parser = argparse.ArgumentParser(description="Converts a network of each family of timm.")
    parser.add_argument("families", nargs="*", help="all, if none is named")
    chosen = parser.parse_args().families
    families = importlib.import_module("timm.models._registry")._module_to_models
    counts = {"accepted": 0, 'accepted with others="refuse"': 0, "accepted as a state_dict": 0}
    names = sorted(family for family in families if not chosen or family in chosen)
    for family in names:
        name = smallest(families[family])
        network = create(name)
        report = {
            "accepted": attempt(lambda network=network: there_and_back(network)),
            'accepted with others="refuse"': attempt(
                lambda network=network: nj.convert.from_torch(network, others="refuse")
            ),
            "accepted as a state_dict": attempt(
                lambda network=network: nj.convert.from_torch(network.state_dict())
            ),
        }
        for what, problem in report.items():
            counts[what] += problem is None
            if problem is not None and "refuse" not in what:
                print(f"{family} ({name}), not {what}: {problem}", flush=True)
        gc.collect()
    print(f"{len(names)} families", *(f"{what}: {n}" for what, n in counts.items()), sep=", ")


def create(name: str) -> Any:
    """Returns a network with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("timm").create_model(name, pretrained=False)


def smallest(names: set[str]) -> str:
    """Returns the name of the network with the fewest parameters among the likeliest."""
    likely = sorted(names, key=lambda name: (not any(s in name for s in SMALL), len(name), name))
    sizes = {}
    for name in likely[:TRIED]:
        with torch.device("meta"):
            sizes[name] = sum(parameter.numel() for parameter in create(name).parameters())
    return min(sizes, key=lambda name: sizes[name])


def attempt(convert: Any) -> str | None:
    """Returns an error, a warning, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def there_and_back(network: torch.nn.Module) -> None:
    """Raises an error if an array changes in a round trip."""
    state = nj.convert.to_torch(*nj.convert.from_torch(network), like=network)
    expected = network.state_dict()
    for key, value in expected.items():
        ours = state[key]
        if re.search(r"bias_[ih]h_l", key):
            partner = re.sub(r"bias_[ih]h_l", "bias_hh_l" if "bias_ih" in key else "bias_ih_l", key)
            ours, value = ours + state[partner], value + expected[partner]
        if not torch.allclose(ours.double(), value.double(), rtol=0, atol=1e-6, equal_nan=True):
            raise ValueError(f"{key} came back with other values")


if __name__ == "__main__":
    main()
