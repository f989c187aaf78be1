"""What statistics reveal in contrastive training, by networks that reveal all or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax import nnx
from jaxtyping import jaxtyped

import normjax as nj
from tests.compare import assert_close, assert_identical

BATCH, DEVICES, FEATURES = 64, 16, 8
N = BATCH // DEVICES
leakage = jaxtyped(nj.diagnostics.leakage, typechecker=beartype)


@pytest.fixture
def unrelated(rng):
    """Views that have nothing in common."""
    return tuple(jnp.asarray(rng.normal(size=(BATCH, FEATURES)), jnp.float32) for _ in range(2))


@pytest.fixture
def views(unrelated):
    query, noise = unrelated
    return query, query + 0.3 * noise


def measure(function, views, **settings):
    return leakage(function, *views, **{"devices": DEVICES, "key": jax.random.key(1)} | settings)


def normalized(axis_name=None):
    def function(queries, keys):
        x = jnp.concatenate([queries, keys])
        y, _ = nj.batch_norm({}, nj.batch_norm_init(FEATURES)[1], x, True, axis_name=axis_name)
        return tuple(jnp.split(y, 2))

    return function


def signature(queries, keys):
    """Tells the device and nothing else."""
    mean = jnp.concatenate([queries, keys]).mean(0)
    return jnp.broadcast_to(mean, queries.shape), jnp.broadcast_to(mean, keys.shape)


@pytest.mark.slow
def test_a_network_that_tells_the_device_alone(unrelated):
    """Of the n keys of a device, which all look alike, one is named: the first."""
    found = measure(signature, unrelated, shuffles=50)
    assert_close(found.together, 1 / N)
    assert found.same_device == 1
    assert_close(found.chance, (N - 1) / (BATCH - 1), rtol=1e-6)
    # A key is dealt to its query's device by 1 / DEVICES, and the first of n there by 1 / N.
    expected = 1 / BATCH
    assert_close(found.apart, expected, atol=4 * np.sqrt(expected / (50 * BATCH)))
    assert_close(found.leak, found.together - found.apart, atol=1e-6)


@pytest.mark.slow
def test_the_standard_error_is_that_of_a_mean_of_differences(unrelated):
    found = measure(signature, unrelated, shuffles=1)
    assert found.apart == 0 or found.apart > 0  # one shuffle finds a few or none
    hits, others = int(found.together * BATCH), int(found.apart * BATCH)
    # 1 where found together, -1 where found apart: at least as spread as without overlap.
    mean = (hits - others) / BATCH
    upper = np.sqrt(((hits + others) / BATCH - mean**2) * BATCH / (BATCH - 1) / BATCH)
    lower = np.sqrt((abs(hits - others) / BATCH - mean**2) * BATCH / (BATCH - 1) / BATCH)
    assert lower - 1e-6 <= found.standard_error <= upper + 1e-6


ALONE = {
    "no norm": lambda queries, keys: (queries, keys),
    "layer norm": lambda queries, keys: tuple(
        nj.layer_norm({}, {}, x, True)[0] for x in (queries, keys)
    ),
    "synced": normalized("devices"),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", ALONE.values(), ids=ALONE)
def test_nothing_leaks_without_statistics_of_a_device(views, function):
    found = measure(function, views)
    assert found.leak == 0 and found.standard_error == 0
    assert 0.5 < found.together < 1
    share = found.chance
    assert abs(found.same_device - share) < 4 * np.sqrt(share * (1 - share) / BATCH)


@pytest.mark.slow
def test_equal_views_are_always_found(unrelated):
    query, _ = unrelated
    assert measure(ALONE["no norm"], (query, query)).together == 1


@pytest.mark.slow
def test_two_encoders_that_normalize_apart_leak_in_small_batches(views):
    """As in MoCo: the queries of a device have nearly the statistics of their own keys."""

    def function(queries, keys):
        return tuple(
            nj.batch_norm({}, nj.batch_norm_init(FEATURES)[1], x, True)[0] for x in (queries, keys)
        )

    found = measure(function, views, shuffles=8)
    assert found.leak > 4 * found.standard_error


@pytest.mark.slow
def test_a_mean_that_is_removed_pushes_a_device_apart(rng):
    """The mean of 60 batches of 16, so that chance is well known; under transformations, too."""
    views = tuple(jnp.asarray(rng.normal(size=(60, 16, FEATURES)), jnp.float32) for _ in range(2))
    found = jax.jit(jax.vmap(lambda *views: measure(normalized(), views, devices=4)))(*views)
    assert found.same_device.mean() < 0.2 - 4 * np.sqrt(0.2 * 0.8 / 60 / 16)


@pytest.mark.slow
def test_the_name_of_the_axis_is_free(views):
    assert_identical(
        measure(normalized("pod"), views, axis_name="pod"), measure(normalized("devices"), views)
    )


@pytest.mark.slow
def test_bfloat16_and_lists(views):
    found = measure(
        lambda queries, keys: [queries, keys], tuple(x.astype(jnp.bfloat16) for x in views)
    )
    assert found.leak == 0 and found.together.dtype == jnp.float32


class Encoder(nnx.Module):
    def __init__(self):
        self.norm = nj.nnx.BatchNorm(FEATURES, use_running_average=False, rngs=nnx.Rngs(0))

    def __call__(self, queries, keys):
        return tuple(jnp.split(self.norm(jnp.concatenate([queries, keys])), 2))


@pytest.mark.slow
def test_nnx(views, promotion_as_in_flax):
    module = Encoder()
    found = measure(module, views)
    assert_close(found.leak, measure(normalized(), views).leak, atol=0.02)
    assert not module.norm.mean.get_value().any()


@pytest.mark.parametrize(
    ("settings", "kind", "values"),
    [
        ({"devices": 1}, ValueError, "devices=1"),
        (
            {"devices": 7},
            ValueError,
            "queries.shape=(64, 8), keys.shape=(64, 8) for devices=7. Pass 63 of each",
        ),
        ({"keys": jnp.ones((60, 8))}, ValueError, "keys.shape=(60, 8)"),
        ({"shuffles": 0}, ValueError, "shuffles=0"),
        ({"function": lambda queries, keys: queries}, TypeError, "got a ShapeDtypeStruct"),
        ({"function": lambda queries, keys: (queries, keys, {})}, TypeError, "got a tuple of 3"),
        ({"function": lambda queries, keys: (queries, keys[:1])}, ValueError, "got shape (1, 8)"),
        (
            {"function": lambda queries, keys: (queries, keys * jnp.nan)},
            ValueError,
            "2560 NaN or infinite of 2560 in k",
        ),
        ({"queries": jnp.ones((64, 8), int)}, TypeError, "queries.dtype=int32"),
    ],
)
def test_mistakes(views, settings, kind, values):
    arguments = {"function": ALONE["no norm"], "queries": views[0], "keys": views[1]}
    with pytest.raises(kind, match="^leakage: ") as caught:
        nj.diagnostics.leakage(
            **arguments | {"devices": DEVICES, "key": jax.random.key(0)} | settings
        )
    assert values in str(caught.value)
