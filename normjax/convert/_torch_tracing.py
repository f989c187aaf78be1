"""Follows an example through a PyTorch module to find layers with flattened images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from normjax import _checks
from normjax.convert._torch_features import NORMS, Order
from normjax.convert._torch_groups import modules_in
from normjax.convert._torch_settings import class_names

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose")
# After these operations, channels are on another axis, or features are new.
MOVE = ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "einsum")
MIX = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
JOINED = Order("in", 0, 0)  # several flattened arrays were concatenated


def follow(function: str, module: Any, example: Any) -> dict[str, Order]:
    """Returns the feature orders of layer inputs, by running the module on an example.

    Args:
      function: the name that errors begin with.
      module: a `torch.nn.Module`; it is run in evaluation mode, and its mode is then restored.
      example: a tensor, or a tuple of arguments. If the first one has four or more axes, it is an
        image with channels first.
    """
    import torch

    arguments = example if isinstance(example, tuple | list) else (example,)
    tags = _Tags()
    if getattr(arguments[0], "ndim", 0) >= 4:
        tags.image(arguments[0])
    orders: dict[str, Order] = {}

    def notice(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            order = tags.order(inputs[0]) if inputs else None
            if order is not None and order.positions != 1:
                orders[name] = order

        return hook

    kinds = {"Linear"} | NORMS
    handles = [
        layer.register_forward_pre_hook(notice(name))
        for name, layer in modules_in(module)
        if class_names(layer) & kinds
    ]
    try:
        with torch.no_grad(), _evaluating(module), _mode(tags):
            module(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    joined = [name for name, order in orders.items() if order == JOINED]
    if joined:
        _checks.raise_error(
            function,
            f"{joined[0]!r} gets several flattened images that were concatenated",
            expected="one image, flattened, before each Linear layer",
            got=f"such inputs of {joined}",
            fix="Permute the rows of its kernel by hand, and pass flattened={"
            + ", ".join(f"{name!r}: None" for name in joined)
            + "}",
        )
    return orders


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """Sets the module to evaluation mode, and then restores the mode of each submodule."""
    training = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, was in training:
            each.training = was


class _Tags:
    """What is known about tensors, by id; tensors are kept alive, so that ids stay unique."""

    def __init__(self) -> None:
        self.images: dict[int, Any] = {}
        self.flat: dict[int, tuple[Any, Order]] = {}

    def image(self, tensor: Any) -> None:
        """Records that a tensor is `(batch, channels, *window)`."""
        self.images[id(tensor)] = tensor

    def order(self, tensor: Any) -> Order | None:
        """Returns the order of a flattened image; None for other tensors."""
        found = self.flat.get(id(tensor))
        return None if found is None else found[1]

    def after(self, name: str, inputs: list[Any], output: Any) -> None:
        """Records the result of an operation with this name."""
        if name.startswith(CONVOLUTIONS):
            self.image(output)
        elif name not in MOVE and name not in MIX and name.strip("_") not in MOVE:
            for tensor in inputs:
                self._passes(tensor, output)

    def _passes(self, tensor: Any, output: Any) -> None:
        order = self.order(tensor)
        if order is not None:
            new = order if output.shape == tensor.shape else JOINED
            keeps_rows = output.ndim == tensor.ndim and output.shape[0] == tensor.shape[0]
            if keeps_rows and order.positions != 1:
                self.flat[id(output)] = (output, new)
        elif id(tensor) in self.images:
            flat_window = output.ndim == 3 and output.shape[:2] == tensor.shape[:2]
            if output.ndim == tensor.ndim or flat_window:
                self.image(output)
            elif output.ndim == 2 and output.shape[1] == math.prod(tensor.shape[1:]):
                order = Order("in", tensor.shape[1], math.prod(tensor.shape[2:]))
                self.flat[id(output)] = (output, order)


def _mode(tags: _Tags) -> Any:
    """Returns a context in which the tags record every operation of PyTorch."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                lists = (each if isinstance(each, tuple | list) else (each,) for each in args)
                inputs = [each for several in lists for each in several]
                inputs = [each for each in inputs if isinstance(each, Tensor)]
                tags.after(func.__name__, inputs, output)
            return output

    return Mode()
