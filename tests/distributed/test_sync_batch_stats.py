"""Running statistics of devices that trained apart, merged into those of all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from jax import lax
from jax.sharding import PartitionSpec

import normjax as nj
from tests.compare import assert_close, assert_same_kind, assert_trees_close
from tests.distributed.mapped import DEVICES, collectives, mesh
from tests.xla import AS_FOR_USERS

WHOLE, SPLIT = PartitionSpec(), PartitionSpec("data")


def over_devices(function, check_vma=True, out_specs=WHOLE):
    """Maps a function of one device's tree over trees that are stacked along their first axis."""
    run = lambda tree: function(jax.tree.map(lambda leaf: leaf[0], tree))  # noqa: E731
    return jax.jit(
        jax.shard_map(
            run, mesh=mesh(data=DEVICES), in_specs=SPLIT, out_specs=out_specs, check_vma=check_vma
        )
    )


def model(rng):
    """The statistics of two layers, on 8 devices."""
    layer = lambda: {  # noqa: E731
        "mean": jnp.asarray(rng.normal(0, 3, (DEVICES, 4)), jnp.float32),
        "var": jnp.asarray(rng.gamma(2.0, size=(DEVICES, 4)), jnp.float32),
    }
    return {"first": layer() | {"count": jnp.full(DEVICES, 100)}, "block": {"second": layer()}}


def expected(layer):
    mean, var = np.float64(layer["mean"]), np.float64(layer["var"])
    return {"mean": mean.mean(0), "var": var.mean(0) + mean.var(0)}


@pytest.mark.parametrize("check_vma", [True, False])
def test_equals_the_union_and_comes_back_replicated(rng, check_vma):
    tree = model(rng)
    merged = over_devices(partial(nj.sync_batch_stats, axis_name="data"), check_vma)(tree)
    assert merged["first"].pop("count") == 100
    for actual, layer in (
        (merged["first"], tree["first"]),
        (merged["block"]["second"], tree["block"]["second"]),
    ):
        assert_trees_close(actual, expected(layer), rtol=1e-6)


@pytest.mark.slow
def test_devices_that_saw_one_batch_each_know_the_whole_batch(rng):
    """With momentum 0 running statistics are the batch's, and merge to those of all examples."""
    x = jnp.asarray(
        rng.normal(3, 2, (4 * DEVICES, 5)) + np.arange(4 * DEVICES)[:, None], jnp.float32
    )
    params, batch_stats = nj.batch_norm_init(5)

    def device(x):
        _, own = nj.batch_norm(params, batch_stats, x, True, momentum=0.0)
        return nj.sync_batch_stats(own, "data")

    merged = over_devices(device)(x.reshape(DEVICES, 4, 5))
    whole = nj.moments(x, 0)
    assert_trees_close(merged, {"mean": whole.mean, "var": whole.var}, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], None])
