"""`from_torch` and `to_torch` against PyTorch's own layers, training continued on each side."""

import contextlib
import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.convert.training import LEARNING_RATE, TOLERANCE, batches, step

CONV = {"dimension_numbers": ("NCHW", "HWIO", "NCHW"), "window_strides": (1, 1), "padding": "VALID"}
TRANSPOSED = {"dimension_numbers": ("NCHW", "HWIO", "NCHW"), "strides": (2, 2), "padding": "VALID"}


def without_running(settings, params, batch_stats, x, train):
    """BatchNorm(track_running_stats=False): the batch's statistics, at inference too."""
    return nj.batch_norm(params, nj.batch_norm_init(x.shape[1])[1], x, True, **settings)[
        0
    ], batch_stats


def tracked_instance_norm(momentum, settings, params, batch_stats, x, train):
    """InstanceNorm(track_running_stats=True), as docs/pages/convert.md has it."""
    if not train:
        return nj.batch_norm(params, batch_stats, x, False, **settings)
    seen = nj.moments(x, tuple(range(2, x.ndim)))
    mean = nj.Moments(math.prod(x.shape[2:]), seen.mean.mean(0), seen.var.mean(0))
    count = batch_stats["count"]  # which PyTorch leaves at 0
    batch_stats = nj.update_batch_stats(
        batch_stats, mean, momentum=momentum, running_var="unbiased"
    )
    return nj.instance_norm(params, {}, x, True, **settings)[0], batch_stats | {"count": count}


def plain(function):
    return lambda settings, *args: function(*args, **settings)


def linear(x, kernel):
    return x @ kernel


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, **CONV)


def transposed(x, kernel):
    return jax.lax.conv_transpose(x, kernel, transpose_kernel=True, **TRANSPOSED)


def with_weights(normalize, operation):
    """A linear layer with a normalized kernel."""

    def apply(settings, params, batch_stats, x, train):
        scale = {leaf: params[leaf] for leaf in ("scale",) if leaf in params}
        kernel, batch_stats = normalize(scale, batch_stats, params["kernel"], train, **settings)
        y = operation(x, kernel)
        return y + params["bias"].reshape(-1, *[1] * (y.ndim - 2)), batch_stats

    return apply


def hook(normalize):
    """The deprecated form, whose checkpoints are still around."""

    def wrap(layer, **settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return normalize(layer, **settings)

    return wrap


old_weight_norm, old_spectral_norm = hook(nn.utils.weight_norm), hook(nn.utils.spectral_norm)
wn, sn = nj.weights.weight_norm, nj.weights.spectral_norm
tracked = {"track_running_stats": True}
IMAGES = (4, 6, 5, 5)

CASES = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), (8, 6), plain(nj.batch_norm)),
    "BatchNorm1d of sequences": (
        lambda: nn.BatchNorm1d(6, momentum=0.3),
        (8, 6, 5),
        plain(nj.batch_norm),
    ),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6, eps=1e-3), IMAGES, plain(nj.batch_norm)),
    "BatchNorm2d, cumulative": (
        lambda: nn.BatchNorm2d(6, momentum=None),
        IMAGES,
        plain(nj.batch_norm),
    ),
    "BatchNorm2d, plain": (lambda: nn.BatchNorm2d(6, affine=False), IMAGES, plain(nj.batch_norm)),
    "BatchNorm2d, not tracked": (
        lambda: nn.BatchNorm2d(6, track_running_stats=False),
        IMAGES,
        without_running,
    ),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (2, 3, 2, 4, 3), plain(nj.batch_norm)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(6), IMAGES, plain(nj.batch_norm)),
    "LayerNorm": (lambda: nn.LayerNorm(5), IMAGES, plain(nj.layer_norm)),
    "LayerNorm of 3 axes": (lambda: nn.LayerNorm((6, 5, 5)), IMAGES, plain(nj.layer_norm)),
    "LayerNorm of 2 axes, no bias": (
        lambda: nn.LayerNorm((5, 5), bias=False),
        IMAGES,
        plain(nj.layer_norm),
    ),
    "LayerNorm, plain": (
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        IMAGES,
        plain(nj.layer_norm),
    ),
    "RMSNorm": (lambda: nn.RMSNorm(5), IMAGES, plain(nj.rms_norm)),
    "RMSNorm of 2 axes": (lambda: nn.RMSNorm((5, 5), eps=1e-4), IMAGES, plain(nj.rms_norm)),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), IMAGES, plain(nj.group_norm)),
    "GroupNorm, plain": (lambda: nn.GroupNorm(2, 6, affine=False), IMAGES, plain(nj.group_norm)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6), (4, 6, 9), plain(nj.instance_norm)),
    "InstanceNorm2d, affine": (
        lambda: nn.InstanceNorm2d(6, affine=True),
        IMAGES,
        plain(nj.instance_norm),
    ),
    "InstanceNorm2d, tracked": (
        lambda: nn.InstanceNorm2d(6, affine=True, momentum=0.2, **tracked),
        IMAGES,
        functools.partial(tracked_instance_norm, 0.8),
    ),
    "InstanceNorm3d, tracked, plain": (
        lambda: nn.InstanceNorm3d(3, **tracked),
        (2, 3, 2, 4, 3),
        functools.partial(tracked_instance_norm, 0.9),
    ),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        (8, 6),
        with_weights(wn, linear),
    ),
    "weight_norm of a whole": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None),
        (8, 6),
        with_weights(wn, linear),
    ),
    "weight_norm of inputs": (
        lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 3), dim=1),
        IMAGES,
        with_weights(wn, conv),
    ),
    "weight_norm, hook": (
        lambda: old_weight_norm(nn.Conv2d(6, 4, 3)),
        IMAGES,
        with_weights(wn, conv),
    ),
    "weight_norm, transposed": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(6, 4, 3, 2)),
        IMAGES,
        with_weights(wn, transposed),
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        (8, 6),
        with_weights(sn, linear),
    ),
    "spectral_norm, hook": (
        lambda: old_spectral_norm(nn.Conv2d(6, 4, 3), n_power_iterations=2),
        IMAGES,
        with_weights(sn, conv),
    ),
    "spectral_norm, transposed": (
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(6, 6, 3, 2)),
        IMAGES,
        with_weights(sn, transposed),
    ),
}


