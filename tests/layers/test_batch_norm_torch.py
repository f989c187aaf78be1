"""`batch_norm` against `torch.nn.BatchNorm1d` and `BatchNorm2d`, step by step of training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import normjax as nj
from tests.compare import assert_close, assert_identical
from tests.marks import slow_after

EPS = float(jnp.finfo(jnp.float32).eps)
STEPS, LEARNING_RATE = 4, 0.1
# Both round in float32: each step's own error (some tens of roundings, as in test_batch_norm.py)
# adds to the last.
TOLERANCE = {"rtol": 200 * EPS, "atol": 200 * EPS}
SHAPES = {"rank 2": (8, 3), "rank 3": (4, 3, 5), "rank 4": (4, 3, 2, 5)}


def torch_layer(rng, shape, affine, momentum, epsilon):
    """A torch layer whose weights and statistics are not at their start."""
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    layer = kind(shape[1], eps=epsilon, momentum=momentum, affine=affine)
    state = {
        "running_mean": rng.normal(size=shape[1]),
        "running_var": rng.gamma(2.0, size=shape[1]),
    }
    if momentum is None:
        state = {}  # the cumulative mean forgets its start
    if affine:
        state |= {"weight": rng.normal(1, 0.3, shape[1]), "bias": rng.normal(size=shape[1])}
    layer.load_state_dict(
        {k: torch.tensor(v, dtype=torch.float32) for k, v in state.items()}, strict=False
    )
    return layer


def from_torch(layer, count):
    array = lambda tensor: jnp.asarray(tensor.detach().numpy().copy())  # noqa: E731
    params = {"scale": array(layer.weight), "bias": array(layer.bias)} if layer.affine else {}
    batch_stats = {"mean": array(layer.running_mean), "var": array(layer.running_var)}
    return params, batch_stats | ({"count": jnp.zeros((), jnp.int32)} if count else {})


def compare_step(layer, params, batch_stats, x, weights, settings):
    """Asserts that outputs, gradients and statistics of a training step agree; returns ours."""

    def loss(params, x):
        y, new = nj.batch_norm(params, batch_stats, x, True, **settings)
        return jnp.sum(jnp.asarray(weights) * y), (y, new)

    (dparams, dx), (y, batch_stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        params, jnp.asarray(x)
    )
    torch_x = torch.tensor(x, requires_grad=True)
    torch_y = layer(torch_x)
    layer.zero_grad()
    torch.sum(torch.tensor(weights) * torch_y).backward()
    assert_close(y, torch_y.detach().numpy(), **TOLERANCE)
    assert_close(dx, torch_x.grad.numpy(), **TOLERANCE)
    assert_close(batch_stats["mean"], layer.running_mean.numpy(), **TOLERANCE)
    assert_close(batch_stats["var"], layer.running_var.numpy(), **TOLERANCE)
    if params:
        # Sums over the batch of terms up to 5: their rounding is relative to the terms, not to the
        # sum.
        terms = 200 * EPS * np.abs(weights).sum()
        assert_close(dparams["scale"], layer.weight.grad.numpy(), atol=terms)
        assert_close(dparams["bias"], layer.bias.grad.numpy(), atol=terms)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, dparams), batch_stats


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("affine", slow_after(1, [True, False]), ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", slow_after(2, [0.1, None, 0.01, 1.0]))
def test_training_follows_torch(rng, shape, affine, momentum):
    epsilon = float(rng.choice([1e-5, 1e-3]))
    layer = torch_layer(rng, shape, affine, momentum, epsilon)
    params, batch_stats = from_torch(layer, count=momentum is None)
    settings = {
        "feature_axes": 1,
        "momentum": None if momentum is None else 1 - momentum,
        "epsilon": epsilon,
        "running_var": "unbiased",
    }
    for step in range(STEPS):
        x = rng.normal(step, 1 + step, shape).astype(np.float32)
        weights = rng.normal(size=shape).astype(np.float32)
        params, batch_stats = compare_step(layer, params, batch_stats, x, weights, settings)
    if momentum is None:
        assert batch_stats["count"] == int(layer.num_batches_tracked) == STEPS
    layer.eval()
    x = rng.normal(size=shape).astype(np.float32)
    y, same = nj.batch_norm(params, batch_stats, jnp.asarray(x), False, **settings)
    assert_identical(same, batch_stats)
    assert_close(y, layer(torch.tensor(x)).detach().numpy(), **TOLERANCE)


def test_torchs_variance_is_the_unbiased_one_and_not_ours_by_default(rng):
    layer = torch_layer(rng, (4, 3), False, 0.5, 1e-5)
    params, batch_stats = from_torch(layer, count=False)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    layer(torch.tensor(x))
    _, biased = nj.batch_norm(params, batch_stats, jnp.asarray(x), True, momentum=0.5)
    assert (np.abs(biased["var"] - layer.running_var.numpy()) > 1e-3).all()
