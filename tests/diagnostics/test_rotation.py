"""Steps that are known: angles, norms, and how norms grow without decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.diagnostics import rotation
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.optim import networks


def plane(angle, length=1.0):
    return length * jnp.array([[np.cos(angle)], [np.sin(angle)]])


@pytest.mark.parametrize("angle", [1e-7, 1e-3, 0.5, np.pi / 2, 3.0, np.pi])
def test_angles_keep_their_digits_in_float32(angle):
    w, new = (
        jnp.asarray(plane(a, length), jnp.float32) for a, length in ((0.0, 2.0), (angle, 5.0))
    )
    found = rotation({"w": w}, {"w": new}, {"w": new}, learning_rate=0.5)["w"]
    assert_close(found.angle, angle, rtol=1e-5, dtype=jnp.float32)
    assert_close(found.cosine, np.cos(angle), atol=1e-6)
    assert_close(found.norm, 2.0, rtol=1e-6)
    assert_close(found.gradient_norm, 5.0, rtol=1e-6)
    assert_close(found.effective_learning_rate, 0.125, rtol=1e-6)
    assert_close(found.chance, 1 / np.sqrt(2), rtol=1e-6)


@pytest.mark.slow
def test_features_have_directions_of_their_own(rng):
    w, g, new = (rng.standard_normal((3, 3, 4, 5)) for _ in range(3))
    with jax.enable_x64(True):
        found = rotation(
            {"w": w}, {"w": g}, {"w": new}, learning_rate=0.1, feature_axes=-1, optimizer="adam"
        )["w"]
        columns = [array.reshape(-1, 5) for array in (w, g, new)]
        lengths = [np.linalg.norm(array, axis=0) for array in columns]
        assert_close(found.norm, lengths[0], rtol=1e-12, dtype=jnp.float64)
        assert_close(found.gradient_norm, lengths[1], rtol=1e-12)
        assert_close(
            found.cosine, (columns[0] * columns[1]).sum(0) / lengths[0] / lengths[1], rtol=1e-10
        )
        cosines = (columns[0] * columns[2]).sum(0) / lengths[0] / lengths[2]
        assert_close(found.angle, np.arccos(cosines), rtol=1e-10)
        assert_close(found.effective_learning_rate, 0.1 / lengths[0], rtol=1e-12)
        assert_close(found.chance, np.full(5, 1 / 6), rtol=1e-12)


@pytest.mark.slow
def test_norms_grow_by_the_gradient_where_it_is_orthogonal():
    """SGD without decay: ||w'||^2 = ||w||^2 + lr^2 ||g||^2, tan(angle) = lr ||g|| / ||w||."""
    rate = 0.3
    with jax.enable_x64(True):
        params = networks.wide(networks.params())
        optimizer = optax.sgd(rate)

        def step(params, data):
            gradients = jax.grad(networks.loss)(params, *data)
            updated = optax.apply_updates(
                params, optimizer.update(gradients, optimizer.init(params))[0]
            )
            return updated, rotation(
                params, gradients, updated, learning_rate=rate, mask=nj.optim.decay_mask
            )

        data = jax.tree.map(
            lambda *each: jnp.stack(each), *[networks.batch(seed) for seed in range(20)]
        )
        last, history = jax.lax.scan(step, params, data)
    assert sorted(history) == ["first/kernel", "head/kernel", "second/kernel"]
    for name in ("first", "second"):
        found = jax.tree.map(np.asarray, history[f"{name}/kernel"])
        grown = found.norm**2 + rate**2 * found.gradient_norm**2
        final = np.linalg.norm(last[name]["kernel"])
        assert_close(grown, np.append(found.norm[1:], final) ** 2, rtol=1e-10)
        assert_close(np.tan(found.angle), rate * found.gradient_norm / found.norm, rtol=1e-8)
        assert np.abs(found.cosine).max() < 1e-10
        assert (np.diff(found.effective_learning_rate) < 0).all()
    assert np.abs(history["head/kernel"].cosine).max() > 0.1


@pytest.mark.slow
def test_complex_kernels_turn_as_their_real_and_imaginary_parts_do():
    w = {"w": jnp.array([1.0 + 0j, 2.0j], jnp.complex64)}
    with jax.numpy_dtype_promotion("standard"):
        found = rotation(w, w, {"w": 1j * w["w"]}, learning_rate=1.0)["w"]
    assert_close(found.angle, np.pi / 2, rtol=1e-6, dtype=jnp.float32)
    assert_close(found.cosine, 1.0, rtol=1e-6)


@pytest.mark.slow
def test_zeros_have_no_direction():
    zeros, ones = {"b": jnp.zeros(3)}, {"b": jnp.ones(3)}
    for before, after in ((zeros, ones), (ones, zeros), (zeros, zeros)):
        found = rotation(before, zeros, after, learning_rate=0.1)["b"]
        assert found.angle == 0 and found.cosine == 0


@pytest.mark.slow
def test_half_precision_is_measured_in_float32(rng):
    w, g = ({"w": jnp.asarray(rng.standard_normal((64, 8)), jnp.bfloat16)} for _ in range(2))
    found = rotation(w, g, jax.tree.map(jnp.add, w, g), learning_rate=0.1)["w"]
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}
    assert_close(found.norm, np.linalg.norm(np.asarray(w["w"], np.float64)), rtol=1e-6)


@pytest.mark.slow
def test_only_what_the_mask_chooses_and_only_numbers():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "step": jnp.arange(2)}
    assert sorted(rotation(params, params, params, learning_rate=0.1)) == [
        "dense/bias",
        "dense/kernel",
    ]
    mask = {"dense": {"kernel": True, "bias": False}, "step": False}
    assert sorted(rotation(params, params, params, learning_rate=0.1, mask=mask)) == [
        "dense/kernel"
    ]


@pytest.mark.slow
def test_linen_and_nnx_go_by_the_same_paths():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="dense")(x)

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 3, rngs=rngs)

    params = jax.tree.map(
        lambda w: w + 1, Linen().init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    )
    module = NNX(nnx.Rngs(0))
    nnx.update(module, params)
    expected = rotation(params, params, params, learning_rate=0.1)
    assert_identical(rotation(module, nnx.state(module), module, learning_rate=0.1), expected)
    compiled = jax.jit(lambda p: rotation(p, p, p, learning_rate=0.1))(params)
    assert_trees_close(compiled, expected, rtol=1e-6)


def test_bad_input_is_refused():
    w = {"a": {"w": jnp.ones((2, 3))}}
    with pytest.raises(
        ValueError,
        match=r"rotation: gradients and params differ in shape.*\(2, 3\).*\(3,\) for grad",
    ):
        rotation(w, {"a": {"w": jnp.ones(3)}}, w, learning_rate=0.1)
    with pytest.raises(
        ValueError, match=r"rotation: updated and params do not have the same leaves"
    ):
        rotation(w, w, {}, learning_rate=0.1)
    with pytest.raises(
        ValueError,
        match=r"rotation at params\['a'\]\['w'\].*axis 2 of feature_axes is out of range",
    ):
        rotation(w, w, w, learning_rate=0.1, feature_axes=2)
    with pytest.raises(ValueError, match=r"rotation: optimizer is unknown.*got optimizer='lion'"):
        rotation(w, w, w, learning_rate=0.1, optimizer="lion")
