"""Loads a PyTorch ResNet-18, a state_dict in torchvision's style, into a linen network.

Both networks are below. The program changes the PyTorch network's weights and running statistics
from their initial values, converts them with `nj.convert.from_torch`, and compares logits. Then
both networks take one more batch in training, and the program compares their running statistics.

    python examples/from_torch.py                                 # half a minute, no download
    python examples/from_torch.py --weights resnet18.safetensors  # or .pth: such as torchvision's

Note these differences, which otherwise make results only nearly equal:
  - PyTorch pads both sides equally. Flax's "SAME" pads a convolution of stride 2 more at the end
    than at the beginning.
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
from common.arguments import COUNT, Parser
from common.extras import stop_without
from flax import linen as nn
from jax import Array

import normjax as nj

try:
    import torch
    from safetensors.torch import load_file
except ImportError as error:
    stop_without(error)

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # features, and the stride of the first block


class ResNet18(nn.Module):
    """Maps images `(batch, height, width, 3)` to logits, as torchvision's `resnet18` does."""

    classes: int = 1000

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Returns logits; in training the collection `batch_stats` has to be mutable."""
        norm = partial(
            nj.linen.BatchNorm, use_running_average=not train, momentum=0.9, running_var="unbiased"
        )

        def conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
            ends = [(size // 2, size // 2)] * 2
            return nn.Conv(features, (size, size), stride, ends, use_bias=False, name=name)

        x = nn.relu(norm(name="bn1")(conv(64, 7, 2, "conv1")(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # type: ignore[arg-type]
        for i, (features, first) in enumerate(STAGES):
            for j, stride in enumerate((first, 1)):
                block = f"layer{i + 1}_{j}"
                y = conv(features, 3, stride, f"{block}_conv1")(x)
                y = nn.relu(norm(name=f"{block}_bn1")(y))
                y = conv(features, 3, 1, f"{block}_conv2")(y)
                # Scales of 0, for training from the start.
                y = norm(name=f"{block}_bn2", scale_init=nn.initializers.zeros)(y)
                if x.shape != y.shape:
                    x = conv(features, 1, stride, f"{block}_downsample_0")(x)
                    x = norm(name=f"{block}_downsample_1")(x)
                x = nn.relu(x + y)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


class TorchBlock(torch.nn.Module):
    """Two 3x3 convolutions, and a shortcut: a 1x1 convolution if the shape changes."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(features)
        self.conv2 = torch.nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(features)
        self.downsample = torch.nn.Identity()
        if inputs != features or stride != 1:
            shortcut = torch.nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(shortcut, torch.nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


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


def flat(key: str) -> str:
    """Returns the key without nested modules: "layer1.0.bn1.weight" as "layer1_0_bn1.weight"."""
    return key.replace(".", "_", key.count(".") - 1)


def load(source: Any, classes: int = 1000) -> tuple[ResNet18, dict[str, Any]]:
    """Returns the network, and variables from a module, a state_dict or a .safetensors file."""
    model = ResNet18(classes)
    init, image = partial(model.init, train=False), jnp.zeros((1, 32, 32, 3))
    empty = jax.eval_shape(init, jax.random.key(0), image)
    like = empty["params"], empty["batch_stats"]
    params, batch_stats = nj.convert.from_torch(source, like=like, rename=flat)
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
    expected = load(network, model.classes)[1]["batch_stats"]
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = apply(variables, x.transpose(0, 2, 3, 1))
    differences = jax.tree.map(
        lambda a, b: abs(a - b).max() / abs(b).max(), updates["batch_stats"], expected
    )
    return float(max(jax.tree.leaves(differences)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts the weights, and prints the differences between the two networks."""
    parser = Parser(__doc__)
    weights = "a .safetensors or .pth file of a ResNet-18"
    parser.add("--weights", Path, weights, metavar="FILE")
    parser.add("--sizes", COUNT, "of images, in pixels", nargs="+", default=[224, 64, 33])
    options = parser.parse_args(arguments)
    network = trained()
    if file := options.weights:
        if not file.is_file():
            parser.error(f"--weights {file}: there is no such file")
        safe = file.suffix == ".safetensors"
        network.load_state_dict(load_file(file) if safe else torch.load(file, weights_only=True))
    model, variables = load(network)
    count, keys = sum(leaf.size for leaf in jax.tree.leaves(variables)), len(network.state_dict())
    print(f"{count:,} numbers of {keys} keys converted")
    for size in options.sizes:
        apart, largest = compare_logits(network, model, variables, images(4, size))
        logits = f"logits up to {largest:.2f}, which differ by at most {apart:.1e}"
        print(f"{size:3d} x {size:<3d} pixels: {logits}")
    apart = compare_training(network, model, variables, images(8, 64))
    print(f"running statistics after one more batch differ by {apart:.1e} of the largest")


if __name__ == "__main__":
    main()
