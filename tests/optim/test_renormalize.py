"""The function of a scale-invariant network follows the path that theory predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from normjax.optim import effective_learning_rate, renormalize, rotational_equilibrium
from tests.compare import assert_close, assert_trees_close
from tests.optim import networks
from tests.optim.test_project import INVARIANT
from tests.xla import AS_FOR_USERS

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")  # and in optax's Adam
STEPS = 100


def spherical_loss(params, x, labels):
    """Of a network whose one parameter is divided by its norm."""
    w = params["w"]
    return jnp.mean((jnp.tanh(3 * x @ (w / jnp.linalg.norm(w))) - labels) ** 2)


def start():
    return {"w": jnp.asarray(np.random.default_rng(3).standard_normal((5, 3)))}


def decayed(optimizer, weight_decay):
    return optax.chain(optax.add_decayed_weights(weight_decay), optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weight_decay_is_an_exponential_learning_rate(momentum):
    r"""Li & Arora (2020), Theorem 1.1: the rate lr alpha^(-2t-1) without decay.

    alpha is the larger root of x^2 - (1 + momentum - lr wd) x + momentum. With momentum the first
    step of the other path has a velocity: w_{-1} = alpha w_0.
    """
    lr, weight_decay = 0.02, 0.05
    b = 1 + momentum - lr * weight_decay
    alpha = (b + np.sqrt(b * b - 4 * momentum)) / 2
    with jax.enable_x64(True):
        losses, last, _ = networks.path(
            decayed(optax.sgd(lr, momentum=momentum), weight_decay),
            start(),
            STEPS,
            loss=spherical_loss,
        )
        growing = optax.sgd(lambda t: lr * alpha ** (-2.0 * t - 1), momentum=momentum)
        velocity = jax.tree.map(lambda w: -(1 - alpha) / (lr * alpha) * w, start())
        state = growing.init(start())
        state = optax.tree.set(state, trace=velocity) if momentum else state
        others, other, _ = networks.path(growing, start(), STEPS, state=state, loss=spherical_loss)
        assert_close(others, losses, rtol=1e-12)
        assert jnp.linalg.norm(last["w"] - start()["w"]) > 0.1, "there is a path to follow"
        assert_close(other["w"] * alpha**STEPS, last["w"], rtol=1e-10)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "sgd with decay": decayed(optax.sgd(0.05), 0.5),
    "momentum with decay": decayed(optax.sgd(0.02, momentum=0.9, nesterov=True), 0.1),
    "adamw": optax.adamw(0.01, weight_decay=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_function_follows_the_path_of_the_inner_optimizer(name):
    """A network of batch norm (by channels), layer norm (whole kernels) and a free head."""
    optimizer = OPTIMIZERS[name]
    with jax.enable_x64(True):
        params = networks.wide(networks.params())
        losses, last, _ = networks.path(optimizer, params, STEPS)
        on_sphere = renormalize(INVARIANT, optimizer)
        others, other, state = networks.path(on_sphere, params, STEPS)
        assert_close(others, losses, rtol=1e-9)
        assert_trees_close(other["head"], last["head"], rtol=1e-8, atol=1e-10)
        for layer in ("first", "second"):
            norm = jnp.linalg.norm(last[layer]["kernel"])
            assert_close(jnp.linalg.norm(other[layer]["kernel"]), 1.0, rtol=1e-14)
            assert_close(state.radius[layer]["kernel"].squeeze(), norm, rtol=1e-10)
            assert_close(other[layer]["kernel"] * norm, last[layer]["kernel"], atol=1e-8)


@pytest.mark.slow
def test_each_channel_on_a_sphere_of_its_own():
    mask = INVARIANT | {"second": {"kernel": False}}
    optimizer = OPTIMIZERS["sgd with decay"]
    with jax.enable_x64(True):
        params = networks.wide(networks.params())
        losses, last, _ = networks.path(optimizer, params, 30)
        others, other, state = networks.path(
            renormalize(mask, optimizer, feature_axes=-1), params, 30
        )
        assert_close(others, losses, rtol=1e-10)
        assert_close(jnp.linalg.norm(other["first"]["kernel"], axis=0), np.ones(7), rtol=1e-14)
        assert_close(
            state.radius["first"]["kernel"][0],
            jnp.linalg.norm(last["first"]["kernel"], axis=0),
            rtol=1e-10,
        )


@pytest.mark.slow
def test_a_step_on_the_sphere_is_one_at_the_effective_learning_rate():
    """SGD from w turns as SGD from w / ||w|| at the rate lr / ||w||^2 (van Laarhoven, 2017)."""
    lr = 0.3
    with jax.enable_x64(True):
        params, data = start(), tuple(map(jnp.asarray, networks.batch()))
        rate = effective_learning_rate(params, lr)["w"]
        unit = params["w"] / jnp.linalg.norm(params["w"])
        at_w, at_unit = (
            jax.grad(spherical_loss)({"w": w}, *data)["w"] for w in (params["w"], unit)
        )
        moved, expected = params["w"] - lr * at_w, unit - rate * at_unit
        assert_close(
            moved / jnp.linalg.norm(moved),
            expected / jnp.linalg.norm(expected),
            rtol=1e-13,
            atol=1e-15,
        )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_effective_learning_rate_keeps_the_function(optimizer):
    """A network c times as large has the same path at c^2 lr (SGD) or c lr (Adam)."""
    make = {"sgd": optax.sgd, "adam": lambda lr: optax.adam(lr, eps=0.0)}[optimizer]
    with jax.enable_x64(True):
        params = start()
        large = jax.tree.map(lambda w: 8 * w, params)
        lr = 0.05
        ratio = (
            effective_learning_rate(params, lr, optimizer=optimizer)["w"]
            / (effective_learning_rate(large, lr, optimizer=optimizer)["w"])
        )
        losses, *_ = networks.path(make(lr), params, STEPS, loss=spherical_loss)
        others, *_ = networks.path(make(lr * float(ratio)), large, STEPS, loss=spherical_loss)
        assert_close(others, losses, rtol=1e-9)


def rotations(optimizer, steps, size=4096):
    """Angles of a random walk with noise for gradients, orthogonal to w and scaled by 1 / ||w||."""
    w = jax.random.normal(jax.random.key(0), (size,))

    def step(carry, key):
        w, state = carry
        noise = jax.random.normal(key, w.shape)
        gradient = (noise - w * (noise @ w) / (w @ w)) / jnp.linalg.norm(w)
        updates, state = optimizer.update({"w": gradient}, state, {"w": w})
        new = w + updates["w"]
        cosine = new @ w / (jnp.linalg.norm(new) * jnp.linalg.norm(w))
        return (new, state), jnp.arccos(jnp.clip(cosine, -1, 1))

    return jax.lax.scan(
        step, (w, optimizer.init({"w": w})), jax.random.split(jax.random.key(1), steps)
    )[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "momentum"),
    [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.9)],
    ids=["sgd", "momentum", "adamw"],
)
def test_weight_decay_leads_to_the_equilibrium(name, momentum):
    """Kosson et al. (2024), Table 1; the formulas are of first order in lr wd, here 1e-3."""
    lr, wd = (0.1, 0.01) if name == "sgd" else (0.01, 0.1)
    optimizer = (
        decayed(optax.sgd(lr, momentum=momentum), wd)
        if name == "sgd"
        else optax.adamw(lr, b1=momentum, weight_decay=wd)
    )
    angles = jax.jit(lambda: rotations(optimizer, 6000), compiler_options=AS_FOR_USERS)()
    expected = rotational_equilibrium(lr, wd, momentum=momentum, optimizer=name)
    assert_close(jnp.sqrt(jnp.mean(angles[-1000:] ** 2)), expected, rtol=0.03)
    assert abs(angles[:100].mean() / expected - 1) > 0.2, "there is something to wait for"


@pytest.mark.slow
def test_a_given_rotation_holds_from_the_first_step():
    optimizer = renormalize({"w": True}, optax.sgd(123.0), rotation=0.05)
    angles = jax.jit(lambda: rotations(optimizer, 200))()
    spread = 1 / np.sqrt(2 * 4096)  # of the length of a random step, relative
    assert_close(angles, np.full(200, np.arctan(0.05)), rtol=5 * spread)
    assert_close(
        jnp.sqrt(jnp.mean(angles**2)), np.arctan(0.05), rtol=5 * spread / np.sqrt(200) + 1e-3
    )


@pytest.mark.slow
def test_a_rotation_is_the_rotational_variant_of_the_paper():
    """Algorithm 1 of Kosson et al. in NumPy, with norms of 1."""
    rng, beta, angle = np.random.default_rng(0), 0.9, 0.1
    w = rng.standard_normal((6, 4))
    gradients = rng.standard_normal((20, 6, 4)) * np.linspace(1, 5, 20)[:, None, None]
    theta, nu, m = w / np.linalg.norm(w), 0.0, np.zeros_like(w)
    with jax.enable_x64(True):
        optimizer = renormalize(
            {"w": True}, optax.sgd(0.3, momentum=0.5), rotation=lambda count: angle / (1 + count)
        )
        params = {"w": jnp.asarray(w)}
        state = optimizer.init(params)
        for k, gradient in enumerate(gradients, 1):
            m = 0.5 * m + gradient
            t = m - (m * theta).sum() * theta
            nu = beta * nu + (1 - beta) * (t**2).sum()
            theta = theta - angle / k * t / np.sqrt(nu / (1 - beta**k))
            theta /= np.linalg.norm(theta)
            # of norm 1 from the second step on
            own = {"w": jnp.asarray(gradient) / jnp.linalg.norm(params["w"])}
            updates, state = jax.jit(optimizer.update)(own, state, params)
            params = optax.apply_updates(params, updates)
            assert_close(params["w"], theta, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_bfloat16_kernels_stay_on_the_sphere_as_well_as_they_can():
    params = {"w": jax.random.normal(jax.random.key(0), (256, 16), jnp.bfloat16)}
    optimizer = renormalize({"w": True}, optax.adamw(1e-2), feature_axes=-1)
    state = optimizer.init(params)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state)
    for seed in range(5):
        gradients = {"w": jax.random.normal(jax.random.key(seed), (256, 16), jnp.bfloat16)}
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"].dtype == updates["w"].dtype == jnp.bfloat16
    assert state.radius["w"].dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state) == kinds
    assert_close(jnp.linalg.norm(params["w"].astype(jnp.float32), axis=0), np.ones(16), rtol=2**-8)


@pytest.mark.slow
def test_zeros_wait_for_a_direction():
    params = {"w": jnp.zeros((3, 2))}
    for settings in ({}, {"rotation": 0.1}):
        optimizer = renormalize({"w": True}, optax.sgd(0.5), feature_axes=-1, **settings)
        state = optimizer.init(params)
        updates, state = optimizer.update(params, state, params)
        assert not updates["w"].any()
        gradient = {"w": jnp.array([[3.0, 0.0], [0.0, 0.0], [4.0, 0.0]])}
        updates, state = optimizer.update(gradient, state, params)
        assert_close(updates["w"], np.array([[-0.6, 0.0], [0.0, 0.0], [-0.8, 0.0]]), rtol=1e-6)


@pytest.mark.slow
def test_bad_input_is_refused():
    with pytest.raises(
        TypeError, match=r"inner of type dict. The order is renormalize\(mask, inner\)"
    ):
        renormalize(optax.sgd(0.1), {"w": True})
    params = {"a": {"w": jnp.ones((3, 2))}}
    with pytest.raises(
        ValueError, match=r"renormalize: mask does not fit.*params\['a'\]\['w'\] of shape \(3, 2\)"
    ):
        renormalize({"b": True}, optax.sgd(0.1)).init(params)
    with pytest.raises(
        ValueError, match=r"renormalize at params\['a'\]\['w'\]: axis 2 .*out of range"
    ):
        renormalize(True, optax.sgd(0.1), feature_axes=2).init(params)
    optimizer = renormalize(True, optax.sgd(0.1))
    with pytest.raises(ValueError, match="renormalize: params are missing"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="rotational_equilibrium: optimizer is unknown.*'lion'"):
        rotational_equilibrium(0.1, 0.1, optimizer="lion")