def test_after_a_step_in_groups_they_are_those_of_a_step_on_the_whole_batch(
    rng, groups, momentum, check_vma
):
    params, batch_stats = nj.batch_norm_init(5)
    batch_stats = jax.tree.map(lambda leaf: leaf + 0.5, batch_stats)
    x = jnp.asarray(
        rng.normal(3, 2, (4 * DEVICES, 5)) + np.arange(4 * DEVICES)[:, None], jnp.float32
    )
    axis = {"axis_name": "data", "axis_index_groups": groups} if groups else {}

    def device(x):
        _, own = nj.batch_norm(params, batch_stats, x, True, momentum=momentum, **axis)
        return nj.sync_batch_stats(own, "data", momentum=momentum)

    merged = over_devices(device, check_vma)(x.reshape(DEVICES, 4, 5))
    _, whole = nj.batch_norm(params, batch_stats, x, True, momentum=momentum)
    assert_trees_close(merged, whole, rtol=1e-5)


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5])
def test_a_momentum_that_takes_no_step(momentum):
    batch_stats = nj.batch_norm_init(2)[1]
    with pytest.raises(ValueError, match=f"momentum={momentum}"):
        jax.vmap(
            lambda _: nj.sync_batch_stats(batch_stats, "data", momentum=momentum), axis_name="data"
        )(jnp.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("transform", [jax.pmap, jax.vmap])
def test_under_pmap_and_vmap(rng, transform):
    tree = model(rng)
    merged = transform(partial(nj.sync_batch_stats, axis_name="data"), axis_name="data")(tree)
    assert_same_kind(jax.tree.map(jnp.asarray, merged), tree)
    for device in (0, DEVICES - 1):
        row = {leaf: merged["first"][leaf][device] for leaf in ("mean", "var")}
        assert_trees_close(row, expected(tree["first"]), rtol=1e-6)


def test_layers_without_statistics_have_nothing_to_merge():
    tree: dict = {"group_norm": {}, "layer_norm": {}}
    assert (
        jax.vmap(partial(nj.sync_batch_stats, axis_name="data"), axis_name="data", axis_size=2)(
            tree
        )
        == tree
    )


@pytest.mark.slow
def test_groups_merge_among_themselves(rng):
    tree = model(rng)["block"]["second"]
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    run = partial(nj.sync_batch_stats, axis_name="data", axis_index_groups=groups)
    merged = over_devices(
        lambda own: jax.tree.map(lambda leaf: leaf[None], run(own)), out_specs=SPLIT
    )(tree)
    for device in (0, 1):
        members = {leaf: value[np.array(groups[device])] for leaf, value in tree.items()}
        assert_trees_close(
            {leaf: value[device] for leaf, value in merged.items()}, expected(members), rtol=1e-6
        )


def test_two_axes_merge_as_one(rng):
    tree = model(rng)["block"]["second"]
    run = jax.shard_map(
        lambda own: nj.sync_batch_stats(jax.tree.map(lambda leaf: leaf[0], own), ("host", "chip")),
        mesh=mesh(host=2, chip=4),
        in_specs=PartitionSpec(("host", "chip")),
        out_specs=WHOLE,
    )
    assert_trees_close(jax.jit(run)(tree), expected(tree), rtol=1e-6)


@pytest.mark.slow
def test_a_model_of_any_depth_takes_two_collectives(rng):
    compiled = (
        over_devices(partial(nj.sync_batch_stats, axis_name="data"))
        .lower(model(rng))
        .compile(AS_FOR_USERS)
    )
    assert [kind for kind, _ in collectives(compiled)] == ["all-reduce", "all-reduce"]


def test_means_far_from_zero_lose_nothing(rng):
    tree = model(rng)["block"]["second"]
    far = tree | {"mean": 1e4 + tree["mean"]}
    merged = over_devices(partial(nj.sync_batch_stats, axis_name="data"))(far)
    # The devices' means are rounded to 1e4 in the first place.
    assert_close(merged["var"], expected(far)["var"], rtol=1e-5, atol=np.spacing(np.float32(1e4)))


@pytest.mark.slow
def test_flax_collections_and_complex_means_keep_their_kind():
    tree = freeze(
        {
            "norm": {
                "mean": jnp.ones((DEVICES, 2), jnp.complex64) * 1j,
                "var": jnp.ones((DEVICES, 2)),
            }
        }
    )
    merged = jax.vmap(partial(nj.sync_batch_stats, axis_name="data"), axis_name="data")(tree)
    assert isinstance(merged, FrozenDict)
    assert_same_kind(merged, tree)
    assert_trees_close(merged, tree, rtol=1e-6)


def test_an_nnx_state_is_merged_as_a_dict_is(rng):
    stats = model(rng)["block"]["second"]
    state = nnx.State({leaf: nnx.BatchStat(value) for leaf, value in stats.items()})
    sync = over_devices(lambda own: nj.sync_batch_stats(own, "data"))
    assert_trees_close(nnx.to_pure_dict(sync(state)), sync(stats))


def test_an_axis_that_is_not_there():
    with pytest.raises(
        NameError, match="sync_batch_stats: axis name 'dta' is not bound here.*'data'"
    ):
        over_devices(partial(nj.sync_batch_stats, axis_name="dta"))(
            {"mean": jnp.ones((8, 1)), "var": jnp.ones((8, 1))}
        )


def test_a_variance_without_its_mean():
    with pytest.raises(ValueError, match=r"variance without a mean.*\['norm'\]\['var'\]"):
        over_devices(partial(nj.sync_batch_stats, axis_name="data"))(
            {"norm": {"var": jnp.ones((8, 1))}}
        )


@pytest.mark.slow
def test_it_is_not_the_mean_of_the_variances(rng):
    tree = model(rng)["block"]["second"]
    merged = over_devices(partial(nj.sync_batch_stats, axis_name="data"))(tree)
    naive = over_devices(lambda own: lax.pmean(own, "data"))(tree)
    assert (merged["var"] > naive["var"] + 1).all()
