"""What `recalibrate` refuses: one error, with the values and a way out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from tests.statistics.populations import init, make, network

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


def refused(error, *parts):
    return pytest.raises(error, match="^recalibrate: .*" + ".*".join(map(re.escape, parts)))


def one_layer(variables, x):
    return nj.batch_norm(*variables, x, train=True)


@pytest.mark.slow
def test_no_batches(rng):
    with refused(ValueError, "there are no batches", "an empty iterable"):
        nj.recalibrate(network, init(rng), [])
    used = iter(make(rng))
    nj.recalibrate(network, init(rng), used)
    with refused(ValueError, "there are no batches", "one that was used before is empty"):
        nj.recalibrate(network, init(rng), used)


def test_what_is_no_iterable_of_batches(rng):
    x = make(rng)[0]
    for batches in (x, jnp.asarray(x)):
        with refused(
            TypeError, "batches is not an iterable of batches", type(batches).__name__, "[batch]"
        ):
            nj.recalibrate(network, init(rng), batches)
    with refused(TypeError, "got int"):
        nj.recalibrate(network, init(rng), 3)


def test_a_generator_cannot_be_gone_through_layer_by_layer(rng):
    with refused(TypeError, "several times", "got a generator", "list(batches)"):
        nj.recalibrate(network, init(rng), (x for x in make(rng)), layer_by_layer=True)


def test_an_unknown_estimate(rng):
    with refused(ValueError, "estimate is unknown", "'merged' or 'averaged'", "estimate='mean'"):
        nj.recalibrate(network, init(rng), make(rng), estimate="mean")


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"params": {}}, "['params']"),
        ({"params": {}, "batch_stats": {}}, "['batch_stats', 'params']"),
        (nj.layer_norm_init(3), "tuple"),
        (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), "Linear"),
    ],
)
def test_a_model_without_batch_statistics(variables, named):
    with refused(
        ValueError,
        "there are no batch statistics",
        f"variables with {'a dict with ' * ('[' in named)}{named}",
    ):
        nj.recalibrate(one_layer, variables, [np.ones((4, 3))])


def test_the_state_of_a_module_without_the_module():
    graphdef, state = nnx.split(nnx.Sequential(nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0))))
    for variables in (state, (graphdef, state)):
        with refused(
            TypeError, "an nnx.State", type(variables).__name__, "nnx.merge(graphdef, state)"
        ):
            nj.recalibrate(one_layer, variables, [np.ones((4, 3))])


@pytest.mark.parametrize("leaf, other", [("mean", "var"), ("var", "mean")])
def test_a_layer_whose_statistics_are_not_complete(leaf, other):
    batch_stats = {"norm": {leaf: jnp.ones(3)}}
    with refused(
        ValueError, "not complete", f"batch_stats['norm']['{leaf}'] and no '{other}' beside it"
    ):
        nj.recalibrate(one_layer, ({}, batch_stats), [np.ones((4, 3))])


@pytest.mark.parametrize("leaf", ["mean", "var"])
def test_running_statistics_that_are_not_finite(rng, leaf):
    variables = init(rng)
    variables["batch_stats"][1][leaf] = variables["batch_stats"][1][leaf].at[2].set(jnp.nan)
    with refused(
        ValueError,
        "to start from are not finite",
        f"infinity in batch_stats[1]['{leaf}']",
        "variance 1",
    ):
        nj.recalibrate(network, variables, make(rng))
    norm = nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    getattr(norm, leaf)[...] = jnp.full(3, jnp.inf)
    model = nnx.Sequential(norm)
    with refused(ValueError, f"infinity in model['layers'][0]['{leaf}']"):
        nj.recalibrate(lambda model, x: model(x), model, make(rng))


@pytest.mark.parametrize("bad", [0, 2, 3])
@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_a_batch_that_is_not_finite_is_named(rng, bad, layer_by_layer):
    batches = make(rng)
    batches[bad][1, 2] = np.inf
    variables = init(rng)
    with refused(
        ValueError,
        f"batch {bad} are not finite",
        "batch_stats[0]['mean'], in 3 of 3 layer(s)",
        f"batch {bad} (",
    ):
        nj.recalibrate(network, variables, batches, layer_by_layer=layer_by_layer)


def test_a_parameter_that_is_not_finite_is_found_at_the_layer_behind_it(rng):
    variables = init(rng)
    variables["params"][1]["norm"]["scale"] *= jnp.nan
    with refused(
        ValueError,
        "batch 0 are not finite",
        "batch_stats[2]['mean'], in 1 of 3 layer(s)",
        "parameters",
    ):
        nj.recalibrate(network, variables, make(rng))


@pytest.mark.slow
def test_layers_that_do_not_update(rng):
    with refused(
        ValueError, "no layer collected anything", "3 layer(s)", "batch_stats[0]", "train=True"
    ):
        nj.recalibrate(
            lambda variables, x: network(variables, x, train=False), init(rng), make(rng)
        )
    model = nnx.Sequential(nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    model.eval()
    with refused(
        ValueError,
        "no layer collected anything",
        "1 layer(s)",
        "model['layers'][0]",
        "model.train()",
    ):
        nj.recalibrate(lambda model, x: model(x), model, make(rng))


@pytest.mark.slow
def test_a_mask_that_hides_everything(rng):
    def apply_fn(variables, x):
        return nj.batch_norm(*variables, x, train=True, mask=jnp.zeros(x.shape, bool))

    with refused(ValueError, "no layer collected anything", "no mask that hides it all"):
        nj.recalibrate(apply_fn, nj.batch_norm_init(3), make(rng))


@pytest.mark.slow
def test_layers_of_flax(rng):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nj.linen.BatchNorm(use_running_average=False, name="ours")(x)
            return nn.BatchNorm(use_running_average=False, name="theirs")(x)

    variables = Mixed().init(jax.random.key(0), np.ones((4, 3), np.float32))
    with refused(
        ValueError, "updated its running statistics", "batch_stats['theirs']", "nj.linen.BatchNorm"
    ):
        nj.recalibrate(
            lambda v, x: Mixed().apply(v, x, mutable=["batch_stats"]), variables, make(rng)
        )
    model = nnx.Sequential(
        nj.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    )
    with refused(
        ValueError, "updated its running statistics", "model['layers'][1]", "nj.nnx.BatchNorm"
    ):
        nj.recalibrate(lambda model, x: model(x), model, make(rng))
    assert (model.layers[1].mean[...] == 0).all()


def test_statistics_that_lose_a_leaf_on_the_way(rng):
    def apply_fn(variables, x):
        params, own = variables
        y, new = nj.batch_norm(params, {"mean": own["mean"], "var": own["var"]}, x, True)
        return y, own | new

    with refused(ValueError, "updated its running statistics", "'population' leaf"):
        nj.recalibrate(apply_fn, nj.batch_norm_init(3), make(rng))


@pytest.mark.parametrize(
    "returned, named", [(lambda y, own: y, "(8, 5) float32"), (lambda y, own: (y, own, 1), "tuple")]
)
def test_what_is_no_pair(rng, returned, named):
    with refused(TypeError, "did not return a pair", "mutable=['batch_stats']", named):
        nj.recalibrate(lambda variables, x: returned(*network(variables, x)), init(rng), make(rng))


@pytest.mark.slow
def test_statistics_that_are_not_returned(rng):
    def apply_fn(variables, x):
        y, batch_stats = network(variables, x)
        return y, batch_stats[:2]

    with refused(
        ValueError,
        "did not return the statistics of a layer",
        "batch_stats[2]['mean']",
        "got batch_stats[0]",
    ):
        nj.recalibrate(apply_fn, init(rng), make(rng))
    with refused(
        ValueError, "did not return the statistics of a layer", "batch_stats[0]", "got no layer"
    ):
        nj.recalibrate(lambda variables, x: (network(variables, x), {}), init(rng), make(rng))


def test_statistics_of_another_layer(rng):
    variables = init(rng)
    variables["batch_stats"][1] = nj.batch_norm_init(4)[1]
    with pytest.raises(
        ValueError, match=r"batch_norm: batch_stats\['mean'\] does not fit .*\(5,\).*\(4,\)"
    ):
        nj.recalibrate(network, variables, make(rng))


@pytest.mark.slow
def test_statistics_that_do_not_settle(rng):
    """A layer whose input is its own output, with a gain: there is no statistic that stays."""

    def apply_fn(variables, x):
        params, own = variables
        y, own = nj.batch_norm(params, own, x, True)
        _, own = nj.batch_norm(params, own, 100 * y + 1, True)
        return y, own

    with refused(
        ValueError,
        "do not converge",
        "after",
        "3 passes for 1 layer(s)",
        "batch_stats",
        "%",
        "layer_by_layer=False",
    ):
        nj.recalibrate(apply_fn, nj.batch_norm_init(3), make(rng), layer_by_layer=True)