def torch_step(module, x, weights):
    module.zero_grad()
    y = module(torch.tensor(x))
    weights = torch.tensor(np.resize(weights, y.numel()))
    if y.requires_grad:
        torch.mean(weights * torch.tanh(y.flatten())).backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return y.detach().numpy()


def initial(make, shape):
    """A module away from its start: random weights, then training."""
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.rand_like(parameter)
    for x, weights in batches(1, shape):
        torch_step(module, x, weights)
    return module


def train_both(module, side, params, batch_stats, shape, seed):
    """Ten steps on both sides; outputs, parameters and statistics are compared at each."""
    for x, weights in batches(seed, shape):
        y, params, batch_stats = side(params, batch_stats, x, weights)
        assert_close(y, torch_step(module, x, weights), **TOLERANCE)
        theirs = nj.convert.from_torch(module)
        if "sigma" in batch_stats:  # theirs is that of the new kernel
            theirs[1]["sigma"] = batch_stats["sigma"]
        assert_trees_close((params, batch_stats), theirs, **TOLERANCE)
    return params, batch_stats


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_alike_on_both_sides(name):
    make, shape, apply = CASES[name]
    module = initial(make, shape)
    settings = nj.convert.torch_settings(module)
    side = jax.jit(lambda *args: step(lambda p, s, x: apply(settings, p, s, x, True), *args))
    params, batch_stats = train_both(module, side, *nj.convert.from_torch(module), shape, seed=2)

    other = make()
    other.load_state_dict(nj.convert.to_torch(params, batch_stats, like=other))
    train_both(other, side, params, batch_stats, shape, seed=3)


@pytest.mark.parametrize("name", [name for name in CASES if "spectral" not in name])
def test_inference_agrees(name):
    make, shape, apply = CASES[name]
    module = initial(make, shape).eval()
    params, batch_stats = nj.convert.from_torch(module)
    x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    y, _ = apply(nj.convert.torch_settings(module), params, batch_stats, jnp.asarray(x), False)
    assert_close(y, module(torch.tensor(x)).detach().numpy(), **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CASES if "spectral" in name])
