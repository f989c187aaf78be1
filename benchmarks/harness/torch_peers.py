"""PyTorch, eager and compiled, with features first (its default) and last in memory."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .cases import EPSILON, GROUPS, MOMENTUM, Case
from .peers import Unable
from .programs import Built, Operands, checked
from .timing import Program

# Otherwise, PyTorch's threads would keep spinning on the cores while the next program runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Whether it is compiled, and whether images have features last in memory.
PEERS = {
    "torch": (False, False),
    "torch channels-last": (False, True),
    "torch.compile": (True, False),
    "torch.compile channels-last": (True, True),
}


def build(peer: str, case: Case, operands: Operands) -> Built:
    """Builds a case's program for PyTorch; raises Unable or ImportError if that is impossible."""
    import jax
    import torch

    compiled, channels_last = PEERS[peer]
    images = len(case.shape) == 4
    if channels_last and not images:
        raise Unable("features are last as it is")
    if case.devices > 1:
        raise Unable("SyncBatchNorm needs GPUs and a process for each")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise Unable("this PyTorch sees no GPU")
    device = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")

    def tensor(value: np.ndarray) -> Any:
        bits = (
            torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
            if value.itemsize == 2
            else value
        )
        made = torch.as_tensor(bits).to(device)
        if value.ndim == 1 or not images:
            return made
        made = made.permute(0, 3, 1, 2)
        return made if channels_last else made.contiguous()

    tensors = {name: tensor(value) for name, value in operands.host.items()}
    layer = _layer(torch, case).to(device)
    with torch.no_grad():
        for name, own in (
            ("scale", "weight"),
            ("bias", "bias"),
            ("mean", "running_mean"),
            ("var", "running_var"),
        ):
            if getattr(layer, own, None) is not None:
                getattr(layer, own).copy_(tensors[name])
    call = _call(torch, case, layer, tensors, compiled)

    def outputs() -> dict[str, np.ndarray]:
        return {
            name: checked(value.detach().float().cpu().numpy(), images)
            for name, value in call().items()
        }

    def wait(_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    return Built(Program(call, wait, device.type == "cuda"), outputs, {})


def _layer(torch: Any, case: Case) -> Any:
    """Returns the layer; leaves are float32 for batch norm, else have x's dtype, as CUDA needs."""
    nn, c = torch.nn, case.features
    if case.layer == "batch":
        return nn.BatchNorm2d(c, EPSILON, 1 - MOMENTUM).train(case.train)
    layers = {
        "layer": lambda: nn.LayerNorm(c, EPSILON),
        "rms": lambda: nn.RMSNorm(c, EPSILON),
        "group": lambda: nn.GroupNorm(GROUPS, c, EPSILON),
        "instance": lambda: nn.InstanceNorm2d(c, EPSILON, affine=True),
    }
    return layers[case.layer]().to(getattr(torch, case.dtype))


def _call(torch: Any, case: Case, layer: Any, tensors: dict[str, Any], compiled: bool) -> Any:
    backward = case.mode == "forward+backward"
    x, residual = tensors["x"], tensors.get("residual")
    sources = {
        "d_x": x,
        "d_scale": layer.weight,
        "d_bias": getattr(layer, "bias", None),
        "d_residual": residual,
    }
    sources = {
        name: value.requires_grad_()
        for name, value in sources.items()
        if backward and value is not None
    }

    def forward(x: Any, residual: Any) -> Any:
        y = layer(x)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if case.then else y

    if compiled:
        torch.compiler.reset()  # removes functions that were compiled for other cases
        forward = torch.compile(forward, dynamic=False)

    def call() -> dict[str, Any]:
        with torch.set_grad_enabled(backward):
            y = forward(x, residual)
        if not backward:
            return {"y": y}
        gradients = torch.autograd.grad(y, list(sources.values()), tensors["cotangent"])
        return {"y": y, **dict(zip(sources, gradients, strict=True))}

    return call
