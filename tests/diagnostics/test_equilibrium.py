"""Kernels settle where theory says: in closed form, and on random walks up to chance."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normjax as nj
from normjax.diagnostics import Rotation, equilibrium, rotation
from tests.compare import assert_close
from tests.xla import AS_FOR_USERS

RATE, DECAY = 0.1, 0.02


def circle(steps, w):
    """SGD with a gradient of length 1 / norm(w), a quarter turn ahead of w: no randomness."""

    def step(w, _):
        g = jnp.array([-w[1], w[0]]) / jnp.sum(w**2)
        new = w - RATE * (g + DECAY * w)
        return new, rotation(w, g, new, learning_rate=RATE)

    with jax.enable_x64(True):
        return jax.lax.scan(step, jnp.asarray(w, jnp.float64), length=steps)[1]


def late(history, start):
    return jax.tree.map(lambda field: field[start:], history)


@pytest.mark.slow
def test_a_gradient_of_one_length_reaches_the_closed_form():
    """Norms are at rest where cos(angle) = 1 - lr wd, and norm^4 = lr^2 / (1 - (1 - lr wd)^2)."""
    (found,) = equilibrium(
        late(circle(5000, [1.0, 0.0]), 4000), learning_rate=RATE, weight_decay=DECAY
    ).values()
    product = RATE * DECAY
    assert_close(found.angle.observed, np.arccos(1 - product), rtol=1e-6)
    assert_close(found.norm.observed, (RATE**2 / (1 - (1 - product) ** 2)) ** 0.25, rtol=1e-6)
    assert_close(found.angle.predicted, np.sqrt(2 * product), rtol=1e-12)
    assert_close(found.norm.predicted, (RATE / (2 * DECAY)) ** 0.25, rtol=1e-10)
    assert_close(found.angle.ratio, 1.0, atol=product)
    assert_close(found.norm.ratio, 1.0, atol=product)


@pytest.mark.parametrize("start", [0.3, 4.0])
def test_the_way_to_equilibrium_has_the_time_constant(start):
    history = circle(2001, [start, 0.0])
    (found,) = equilibrium(history, learning_rate=RATE, weight_decay=DECAY).values()
    powers = np.asarray(history[""].norm) ** 4
    distance = np.abs(powers - RATE / (2 * DECAY))[[100, 300]]
    assert_close(200 / np.log(distance[0] / distance[1]), found.time_constant, rtol=0.02)


OPTIMIZERS = {
    "sgd": (optax.chain(optax.add_decayed_weights(0.02), optax.sgd(0.1)), 0.1, 0.02, 0.0),
    "momentum": (
        optax.chain(optax.add_decayed_weights(0.002), optax.sgd(0.1, momentum=0.9)),
        0.1,
        0.002,
        0.9,
    ),
    "adam": (optax.adamw(0.01, weight_decay=0.2), 0.01, 0.2, 0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_random_gradients_lead_to_the_predicted_rotation(name):
    """64 kernels on random walks: their mean is off by 4 standard errors and the second order."""
    optimizer, rate, decay, momentum = OPTIMIZERS[name]
    kind = "adam" if name == "adam" else "sgd"

    def step(carry, key):
        w, state = carry
        noise = jax.random.normal(key, w.shape)
        g = jax.grad(lambda w: jnp.sum(noise * w / jnp.linalg.norm(w, axis=0)))(w)
        updates, state = optimizer.update(g, state, w)
        new = optax.apply_updates(w, updates)
        return (new, state), rotation(
            w, g, new, learning_rate=rate, feature_axes=-1, optimizer=kind
        )

    def walk(w):
        keys = jax.random.split(jax.random.key(0), 4000)
        return jax.lax.scan(step, (w, optimizer.init(w)), keys)[1]

    # Adam's mean of squares forgets another norm slowly
    w = jax.random.normal(jax.random.key(1), (50, 64)) / 7
    with jax.numpy_dtype_promotion("standard"):  # optax's
        history = jax.jit(walk, compiler_options=AS_FOR_USERS)(w)
    settings = {
        "learning_rate": rate,
        "weight_decay": decay,
        "momentum": momentum,
        "optimizer": kind,
    }
    (found,) = equilibrium(late(history, 2500), **settings).values()
    assert found.time_constant < 500
    expected = nj.optim.rotational_equilibrium(rate, decay, momentum=momentum, optimizer=kind)
    assert_close(found.angle.predicted, np.full(64, expected), rtol=1e-12)
    for compared in (found.angle, found.norm):
        error = compared.ratio.std(ddof=1) / np.sqrt(64)
        assert error < 0.01
        assert abs(compared.ratio.mean() - 1) < 4 * error + rate * decay / (1 - momentum)


def test_other_angles_are_other_ratios():
    """By hand: twice the angle, half the norm."""
    angle, norm = 2 * np.sqrt(2 * RATE * DECAY), 0.5 * (RATE / (2 * DECAY)) ** 0.25
    fields = {"norm": norm, "gradient_norm": 1 / norm, "angle": angle, "cosine": 0.0, "chance": 0.1}
    history = {"w": Rotation(**{name: jnp.full(3, value) for name, value in fields.items()},
                             effective_learning_rate=jnp.ones(3))}  # fmt: skip
    found = equilibrium(history, learning_rate=RATE, weight_decay=DECAY)["w"]
    assert_close(found.angle.ratio, 2.0, rtol=1e-6)
    assert_close(found.norm.ratio, 0.5, rtol=1e-6)
    adam = equilibrium(history, learning_rate=RATE, weight_decay=DECAY, optimizer="adam")["w"]
    assert_close(adam.norm.predicted, np.sqrt(RATE * 100 / (2 * DECAY)), rtol=1e-6)


@pytest.mark.slow
def test_bad_input_is_refused():
    w = {"w": jnp.ones(3)}
    once = rotation(w, w, w, learning_rate=0.1)
    with pytest.raises(
        ValueError, match=r"equilibrium: history has no steps.*got norm of shape \(\) for 'w'"
    ):
        equilibrium(once, learning_rate=0.1, weight_decay=0.1)
    with pytest.raises(
        TypeError, match=r"equilibrium: history is a single kernel's.*got a Rotation"
    ):
        equilibrium(once["w"], learning_rate=0.1, weight_decay=0.1)
    with pytest.raises(
        ValueError, match=r"equilibrium: weight_decay is out of range.*got weight_decay=0.0"
    ):
        equilibrium(once, learning_rate=0.1, weight_decay=0.0)
    with pytest.raises(
        ValueError, match=r"equilibrium: momentum is out of range.*got momentum=1.0"
    ):
        equilibrium(once, learning_rate=0.1, weight_decay=0.1, momentum=1.0)
