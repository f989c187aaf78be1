"""Loads a PyTorch ResNet-18, a state_dict in torchvision's style, into a linen network.

Both networks are defined below with the same module names, so that no key has to be renamed. The
program changes the weights and running statistics of the PyTorch network from their initial values,
converts them with `nj.convert.from_torch`, and compares logits. Then it runs one more batch through
both networks in training, and compares their running statistics.

    python examples/from_torch.py                                 # half a minute, no download
    python examples/from_torch.py --weights resnet18.safetensors  # or .pth: such as torchvision's

Note these differences, which otherwise make results only nearly equal:
  - PyTorch pads both sides alike. Flax's "SAME" pads a convolution of stride 2 more at the end than
    at the beginning.
  - PyTorch's momentum is 1 minus normjax's (0.1 is normjax's 0.9), and its running variance is
    unbiased.
  - PyTorch's images are (batch, channels, height, width), its kernels (out, in, height, width).
    `from_torch` transposes the kernels, this program the images.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common.arguments import Parser, number
from common.extras import stop_without
from flax import linen as nn
from jax import Array

import normjax as nj

try:
    import torch
except ImportError as error:
    stop_without(error)

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # features, and the stride of the first block


def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    """Returns a convolution with PyTorch's padding."""
    padding = size // 2
    return nn.Conv(
        features, (size, size), stride, [(padding, padding)] * 2, use_bias=False, name=name
    )


class Block(nn.Module):
    """Two 3x3 convolutions, and a shortcut: a 1x1 convolution if the shape changes."""

    features: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the block's output."""
        y = self.norm(name="bn1")(conv(self.features, 3, self.stride, "conv1")(x))
        y = conv(self.features, 3, 1, "conv2")(nn.relu(y))
        # only used for training from scratch
        y = self.norm(name="bn2", scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = Downsample(self.features, self.stride, self.norm, name="downsample")(x)
        return nn.relu(x + y)


class Downsample(nn.Module):
    """A 1x1 convolution with its norm; in PyTorch a `Sequential`, with modules named 0 and 1."""

    features: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns x with other features, and maybe fewer pixels."""
        return self.norm(name="1")(conv(self.features, 1, self.stride, "0")(x))


class Stage(nn.Module):
    """Two blocks; a `Sequential` in PyTorch."""

    features: int
    stride: int
    norm: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the stage's output."""
        x = Block(self.features, self.stride, self.norm, name="0")(x)
        return Block(self.features, 1, self.norm, name="1")(x)


class ResNet18(nn.Module):
    """Maps images `(batch, height, width, 3)` to logits, as torchvision's `resnet18` does."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits; in training the collection `batch_stats` has to be mutable."""
        norm = partial(
            nj.linen.BatchNorm, use_running_average=not train, momentum=0.9, running_var="unbiased"
        )
        x = nn.relu(norm(name="bn1")(conv(64, 7, 2, "conv1")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # type: ignore[arg-type]
        for i, (features, stride) in enumerate(STAGES):
            x = Stage(features, stride, norm, name=f"layer{i + 1}")(x)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


class TorchBlock(torch.nn.Module):
    """PyTorch's `Block`."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(features)
        self.conv2 = torch.nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(features)
        self.downsample = None
        if inputs != features or stride != 1:
            shortcut = torch.nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(shortcut, torch.nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchResNet18(torch.nn.Module):
    """PyTorch's `ResNet18`, with the keys of torchvision's."""

    def __init__(self, classes: int = 1000):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(64)
        inputs = 64
        for i, (features, stride) in enumerate(STAGES):
            blocks = TorchBlock(inputs, features, stride), TorchBlock(features, features, 1)
            self.add_module(f"layer{i + 1}", torch.nn.Sequential(*blocks))
            inputs = features
        self.fc = torch.nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits of images `(batch, 3, height, width)`."""
        x = torch.nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for i in range(len(STAGES)):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


def load(source: Any, classes: int = 1000) -> tuple[ResNet18, dict[str, Any]]:
    """Returns the network, and variables from a module, a state_dict or a .safetensors file."""
    model = ResNet18(classes)
    empty = jax.eval_shape(
        partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    params, batch_stats = nj.convert.from_torch(
        source, like=(empty["params"], empty["batch_stats"])
    )
    return model, {"params": params, "batch_stats": batch_stats}


def trained(classes: int = 1000, seed: int = 0) -> TorchResNet18:
    """Returns a PyTorch network with changed running statistics and affine parameters."""
    torch.manual_seed(seed)
    network = TorchResNet18(classes)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
        network.fc.weight.normal_(0, 0.2)
        for _ in range(3):
            network(0.3 + torch.randn(16, 3, 64, 64))
    return network


def images(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """Returns noise with the mean and deviation of normalized images, in PyTorch's layout."""
    return np.random.default_rng(seed).normal(0.2, 1.2, (batch, 3, size, size)).astype(np.float32)


def compare_logits(
    network: TorchResNet18, model: ResNet18, variables: Any, x: np.ndarray
) -> tuple[float, float]:
    """Returns the largest difference between the logits at inference, and the largest logit."""
    with torch.no_grad():
        expected = network.eval()(torch.tensor(x)).numpy()
    logits = jax.jit(partial(model.apply, train=False))(variables, x.transpose(0, 2, 3, 1))
    return float(np.abs(logits - expected).max()), float(np.abs(expected).max())


def compare_training(
    network: TorchResNet18, model: ResNet18, variables: Any, x: np.ndarray
) -> float:
    """Returns the largest relative difference of running statistics after one more batch."""
    with torch.no_grad():
        network.train()(torch.tensor(x))
    _, expected = nj.convert.from_torch(
        network, like=(variables["params"], variables["batch_stats"])
    )
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = apply(variables, x.transpose(0, 2, 3, 1))
    differences = jax.tree.map(
        lambda a, b: abs(a - b).max() / abs(b).max(), updates["batch_stats"], expected
    )
    return float(max(jax.tree.leaves(differences)))


def read(weights: Path | None) -> TorchResNet18:
    """Returns a PyTorch network with the weights of a file, or with random ones."""
    network = trained()
    if weights is not None and weights.suffix == ".safetensors":
        params, batch_stats = nj.convert.from_torch(weights)
        network.load_state_dict(nj.convert.to_torch(params, batch_stats, like=network))
    elif weights is not None:
        network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts the weights, and prints the differences between the two networks."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="a .safetensors or .pth file of a ResNet-18"
    )
    pixels = number(int, "a positive integer")
    parser.add_argument(
        "--sizes", type=pixels, nargs="+", default=[224, 64, 33], help="of images, in pixels"
    )
    options = parser.parse_args(arguments)
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights {options.weights}: there is no such file")
    network = read(options.weights)
    model, variables = load(network)
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(variables)):,} numbers of "
        f"{len(network.state_dict())} keys converted"
    )
    for size in options.sizes:
        difference, largest = compare_logits(network, model, variables, images(4, size))
        print(
            f"{size:3d} x {size:<3d} pixels: logits up to {largest:.2f}, "
            f"which differ by at most {difference:.1e}"
        )
    difference = compare_training(network, model, variables, images(8, 64))
    print(f"running statistics after one more batch differ by {difference:.1e} of the largest")


if __name__ == "__main__":
    main()
