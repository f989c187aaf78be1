"""Eigenvalues of Hessians against closed forms and dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import normjax as nj
from normjax.diagnostics import hessian_eigenvalue
from tests.compare import assert_close

SPECTRA = {
    "positive": [0.5, 1, 2, 3, 7, 9],
    "negative": [-9, -5, -4, -3, -2, -0.25],
    "both": [-8, -1, 0, 2, 3, 5],
    "repeated": [4, 4, 4, 1, 1, -2],
    "one value": [3, 3, 3, 3, 3, 3],
    "zero": [0, 0, 0, 0, 0, 0],
    "flat but for one": [0, 0, 0, 0, 0, 6],
}


def matrix(eigenvalues, rng):
    """A symmetric matrix with these eigenvalues, in a random basis."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    return (basis * np.asarray(eigenvalues, float)) @ basis.T


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def solve(hessian, dtype=jnp.float64, **settings):
    """Returns the eigenvalue of a quadratic loss with this Hessian; parameters are two leaves."""
    size = len(hessian)
    params = {"a": jnp.ones((size // 2, 1, 1), dtype), "b": jnp.ones(size - size // 2, dtype)}

    def loss(params):
        w = flat(params)
        return 0.5 * jnp.vdot(w, jnp.asarray(hessian, dtype) @ w, precision="highest") + w.sum()

    return hessian_eigenvalue(loss, params, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_known_spectra(which, rng):
    """Also with fewer parameters, or distinct eigenvalues, than iterations; under vmap."""
    matrices = np.stack([matrix(eigenvalues, rng) for eigenvalues in SPECTRA.values()])
    with jax.enable_x64(True):
        found = jax.vmap(lambda hessian: solve(hessian, which=which, tolerance=1e-10))(
            jnp.asarray(matrices)
        )
        vectors = np.asarray(jax.vmap(flat)(found.vector))
    expected = np.asarray(
        [(max if which == "largest" else min)(eigenvalues) for eigenvalues in SPECTRA.values()]
    )
    assert_close(found.value, expected, atol=1e-9, dtype=np.float64)
    assert_close(np.linalg.norm(vectors, axis=1), np.ones(len(SPECTRA)), atol=1e-12)
    assert_close(np.einsum("nij,nj->ni", matrices, vectors), expected[:, None] * vectors, atol=1e-8)
    distinct = [len(set(eigenvalues)) for eigenvalues in SPECTRA.values()]
    assert found.converged.all() and found.iterations.tolist() == distinct


@pytest.mark.slow
def test_one_parameter_and_no_tolerance():
    with jax.enable_x64(True):
        found = solve(np.asarray([[-2.5]]), tolerance=0.0)
    assert (float(found.value), int(found.iterations), bool(found.converged)) == (-2.5, 1, True)


@pytest.mark.slow
def test_the_residual_bounds_the_error_before_it_has_converged(rng):
    eigenvalues = np.linspace(0, 1, 200) ** 2
    hessian = matrix(eigenvalues, rng)
    values = []
    with jax.enable_x64(True):
        for iterations in (3, 12):
            found = solve(hessian, iterations=iterations)
            vector = np.asarray(flat(found.vector))
            values.append(float(found.value))
            assert_close(
                found.residual, np.linalg.norm(hessian @ vector - values[-1] * vector), atol=1e-12
            )
            assert np.abs(eigenvalues - values[-1]).min() <= float(found.residual)
            assert int(found.iterations) == iterations and not bool(found.converged)
    assert values[0] < values[1] < 1.0


@pytest.mark.slow
def test_orthogonalization_keeps_rounding_from_making_copies(rng):
    """Without it, float32 loses orthogonality: the largest eigenvalues are found repeatedly."""
    hessian = matrix(np.concatenate([[1000.0, 500.0], np.linspace(-1, 1, 98)]), rng)
    found = solve(hessian, jnp.float32, which="smallest", iterations=100, tolerance=1e-6)
    assert_close(found.value, -1.0, atol=2e-3)


def network(kind, dtype):
    """A loss of a small network with a normalization, and its parameters."""
    rng = np.random.default_rng(3)
    x, labels = (
        jnp.asarray(rng.normal(size=(16, 5)), dtype),
        jnp.asarray(rng.integers(3, size=(16, 1))),
    )
    norm, stats = getattr(nj, f"{kind}_init")(4)
    params = {"in": rng.normal(size=(5, 4)), "norm": norm, "out": rng.normal(size=(4, 3))}

    def loss(params):
        h, _ = getattr(nj, kind)(params["norm"], stats, x @ params["in"], train=True)
        return -jnp.take_along_axis(
            jax.nn.log_softmax(jnp.tanh(h) @ params["out"]), labels, 1
        ).mean()

    return loss, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def dense(loss, params):
    vector, unravel = ravel_pytree(params)
    return np.linalg.eigvalsh(jax.jit(jax.hessian(lambda w: loss(unravel(w))))(vector))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_networks_against_the_dense_hessian(kind):
    with jax.enable_x64(True):
        loss, params = network(kind, jnp.float64)
        eigenvalues = dense(loss, params)
        found = hessian_eigenvalue(loss, params, tolerance=1e-9)
    assert eigenvalues[0] < -1e-3 and eigenvalues[-1] > 0.1
    assert_close(found.value, eigenvalues[-1], rtol=1e-7)


@pytest.mark.slow
def test_single_precision_under_jit_from_any_start():
    loss, params = network("batch_norm", jnp.float32)
    find = jax.jit(lambda key: hessian_eigenvalue(loss, params, key=key))
    expected = dense(loss, params)[-1]
    found = [find(jax.random.key(seed)) for seed in range(3)]
    for one in found:
        assert_close(one.value, expected, rtol=1e-4, dtype=np.float32)
        assert bool(one.converged) and float(one.residual) <= 1e-3 * expected * 1.01
    assert len({float(one.residual) for one in found}) == 3


@pytest.mark.slow
def test_half_precision_is_read_in_single():
    """In bfloat16, 1 + 1e-3 is 1."""
    curvature = jnp.asarray([1.0, 1.001])

    def loss(params):
        return 0.5 * jnp.sum(curvature * params["w"] ** 2)

    found = hessian_eigenvalue(loss, {"w": jnp.ones(2, jnp.bfloat16)}, tolerance=1e-6)
    assert_close(found.value, 1.001, atol=1e-6, dtype=np.float32)


@pytest.mark.slow
def test_an_nnx_module():
    model, x = (
        nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
        np.asarray([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]], np.float32),
    )
    found = hessian_eigenvalue(lambda model: 0.5 * jnp.sum(model(jnp.asarray(x)) ** 2), model)
    assert jax.tree.structure(found.vector) == jax.tree.structure(nnx.state(model, nnx.Param))
    inputs = np.concatenate([x, np.ones((3, 1))], 1)
    assert_close(found.value, np.linalg.eigvalsh(inputs.T @ inputs)[-1], rtol=1e-5)


def good(params):
    return jnp.sum(params["w"] ** 2)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((good, {"w": jnp.ones(2)}), {"iterations": 0}, "iterations=0"),
        ((good, {"w": jnp.ones(2)}), {"iterations": 2.5}, "iterations=2.5"),
        ((good, {"w": jnp.ones(2)}), {"tolerance": -1.0}, "tolerance=-1.0"),
        (
            (good, {"w": jnp.ones(2)}),
            {"which": "middle"},
            "'largest' or 'smallest'; got which='middle'",
        ),
        (({"w": jnp.ones(2)}, good), {}, "loss of type dict"),
        ((good, {"w": jnp.arange(2)}), {}, "dtype int32 for params['w']"),
        ((good, {"w": jnp.ones(2, jnp.complex64)}), {}, "dtype complex64 for params['w']"),
        ((good, {"w": jnp.array([1.0, jnp.nan])}), {}, "1 NaN or infinite of 2 in params['w']"),
        ((good, {}), {}, "params is empty"),
        ((lambda params: params["w"], {"w": jnp.ones(2)}), {}, "float32[2]"),
        (
            (lambda params: (good(params), {}), {"w": jnp.ones(2)}),
            {},
            "lambda params: loss(params)[0]",
        ),
    ],
)
def test_refusals(arguments, settings, message):
    with pytest.raises((ValueError, TypeError)) as error:
        hessian_eigenvalue(*arguments, **settings)
    assert message in str(error.value) and str(error.value).startswith("hessian_eigenvalue: ")
