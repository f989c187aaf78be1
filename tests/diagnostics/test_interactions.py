"""Who depends on whom in a batch: against Jacobians known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import linen, nnx
from jaxtyping import jaxtyped

import normjax as nj
from tests.compare import assert_close, assert_identical

BATCH, INPUTS = 6, 4
interactions = jaxtyped(nj.diagnostics.interactions, typechecker=beartype)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(BATCH, INPUTS)), jnp.float32)


def batch_normed(kernel, **settings):
    features = kernel.shape[-1]
    return lambda x: nj.batch_norm(
        {}, nj.batch_norm_init(features)[1], x @ kernel, True, **settings
    )[0]


def expected_of_batch_norm(x, kernel, epsilon=1e-5):
    """Returns squared norms of (I - 11'/n - xx'/n) / sigma times the kernel's columns."""
    h = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    n, sigma = len(h), np.sqrt(h.var(0) + epsilon)
    y = (h - h.mean(0)) / sigma
    jacobian = (np.eye(n)[..., None] - 1 / n - y[:, None] * y / n) / sigma
    return (jacobian**2 * (np.asarray(kernel, np.float64) ** 2).sum(0)).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("features", [2, 7], ids=["by outputs", "by inputs"])
def test_batch_norm_behind_a_linear_map(rng, features):
    with jax.enable_x64(True):
        x, kernel = (
            jnp.asarray(rng.normal(size=(BATCH, INPUTS))),
            jnp.asarray(rng.normal(size=(INPUTS, features))),
        )
        found = interactions(batch_normed(kernel), x)
    expected = expected_of_batch_norm(x, kernel)
    assert_close(found.matrix, expected, rtol=1e-10, dtype=np.float64)
    own = np.diag(expected)
    assert_close(found.off_diagonal, 1 - own.sum() / expected.sum(), rtol=1e-10)
    assert_close(found.per_example, 1 - own / expected.sum(1), rtol=1e-10)
    assert_close(found.standard_error, 0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [16, 64])
def test_one_batch_norm_mixes_about_two_nths(rng, n):
    x = jnp.asarray(rng.normal(size=(n, 8)), jnp.float32)
    share = interactions(batch_normed(jnp.eye(8)), x).off_diagonal
    assert_close(share, 2 / n, rtol=0.1)


