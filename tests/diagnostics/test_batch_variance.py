"""How much of an output is whom it met: against variances known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import jaxtyped

import normjax as nj
from tests.compare import assert_close

EXAMPLES, POOL, BATCH, FEATURES, DRAWS = 12, 40, 5, 50, 40
batch_variance = jaxtyped(nj.diagnostics.batch_variance, typechecker=beartype)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(EXAMPLES, FEATURES)), jnp.float32)


@pytest.fixture
def pool(rng):
    return jnp.asarray(rng.normal(size=(POOL, FEATURES)), jnp.float32)


def measure(function, x, pool, **settings):
    return batch_variance(
        function, x, pool, **{"key": jax.random.key(1), "batch_size": BATCH} | settings
    )


@pytest.mark.slow
def test_the_mean_of_a_batch_varies_as_sampling_without_repetition_does(x, pool):
    found = measure(lambda x: x + x.mean(0), x, pool, draws=DRAWS)
    others = BATCH - 1
    drawn = others * np.var(pool, axis=0, ddof=1) * (1 - others / POOL) / BATCH**2
    noise = drawn.mean()
    # Each of EXAMPLES * FEATURES variances is known to sqrt(2 / (DRAWS - 1)).
    relative = np.sqrt(2 / (DRAWS - 1) / (EXAMPLES * FEATURES))
    assert_close(found.noise.mean(), noise, rtol=4 * relative)
    signal = (1 + 1 / BATCH) ** 2 * np.var(x, axis=0, ddof=1).mean()
    # Two sums over examples of what is known to noise / DRAWS: the cross term, and the noise's own.
    error = np.sqrt((4 * signal + 2 * noise / DRAWS) * noise / DRAWS / (EXAMPLES - 1) / FEATURES)
    assert error < 0.02 * signal
    assert_close(found.signal, signal, atol=4 * error)
    assert_close(found.ratio, found.noise.mean() / found.signal, rtol=1e-6)


@pytest.mark.slow
def test_the_signal_is_without_the_noise_that_is_left_in_means(pool):
    """Examples that are all alike have none, whatever their batches do."""
    alike = jnp.tile(pool[:1], (EXAMPLES, 1))
    found = measure(lambda x: x + x.mean(0), alike, pool, draws=4)
    uncorrected = found.noise.mean() / 4
    assert abs(found.signal) < 0.3 * uncorrected


@pytest.mark.slow
@pytest.mark.parametrize("n", [16, 64])
def test_batch_norm_falls_with_the_batch(rng, n):
    x, pool = (jnp.asarray(rng.normal(size=(size, 20)), jnp.float32) for size in (20, 2000))
    found = measure(
        lambda x: nj.batch_norm({}, nj.batch_norm_init(20)[1], x, True)[0], x, pool, batch_size=n
    )
    assert_close(found.ratio, 1.5 / n, rtol=0.25)
    of_ghosts = measure(
        lambda x: nj.batch_norm({}, nj.batch_norm_init(20)[1], x, True, virtual_batch_size=n // 4)[
            0
        ],
        x,
        pool,
        batch_size=n,
    )
    assert of_ghosts.ratio > 3 * found.ratio


def test_layer_norm_has_none(x, pool):
    found = measure(lambda x: nj.layer_norm({}, {}, x, True)[0], x, pool)
    assert not found.noise.any() and found.ratio == 0
    assert_close(
        found.signal, np.var(nj.layer_norm({}, {}, x, True)[0], axis=0, ddof=1).mean(), rtol=1e-5
    )


@pytest.mark.slow
def test_images_bfloat16_and_float64(rng):
    images = rng.normal(size=(POOL, 3, 3, 2))
    with jax.enable_x64(True):
        for dtype, own in ((jnp.bfloat16, jnp.float32), (jnp.float64, jnp.float64)):
            x = jnp.asarray(images, dtype)
            found = measure(
                lambda x: nj.batch_norm({}, nj.batch_norm_init(2)[1], x, True)[0], x[:4], x[4:]
            )
            assert found.noise.shape == (4,) and found.noise.dtype == found.ratio.dtype == own
            assert (found.noise > 0).all() and 0 < found.ratio < 1


@pytest.mark.slow
def test_nnx(x, pool, promotion_as_in_flax):
    module = nj.nnx.BatchNorm(FEATURES, use_running_average=False, rngs=nnx.Rngs(0))
    found = measure(module, x, pool)
    same = measure(
        lambda x: nj.batch_norm({}, nj.batch_norm_init(FEATURES)[1], x, True)[0], x, pool
    )
    assert_close(found.noise, same.noise, rtol=1e-4)
    assert not module.mean.get_value().any()


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"batch_size": 1}, "batch_size=1"),
        ({"draws": 1}, "draws=1"),
        ({"batch_size": POOL + 2}, f"{POOL + 1} or more examples of shape (50,)"),
        ({"function": lambda x: x.mean(0)}, "got shape (50,)"),
        ({"function": lambda x: (x, {})}, "lambda x: apply(variables, x)[0]"),
        ({"function": lambda x: x * jnp.nan}, "NaN or infinite"),
        ({"x": jnp.ones((1, FEATURES))}, "x.shape=(1, 50)"),
        ({"pool": jnp.ones((POOL, 3))}, "pool.shape=(40, 3)"),
        ({"pool": jnp.ones((POOL, FEATURES), jnp.bfloat16)}, "pool.dtype=bfloat16"),
    ],
)
def test_mistakes(x, pool, settings, values):
    arguments = {
        "function": lambda x: x,
        "x": x,
        "pool": pool,
        "key": jax.random.key(0),
        "batch_size": BATCH,
    }
    with pytest.raises(ValueError, match="^batch_variance: ") as caught:
        nj.diagnostics.batch_variance(**arguments | settings)
    assert values in str(caught.value)
