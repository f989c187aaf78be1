"""Layers without batch statistics against `torch.nn`: outputs; gradients of x, weight and bias."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import normjax as nj
from tests.compare import assert_close


class Pair(NamedTuple):
    """A torch layer, our layer that should equal it, and a shape of x with channels first."""

    shape: tuple[int, ...]
    theirs: Any
    ours: str
    settings: dict[str, Any]


NN = torch.nn
PAIRS = {
    # normalized_shape is both: what is reduced, and what weight and bias belong to.
    "layer, rank 2": Pair((6, 5), NN.LayerNorm(5), "layer_norm", {}),
    "layer, rank 3": Pair((2, 3, 8), NN.LayerNorm(8, eps=1e-3), "layer_norm", {"epsilon": 1e-3}),
    "layer, two axes": Pair(
        (4, 2, 3, 5),
        NN.LayerNorm((3, 5)),
        "layer_norm",
        {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)},
    ),
    "layer, no bias": Pair((6, 5), NN.LayerNorm(5, bias=False), "layer_norm", {}),
    "layer, plain": Pair((6, 5), NN.LayerNorm(5, elementwise_affine=False), "layer_norm", {}),
    "rms, rank 2": Pair((6, 5), NN.RMSNorm(5, eps=1e-5), "rms_norm", {}),
    "rms, rank 4": Pair(
        (2, 3, 4, 5),
        NN.RMSNorm((4, 5), eps=1e-2),
        "rms_norm",
        {"reduction_axes": (2, 3), "feature_axes": (2, 3), "epsilon": 1e-2},
    ),
    "rms, plain": Pair((6, 5), NN.RMSNorm(5, eps=1e-5, elementwise_affine=False), "rms_norm", {}),
    "group, rank 2": Pair(
        (3, 8), NN.GroupNorm(2, 8), "group_norm", {"num_groups": 2, "feature_axes": 1}
    ),
    "group, rank 4": Pair(
        (2, 6, 4, 5), NN.GroupNorm(3, 6), "group_norm", {"num_groups": 3, "feature_axes": 1}
    ),
    "group, by size": Pair(
        (2, 6, 4), NN.GroupNorm(3, 6), "group_norm", {"group_size": 2, "feature_axes": 1}
    ),
    "group, 32 by default": Pair(
        (2, 64, 3), NN.GroupNorm(32, 64), "group_norm", {"feature_axes": 1}
    ),
    "group, plain": Pair(
        (2, 6, 4),
        NN.GroupNorm(1, 6, affine=False),
        "group_norm",
        {"num_groups": 1, "feature_axes": 1},
    ),
    "instance, 1d": Pair(
        (3, 4, 7), NN.InstanceNorm1d(4, affine=True), "instance_norm", {"feature_axes": 1}
    ),
    "instance, 2d": Pair(
        (2, 3, 4, 5), NN.InstanceNorm2d(3, affine=True), "instance_norm", {"feature_axes": 1}
    ),
    "instance, 3d": Pair(
        (2, 3, 2, 4, 3), NN.InstanceNorm3d(3, affine=True), "instance_norm", {"feature_axes": 1}
    ),
    "instance, plain": Pair(
        (2, 3, 4, 5),
        NN.InstanceNorm2d(3, eps=0.1),
        "instance_norm",
        {"feature_axes": 1, "epsilon": 0.1},
    ),
    "response, the paper's": Pair(
        (2, 7, 3, 4),
        NN.LocalResponseNorm(5, alpha=5e-4, k=2.0),
        "local_response_norm",
        {"feature_axes": 1},
    ),
    "response, strong": Pair(
        (2, 7, 4),
        NN.LocalResponseNorm(3, alpha=2.0, beta=0.5, k=0.5),
        "local_response_norm",
        {"size": 3, "alpha": 2.0, "beta": 0.5, "k": 0.5, "feature_axes": 1},
    ),
    "response, even window": Pair(
        (2, 7, 4),
        NN.LocalResponseNorm(4, alpha=1.0),
        "local_response_norm",
        {"size": 4, "alpha": 1.0, "k": 1.0, "feature_axes": 1},
    ),
    "response, wider than x": Pair(
        (2, 3, 4),
        NN.LocalResponseNorm(9, alpha=1.0),
        "local_response_norm",
        {"size": 9, "alpha": 1.0, "k": 1.0, "feature_axes": 1},
    ),
}
LEAVES = {"scale": "weight", "bias": "bias"}


def weights_of(layer, rng, dtype):
    """Gives the torch layer weights away from their start, and returns them as a tree of ours."""
    params = {}
    for leaf, name in LEAVES.items():
        weight = getattr(layer, name, None)
        if weight is not None:
            params[leaf] = rng.normal(leaf == "scale", 0.5, tuple(weight.shape)).astype(dtype)
            setattr(layer, name, torch.nn.Parameter(torch.tensor(params[leaf])))
    return jax.tree.map(jnp.asarray, params)


def run_torch(layer, x, cotangent):
    x = torch.tensor(x, requires_grad=True)
    y = layer(x)
    torch.sum(torch.tensor(cotangent) * y).backward()
    grads = {leaf: getattr(layer, name, None) for leaf, name in LEAVES.items()}
    return (
        y.detach().numpy(),
        x.grad.numpy(),
        {leaf: w.grad.numpy() for leaf, w in grads.items() if w is not None},
    )


@pytest.mark.parametrize(
    ("dtype", "train"),
    [(np.float32, True), pytest.param(np.float64, False, marks=pytest.mark.slow)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_outputs_and_gradients_are_torchs(rng, pair, dtype, train):
    with jax.enable_x64(dtype == np.float64):
        params = weights_of(pair.theirs, rng, dtype)
        x = rng.normal(1, 2, pair.shape).astype(dtype)
        cotangent = rng.normal(size=pair.shape).astype(dtype)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        def run(params, x):
            y, batch_stats = getattr(nj, pair.ours)(params, {}, x, train, **pair.settings)
            assert batch_stats == {}
            return jnp.sum(jnp.asarray(cotangent) * y), y

        (grads, dx), y = run(params, jnp.asarray(x))
        expected, expected_dx, expected_grads = run_torch(pair.theirs, x, cotangent)
        eps = float(np.finfo(dtype).eps)
        # Both round: some tens of roundings for the statistics, times a gain 1/std of up to 3 here.
        assert_close(y, expected, rtol=64 * eps, atol=64 * eps, dtype=dtype)
        assert_close(
            dx, expected_dx, rtol=64 * eps, atol=64 * eps * np.abs(expected_dx).max(), dtype=dtype
        )
        # Sums over x of terms of either sign: their rounding is relative to the terms.
        terms = 64 * eps * np.abs(cotangent * expected).sum() + 64 * eps * np.abs(cotangent).max()
        assert grads.keys() == expected_grads.keys()
        for leaf, grad in grads.items():
            assert_close(grad, expected_grads[leaf], atol=terms, dtype=dtype)


def test_the_paper_of_alexnet_sums_where_torch_averages(rng):
    """Krizhevsky et al. 2012, section 3.3: the default is 1e-4 times a sum over 5 channels."""
    x = rng.normal(0, 20, (2, 3, 9)).astype(np.float32)
    sums = np.stack(
        [(np.float64(x[..., max(c - 2, 0) : c + 3]) ** 2).sum(-1) for c in range(9)], -1
    )
    y, _ = nj.local_response_norm({}, {}, jnp.asarray(x), True)
    eps = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(y, x / (2 + 1e-4 * sums) ** 0.75, rtol=32 * eps)