ALONE = {
    "linear": lambda x: x @ jnp.ones((INPUTS, 3)),
    "layer norm": lambda x: nj.layer_norm({}, {}, x, True)[0],
    "group norm": lambda x: nj.group_norm({}, {}, x, True, num_groups=2)[0],
    "running statistics": lambda x: nj.batch_norm(*nj.batch_norm_init(INPUTS), x, False)[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("function", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("probes", [None, 4])
def test_examples_that_do_not_meet(x, function, probes):
    found = interactions(function, x, probes=probes, key=jax.random.key(0))
    assert found.off_diagonal == 0 and not found.per_example.any() and found.standard_error == 0
    assert_identical(found.matrix, jnp.diag(jnp.diag(found.matrix)))
    assert (jnp.diag(found.matrix) > 0).all()


@pytest.mark.slow
def test_a_linear_map_by_hand(x):
    kernel = jnp.asarray([[3.0], [0.0], [4.0], [0.0]])
    assert_close(interactions(lambda x: x @ kernel, x).matrix, 25 * np.eye(BATCH))
    rolled = interactions(lambda x: jnp.roll(x, 1, axis=0) @ kernel, x)
    assert_close(rolled.matrix, 25 * np.roll(np.eye(BATCH), -1, axis=1))
    assert rolled.off_diagonal == 1


@pytest.mark.slow
def test_ghost_batches_are_blocks(x):
    found = interactions(batch_normed(jnp.eye(INPUTS), virtual_batch_size=3), x)
    together = np.kron(np.eye(2), np.ones((3, 3))) > 0
    assert (np.asarray(found.matrix)[~together] == 0).all() and (
        np.asarray(found.matrix)[together] > 0
    ).all()


@pytest.mark.slow
def test_outputs_that_depend_on_nothing(x):
    found = interactions(lambda x: jnp.ones((len(x), 2)), x)
    assert_identical(found, jax.tree.map(jnp.zeros_like, found))


@pytest.mark.slow
def test_probes_estimate_without_bias_and_know_their_error(rng):
    x, kernel = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((BATCH, INPUTS), (INPUTS, 8))
    )
    exact = interactions(batch_normed(kernel), x)
    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.jit(jax.vmap(lambda key: interactions(batch_normed(kernel), x, probes=8, key=key)))(
        keys
    )
    errors = np.asarray(draws.off_diagonal - exact.off_diagonal)
    claimed = np.sqrt((np.asarray(draws.standard_error) ** 2).mean())
    assert_close(errors.std(), claimed, rtol=0.15)
    assert abs(errors.mean()) < 4 * claimed / np.sqrt(len(keys))
    mean, spread = np.asarray(draws.matrix).mean(0), np.asarray(draws.matrix).std(0)
    assert (np.abs(mean - exact.matrix) < 4 * spread / np.sqrt(len(keys)) + 1e-6).all()
    assert (spread <= 1.15 * np.sqrt(2 / 8) * exact.matrix).all()


@pytest.mark.slow
def test_probes_are_exact_for_one_output(x):
    found = interactions(batch_normed(jnp.ones((INPUTS, 1))), x, probes=2, key=jax.random.key(0))
    assert_close(
        found.matrix, expected_of_batch_norm(x, jnp.ones((INPUTS, 1))), rtol=1e-4, atol=1e-6
    )
    assert found.standard_error < 1e-6


@pytest.mark.slow
def test_images_and_bfloat16(rng):
    images = jnp.asarray(rng.normal(size=(4, 3, 3, 2)), jnp.bfloat16)
    found = interactions(lambda x: nj.batch_norm({}, nj.batch_norm_init(2)[1], x, True)[0], images)
    assert found.matrix.shape == (4, 4) and found.matrix.dtype == jnp.float32
    exact = interactions(
        lambda x: nj.batch_norm({}, nj.batch_norm_init(2)[1], x, True)[0],
        images.astype(jnp.float32),
    )
    assert_close(found.matrix, exact.matrix, rtol=0.05, atol=0.01)


@pytest.mark.slow
def test_under_jit(x):
    function = batch_normed(jnp.eye(INPUTS))
    assert_close(
        jax.jit(lambda x: interactions(function, x).matrix)(x),
        interactions(function, x).matrix,
        rtol=1e-5,
    )


@pytest.mark.slow
def test_linen_and_nnx_agree_and_keep_their_statistics(x, promotion_as_in_flax):
    model = linen.Sequential([linen.Dense(3), nj.linen.BatchNorm(use_running_average=False)])
    variables = model.init(jax.random.key(0), x)
    found = interactions(lambda x: model.apply(variables, x, mutable=["batch_stats"])[0], x)
    module = nnx.Sequential(
        nnx.Linear(INPUTS, 3, rngs=nnx.Rngs(0)), nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    )
    kernel = variables["params"]["layers_0"]["kernel"]
    module.layers[0].kernel.set_value(kernel)
    of_module = interactions(module, x)
    assert_close(of_module.matrix, found.matrix, rtol=1e-4, atol=1e-6)
    assert_close(found.matrix, expected_of_batch_norm(x, kernel), rtol=1e-4, atol=1e-5)
    assert not module.layers[1].mean.get_value().any()
    module.eval()
    assert interactions(module, x).off_diagonal == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "settings", "kind", "values"),
    [
        (lambda x: (x, {}), {}, ValueError, "('float32[6, 4]', {}). Return only outputs"),
        (lambda x: x.sum(0), {}, ValueError, "shape (6, ...); got shape (4,)"),
        (lambda x: x > 0, {}, ValueError, "got bool[6, 4]"),
        (lambda x: x / (x - x), {}, ValueError, "24 NaN or infinite of 24 in function(x)"),
        (lambda x: x, {"probes": 1}, ValueError, "got probes=1. Start with probes=16"),
        (lambda x: x, {"probes": 4}, ValueError, "key=None for probes=4"),
    ],
)
def test_mistakes(x, function, settings, kind, values):
    with pytest.raises(kind, match="^interactions: ") as caught:
        nj.diagnostics.interactions(function, x, **settings)
    assert values in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x", "kind", "values"),
    [
        (jnp.ones((3, 2), int), TypeError, "x.dtype=int32 for x.shape=(3, 2)"),
        (jnp.ones((3, 2), jnp.complex64), TypeError, "x.dtype=complex64 for x.shape=(3, 2)"),
        (jnp.ones((0, 2)), ValueError, "x.shape=(0, 2)"),
        (jnp.full((3, 2), jnp.nan), ValueError, "6 NaN or infinite of 6 in x"),
    ],
)
def test_inputs_that_cannot_be_differentiated(x, kind, values):
    with pytest.raises(kind, match="^interactions: ") as caught:
        nj.diagnostics.interactions(lambda x: x, x)
    assert values in str(caught.value)


@pytest.mark.slow
def test_plot(x, tmp_path):
    from matplotlib.figure import Figure

    found = interactions(batch_normed(jnp.eye(INPUTS)), x)
    figure = nj.diagnostics.plot.interactions(found)
    (image,) = figure.axes[0].images
    drawn = image.get_array()
    assert_close(drawn.filled(0), np.where(drawn.mask, 0, found.matrix), rtol=1e-6)
    assert (np.asarray(found.matrix)[drawn.mask] < found.matrix.max() / 1e4).all()
    assert figure.axes[0].get_title() == f"Off the diagonal: {found.off_diagonal:.1%}"
    figure.savefig(tmp_path / "interactions.png")
    own = Figure()
    left, right = own.subplots(1, 2)
    assert nj.diagnostics.plot.interactions(found, right) is own and not left.images


@pytest.mark.slow
def test_plot_of_nothing(x):
    found = interactions(lambda x: jnp.ones_like(x), x)
    assert nj.diagnostics.plot.interactions(found).axes[0].images[0].get_array().mask.all()
