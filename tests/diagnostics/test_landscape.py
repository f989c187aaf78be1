"""Losses and gradients along a line, where they are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normjax as nj
from normjax.diagnostics import Landscape, landscape
from tests.compare import assert_close

CURVATURE = np.asarray([1.0, 2.0, 10.0])
SIZES = (0.05, 0.1, 0.3)


def loss(params):
    w = jnp.concatenate([params["a"], params["b"]["c"].ravel()])
    return 0.5 * jnp.sum(jnp.asarray(CURVATURE, w.dtype) * w**2)


def params_at(w, dtype=jnp.float32):
    return {"a": jnp.asarray(w[:1], dtype), "b": {"c": jnp.asarray(w[1:], dtype)[:, None]}}


def expected(w, direction):
    """The fields of a quadratic's landscape."""
    points = np.asarray(w) + np.asarray(SIZES)[:, None] * direction
    losses = 0.5 * (CURVATURE * points**2).sum(1)
    gradients = np.linalg.norm(CURVATURE * (points - w), axis=1)
    return (
        0.5 * (CURVATURE * np.asarray(w) ** 2).sum(),
        losses,
        gradients,
        np.linalg.norm(points - w, axis=1),
    )


@pytest.mark.slow
def test_a_quadratic_along_its_gradient():
    w = np.asarray([1.0, -2.0, 0.5])
    seen = landscape(loss, params_at(w), step_sizes=SIZES)
    for field, value in zip(seen, expected(w, -CURVATURE * w), strict=True):
        assert_close(field, value, rtol=1e-5, dtype=np.float32)


@pytest.mark.slow
def test_a_quadratic_along_the_update_of_an_optimizer():
    w = np.asarray([1.0, -2.0, 0.5])
    params = params_at(w)
    optimizer = optax.scale_by_sign()
    direction, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params))
    direction = jax.tree.map(jnp.negative, direction)
    seen = landscape(loss, params, step_sizes=jnp.asarray(SIZES), direction=direction)
    for field, value in zip(seen, expected(w, -np.sign(w)), strict=True):
        assert_close(field, value, rtol=1e-5)


@pytest.mark.slow
def test_double_precision_is_kept():
    w = np.asarray([1.0, -2.0, 0.5])
    with jax.enable_x64(True):
        seen = landscape(loss, params_at(w, jnp.float64), step_sizes=SIZES)
        for field, value in zip(seen, expected(w, -CURVATURE * w), strict=True):
            assert_close(field, value, rtol=1e-13, dtype=np.float64)


@pytest.mark.slow
def test_what_is_read_from_the_fields():
    """Two steps at once: the ranges and the smoothness of each."""
    seen = Landscape(
        loss=jnp.asarray([3.0, 1.0]),
        losses=jnp.asarray([[2.0, 2.5], [4.0, 2.0]]),
        gradient_distances=jnp.asarray([[1.0, 3.0], [0.5, 0.25]]),
        distances=jnp.asarray([[0.5, 1.0], [0.1, 1.0]]),
    )
    assert [bound.tolist() for bound in seen.loss_range] == [[2.0, 1.0], [3.0, 4.0]]
    assert seen.variation.tolist() == [1.0, 3.0]
    assert [bound.tolist() for bound in seen.gradient_range] == [[1.0, 0.25], [3.0, 0.5]]
    assert_close(seen.smoothness, np.asarray([3.0, 5.0]), rtol=1e-6)


@pytest.mark.slow
def test_the_smoothness_is_that_of_the_sharpest_direction():
    """Along an eigenvector, beta is its eigenvalue; nowhere more than the largest."""
    for i in range(3):
        w = np.eye(3)[i]
        assert_close(
            landscape(loss, params_at(w), step_sizes=SIZES).smoothness, CURVATURE[i], rtol=1e-4
        )
    anywhere = landscape(loss, params_at(np.ones(3)), step_sizes=SIZES).smoothness
    sharpest = nj.diagnostics.hessian_eigenvalue(loss, params_at(np.ones(3))).value
    assert 1.0 < float(anywhere) < float(sharpest)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_lengths_neither_overflow_nor_vanish(size):
    """Squares of diverging or nearly converged values leave the range of float32."""
    seen = landscape(lambda w: size * jnp.sum(w**2) / 2, jnp.ones(4), step_sizes=(1 / size,))
    assert_close(seen.gradient_distances, np.asarray([2 * size]), rtol=1e-5)
    assert_close(seen.smoothness, np.float32(size), rtol=1e-5)


@pytest.mark.slow
def test_a_stationary_point_is_flat():
    seen = landscape(loss, params_at(np.zeros(3)), step_sizes=SIZES)
    assert (float(seen.variation), float(seen.smoothness)) == (0.0, 0.0)


@pytest.mark.slow
def test_a_history_from_a_scan():
    """Recorded at each step of gradient descent, inside of it; step sizes may be traced."""

    def step(params, _):
        seen = landscape(loss, params, step_sizes=sizes)
        return jax.tree.map(lambda w, g: w - 0.05 * g, params, jax.grad(loss)(params)), seen

    sizes = jnp.asarray([0.05, 0.1])
    _, history = jax.jit(lambda params: jax.lax.scan(step, params, length=4))(params_at(np.ones(3)))
    assert history.losses.shape == (4, 2) and history.smoothness.shape == (4,)
    # the point that the step goes to
    assert_close(history.loss[1:], np.asarray(history.losses[:-1, 0]), rtol=1e-5)


@pytest.mark.slow
def test_half_precision_is_read_in_single():
    """In bfloat16 the smallest of these steps would not move the parameters."""
    seen = landscape(loss, params_at(np.ones(3), jnp.bfloat16), step_sizes=(1e-4,))
    assert_close(
        seen.distances, np.asarray([1e-4 * np.linalg.norm(CURVATURE)]), rtol=1e-3, dtype=np.float32
    )
    assert float(seen.variation) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_sizes": (0.1, 0.0)}, "step_sizes=[0.1"),
        ({"step_sizes": ()}, "step_sizes of shape (0,)"),
        ({"step_sizes": jnp.float32(0.1)}, "step_sizes of shape ()"),
        ({"step_sizes": (0.1, float("nan"))}, "step_sizes=nan"),
        (
            {"step_sizes": SIZES, "direction": {"a": jnp.ones(1)}},
            "params['b']['c'], which direction lacks",
        ),
        (
            {"step_sizes": SIZES, "direction": {"a": jnp.ones(1), "b": {"c": jnp.ones(2)}}},
            "shape (2,) for direction['b']['c']",
        ),
    ],
)
def test_refusals(settings, message):
    with pytest.raises((ValueError, TypeError)) as error:
        landscape(loss, params_at(np.ones(3)), **settings)
    assert message in str(error.value) and str(error.value).startswith("landscape: ")
