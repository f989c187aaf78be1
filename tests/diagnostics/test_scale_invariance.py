"""The numbers behind `scale_invariant`, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from normjax.diagnostics import scale_invariance
from tests.compare import assert_close
from tests.optim import networks

X = networks.batch()[0].astype(np.float32)


@pytest.fixture(scope="module")
def found():
    return scale_invariance(
        networks.params(), lambda params: networks.outputs(params, X, epsilon=1e-5)
    )


@pytest.mark.slow
def test_the_verdict_is_that_of_the_mask(found):
    mask = nj.optim.scale_invariant(
        networks.params(), lambda params: networks.outputs(params, X, epsilon=1e-5)
    )
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert {path: numbers.invariant for path, numbers in found.items()} == by_path


@pytest.mark.slow
def test_numbers_tell_kernels_before_normalization_from_others_by_orders_of_magnitude(found):
    for path, numbers in found.items():
        ratios = [numbers.change, numbers.cosine / numbers.chance]
        if path in ("first/kernel", "second/kernel"):
            assert max(ratios) < 1e-3, path
        elif numbers.influence > 0:
            assert max(ratios) > 0.2, path


@pytest.mark.slow
def test_a_linear_function_turns_by_its_kernel_as_by_chance():
    """f(w) = w: scaling by c changes it as much as a random change, by |c - 1| norm(w)."""
    found = scale_invariance({"w": jnp.arange(1.0, 10.0)}, lambda params: params["w"])["w"]
    assert_close(found.change, 1.0, rtol=1e-12)
    assert_close(found.chance, 1 / 3, rtol=1e-12)
    assert not found.invariant and found.influence == 1


def test_the_gradient_of_a_norm_is_parallel_and_of_a_direction_orthogonal():
    w = {"w": jnp.arange(1.0, 10.0)}
    length = scale_invariance(w, lambda params: jnp.linalg.norm(params["w"]))["w"]
    assert_close(length.cosine, 1.0, rtol=1e-12)
    direction = scale_invariance(w, lambda params: params["w"][0] / jnp.linalg.norm(params["w"]))[
        "w"
    ]
    assert direction.invariant and direction.cosine < 1e-12 and direction.change < 1e-12


@pytest.mark.slow
def test_epsilon_shows_in_the_change():
    """rms_norm of one feature vector: f(c w) - f(w) follows from 1 / sqrt(1 + eps / var)."""

    def outputs(params, epsilon):
        return nj.rms_norm(
            {}, {}, jnp.eye(4, dtype=params["w"].dtype) @ params["w"], train=True, epsilon=epsilon
        )[0]

    w = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)}
    changes = [scale_invariance(w, lambda p, e=e: outputs(p, e))["w"].change for e in (1e-6, 1e-4)]
    assert 50 < changes[1] / changes[0] < 150
    assert changes[0] < 1e-5


@pytest.mark.slow
def test_what_has_no_influence_and_what_has_no_length():
    params = {
        "w": jnp.ones((5, 3)),
        "unused": jnp.ones((2, 2)),
        "count": jnp.arange(3),
        "single": jnp.ones(1),
    }
    found = scale_invariance(params, lambda p: X @ p["w"] * p["single"])
    assert sorted(found) == ["unused", "w"]
    unused = found["unused"]
    assert not unused.invariant and unused.influence == unused.change == unused.cosine == 0


@pytest.mark.slow
@pytest.mark.parametrize("features", [(), -1])
def test_nnx_modules(features):
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = (
                nnx.Linear(5, 8, use_bias=False, rngs=rngs),
                nj.nnx.LayerNorm(8, rngs=rngs),
            )

        def __call__(self, x):
            return self.norm(self.linear(x))

    module = Module(nnx.Rngs(0))
    found = scale_invariance(module, lambda module: module(X), feature_axes=features)
    assert found["linear/kernel"].invariant == (features == ())


def test_bad_input_is_refused_in_its_own_name():
    with pytest.raises(
        TypeError,
        match=r"scale_invariance: function cannot be called.*scale_invariance\(params, func",
    ):
        scale_invariance({"w": jnp.ones(3)}, 3)
    with pytest.raises(ValueError, match=r"scale_invariance: params is not finite.*params\['w'\]"):
        scale_invariance({"w": jnp.array([1.0, jnp.inf])}, lambda p: p["w"])
    with pytest.raises(
        ValueError, match=r"scale_invariance: tolerance is out of range.*got tolerance=2.0"
    ):
        scale_invariance({"w": jnp.ones(3)}, lambda p: p["w"], tolerance=2.0)