def test_spectral_norms_weight_at_inference_is_the_kernel_over_sigma(name):
    make, shape, _ = CASES[name]
    module = initial(make, shape).eval()
    module(torch.zeros(shape))
    params, batch_stats = nj.convert.from_torch(module)
    state = nj.convert.to_torch({"kernel": params["kernel"] / batch_stats["sigma"]}, {})
    assert_close(state["weight"], module.weight.detach().numpy(), **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_nothing_changes(name):
    make, shape, _ = CASES[name]
    module = initial(make, shape)
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    back = nj.convert.to_torch(
        *nj.convert.from_torch(state, like=nj.convert.from_torch(module)), like=module
    )
    back = {key: value.numpy() for key, value in back.items()}
    vectors = {key for key in state if "spectral" in name and key.endswith(("0._u", "weight_v"))}
    assert [*back] == [*state]
    assert_identical(
        {k: v for k, v in back.items() if k not in vectors},
        {k: state[k] for k in back if k not in vectors},
    )
    for key in vectors:  # normjax keeps one: the other is what power iteration gives
        assert back[key] @ state[key] > 0.8


def test_a_file_of_safetensors_and_a_mapping_of_numpy_are_enough(tmp_path):
    from safetensors.numpy import save_file

    module = initial(*CASES["BatchNorm2d"][:2])
    state = {f"net.bn.{key}": value.numpy() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    np.savez(tmp_path / "weights.npz", **state)
    expected = nj.convert.from_torch(module)
    for source in (state, tmp_path / "weights.safetensors", np.load(tmp_path / "weights.npz")):
        params, batch_stats = nj.convert.from_torch(source)
        assert_identical((params["net"]["bn"], batch_stats["net"]["bn"]), expected)
    save_file(nj.convert.to_torch(params, batch_stats), tmp_path / "back.safetensors")
    assert_identical(
        nj.convert.from_torch(str(tmp_path / "back.safetensors")), (params, batch_stats)
    )


def test_without_the_package_safetensors_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="from_torch.*'w.safetensors'.*pip install safetensors"):
        nj.convert.from_torch("w.safetensors")


def test_half_precision_is_kept_for_parameters_and_widened_for_statistics():
    module = initial(*CASES["BatchNorm2d"][:2]).to(torch.bfloat16)
    params, batch_stats = nj.convert.from_torch(module)
    assert params["scale"].dtype == jnp.bfloat16 and batch_stats["var"].dtype == jnp.float32
    back = nj.convert.to_torch(params, batch_stats, like=module)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


def test_the_tree_of_like_decides_names_dtypes_and_whether_there_is_a_count():
    state = {"weight": np.ones((3, 2), np.float32)}
    norm = (
        nj.layer_norm_init((3, 2), use_bias=False, param_dtype=jnp.bfloat16),
        {"scale": jnp.bfloat16},
    )
    for like, dtypes in (
        norm,
        (({"embedding": jnp.zeros((3, 2))}, {}), {"embedding": jnp.float32}),
    ):
        params, _ = nj.convert.from_torch(state, like=like)
        assert {leaf: value.dtype for leaf, value in params.items()} == dtypes
    assert nj.convert.from_torch(state)[0]["kernel"].shape == (2, 3)
    bn = nn.BatchNorm2d(3)
    assert "count" in nj.convert.from_torch(bn)[1]
    like = jax.eval_shape(lambda: nj.batch_norm_init(3))
    assert_identical(nj.convert.from_torch(bn, like=like), nj.batch_norm_init(3))


def test_a_module_says_which_of_its_weights_are_no_kernels():
    network = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm((5, 4), bias=False), nn.Linear(4, 3))
    params, _ = nj.convert.from_torch(network)
    assert jax.tree.map(jnp.shape, params) == {
        "0": {"embedding": (7, 4)},
        "1": {"scale": (5, 4)},
        "2": {"kernel": (4, 3), "bias": (3,)},
    }
    back = nj.convert.to_torch(params, {}, like=network)
    assert all(torch.equal(back[key], value) for key, value in network.state_dict().items())


def test_without_a_count_torch_starts_at_none():
    state = nj.convert.to_torch(*nj.batch_norm_init(3))
    assert state["num_batches_tracked"] == 0 and state["num_batches_tracked"].dtype == np.int64
    module = nn.BatchNorm1d(3)
    module.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})


def test_settings_of_a_module_without_any_are_refused():
    with pytest.raises(TypeError, match="torch_settings.*got ReLU"):
        nj.convert.torch_settings(nn.ReLU())
    with contextlib.suppress(ImportError):
        assert nj.convert.torch_settings(nn.RMSNorm(3))["epsilon"] == torch.finfo(torch.float32).eps
