"""`recalibrate` through networks, whose layers see what those before them make of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.compare import assert_close, assert_identical, assert_trees_close
from tests.statistics.populations import ROUNDED, in_float64, init, make, merged, network


@pytest.mark.slow
def test_all_at_once_each_layer_sees_what_training_shows_it(rng):
    variables, batches = init(rng), make(rng)
    found = nj.recalibrate(network, variables, batches)
    assert found["params"] is variables["params"]
    assert_trees_close(found["batch_stats"], in_float64(variables, batches, "batch"), **ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_layer_by_layer_each_layer_sees_what_inference_shows_it(rng, train):
    variables, batches = init(rng), make(rng)
    apply_fn = functools.partial(network, train=train)
    found = nj.recalibrate(apply_fn, variables, batches, layer_by_layer=True)
    assert_trees_close(
        found["batch_stats"], in_float64(variables, batches, "population"), **ROUNDED
    )


@pytest.mark.slow
def test_layer_by_layer_over_small_batches_is_training_on_one_that_holds_them_all(rng):
    variables, batches = init(rng), make(rng)
    found = nj.recalibrate(network, variables, batches, layer_by_layer=True)
    everything = jnp.asarray(np.concatenate(batches))
    expected, batch_stats = network(variables, everything, momentum=0.0)
    assert_trees_close(found["batch_stats"], batch_stats, **ROUNDED)
    assert_close(network(found, everything, train=False)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layer_by_layer_batches_of_one_example_are_enough(rng):
    variables, batches = init(rng), make(rng, sizes=(1,) * 12)
    found = nj.recalibrate(network, variables, batches, layer_by_layer=True)
    assert_trees_close(
        found["batch_stats"], in_float64(variables, batches, "population"), **ROUNDED
    )


@pytest.mark.slow
def test_layer_by_layer_takes_a_pass_more_than_there_are_layers(rng):
    class Batches:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(kept)

    kept, batches = make(rng), Batches()
    found = nj.recalibrate(network, init(rng), batches, layer_by_layer=True)
    assert batches.passes == 4
    nj.recalibrate(network, found, batches, layer_by_layer=True)
    assert batches.passes == 5, "one that is recalibrated stays so"


@pytest.mark.slow
def test_stale_statistics_of_averaged_weights_are_mended(rng):
    """Weights that moved under their statistics, as averaging moves them."""
    variables, batches = init(rng), make(rng, sizes=(64,) * 4)
    trained = nj.recalibrate(network, variables, batches)
    moved = trained | {"params": jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, trained["params"])}
    x = jnp.asarray(np.concatenate(batches))
    expected, _ = network(moved, x, train=True)
    mended = nj.recalibrate(network, moved, batches, layer_by_layer=True)

    def error(variables):
        return float(jnp.abs(network(variables, x, train=False)[0] - expected).max())

    assert error(moved) > 0.5 and error(mended) < 1e-3


@pytest.mark.slow
def test_everything_is_one_compiled_step_that_later_calls_find_again(rng):
    traced = []

    def apply_fn(variables, x):
        traced.append(x.shape)
        return network(variables, x)

    variables, batches = init(rng), make(rng, sizes=(8,) * 20)
    found = nj.recalibrate(apply_fn, variables, batches)
    again = nj.recalibrate(apply_fn, found, iter(batches))
    assert_identical(again, found)  # what was there before leaves no trace
    assert traced == [(8, 3)]
    nj.recalibrate(apply_fn, variables, batches[:2], layer_by_layer=True)
    assert len(traced) == 2


def test_memory_does_not_grow_with_the_number_of_batches(rng):
    alive = []

    def batches():
        for x in make(rng, sizes=(8,) * 30):
            alive.append(len(jax.live_arrays()))
            yield jnp.asarray(x)

    nj.recalibrate(network, init(rng), batches())
    assert max(alive[5:]) <= alive[5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [lambda variables: (variables["params"], variables["batch_stats"]), dict]
)
def test_variables_may_be_a_pair_or_a_dict(rng, wrap):
    variables, batches = init(rng), make(rng)
    given = wrap(variables)

    def apply_fn(given, x):
        params, batch_stats = (
            given if isinstance(given, tuple) else (given["params"], given["batch_stats"])
        )
        return network({"params": params, "batch_stats": batch_stats}, x)

    found = nj.recalibrate(apply_fn, given, batches)
    assert type(found) is type(given)
    assert_identical(found, wrap(nj.recalibrate(network, variables, batches)))


@pytest.mark.slow
def test_variables_may_be_batch_stats_alone(rng):
    variables, batches = init(rng), make(rng)
    found = nj.recalibrate(
        lambda own, x: network(variables | {"batch_stats": own}, x),
        variables["batch_stats"],
        batches,
    )
    assert_identical(found, nj.recalibrate(network, variables, batches)["batch_stats"])


@pytest.mark.slow
def test_a_layer_that_is_called_twice_sees_both_inputs(rng):
    batches = make(rng)

    def twice(variables, x):
        params, batch_stats = variables
        y, batch_stats = nj.batch_norm(params, batch_stats, x, True)
        z, batch_stats = nj.batch_norm(params, batch_stats, 3 * x[:4] - 1, True)
        return (y, z), batch_stats

    _, batch_stats = nj.recalibrate(twice, nj.batch_norm_init(3), batches)
    assert_trees_close(
        batch_stats, merged([*batches, *(3 * x[:4] - 1 for x in batches)]), rtol=1e-5
    )


@pytest.mark.slow
def test_layers_stacked_for_scan(rng):
    """Statistics of each time step, as in recurrent cells."""
    steps, batches = 3, make(rng)
    params, batch_stats = nj.batch_norm_init(3)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), batch_stats)

    @jax.jit
    def apply_fn(variables, x):
        def cell(h, own):
            h, own = nj.batch_norm(variables[0], own, h + x, True)
            return jax.nn.relu(h), own

        return jax.lax.scan(jax.checkpoint(cell), jnp.zeros_like(x), variables[1])

    for layer_by_layer in (False, True):
        _, found = nj.recalibrate(
            apply_fn, (params, stacked), batches, layer_by_layer=layer_by_layer
        )
        hs, means = [np.zeros_like(x, np.float64) for x in batches], []
        for _ in range(steps):
            inputs = [h + x for h, x in zip(hs, batches, strict=True)]
            seen = merged(inputs)
            means.append(seen["mean"])
            by = [seen if layer_by_layer else merged([x]) for x in inputs]
            hs = [
                np.maximum((x - s["mean"]) / np.sqrt(s["var"] + 1e-5), 0)
                for x, s in zip(inputs, by, strict=True)
            ]
        assert_close(found["mean"], np.stack(means), **ROUNDED)


@pytest.mark.slow
def test_layers_that_infer_keep_their_statistics(rng):
    batches = make(rng)

    def apply_fn(variables, x):
        params, own = variables
        x, first = nj.batch_norm(params, own["frozen"], x, False)
        x, second = nj.batch_norm(params, own["trained"], x, True)
        return x, {"frozen": first, "trained": second}

    params, start = nj.batch_norm_init(3)
    _, found = nj.recalibrate(apply_fn, (params, {"frozen": start, "trained": start}), batches)
    assert_identical(found["frozen"], start)
    assert_close(found["trained"]["mean"], merged(batches)["mean"], rtol=1e-4)


@pytest.mark.slow
def test_other_state_beside_the_statistics_stays_as_it_was(rng):
    kernel = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    _, state = nj.weights.spectral_norm_init(kernel, key=jax.random.key(0))
    params, start = nj.batch_norm_init(3)

    def apply_fn(own, x):
        w, spectral = nj.weights.spectral_norm({}, own["spectral"], kernel, True)
        x, norm = nj.batch_norm(params, own["norm"], x @ w, True)
        return x, {"spectral": spectral, "norm": norm}

    found = nj.recalibrate(apply_fn, {"spectral": state, "norm": start}, make(rng))
    assert_identical(found["spectral"], state)
    assert (found["norm"]["mean"] != 0).all()
