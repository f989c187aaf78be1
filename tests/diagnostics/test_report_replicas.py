"""Replicas that have come apart: on a leading axis, as pmap keeps them, and on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import jax_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import normjax as nj
from normjax.diagnostics import report
from tests.diagnostics.networks import FEATURES, Residual, data, init, updated

DEVICES = 8


def diverged(variables, **settings):
    return [
        finding
        for finding in report(variables, **settings).findings
        if finding.rule == "diverged-replicas"
    ]


def stacked(tree, copies=4):
    return jax.tree.map(lambda leaf: np.stack([leaf] * copies), tree)


@pytest.mark.slow
def test_statistics_that_devices_keep_apart_under_pmap():
    model = Residual()
    variables = jax_utils.replicate(init(model))
    assert diverged(variables) == []
    x = data(DEVICES * 16)[0].reshape(DEVICES, 16, FEATURES)
    _, updates = jax.pmap(updated(model))(variables, x)
    found = diverged({**variables, **updates})
    assert {finding.path for finding in found} == {
        *(f"BatchNorm_{i}" for i in range(2)),
        "stem_norm",
    }
    assert {finding.severity for finding in found} == {"warning"}
    assert "8 of 8 replicas" in found[0].message and "sync_batch_stats" in found[0].advice
    merged = jax.pmap(lambda stats: nj.sync_batch_stats(stats, "d"), axis_name="d")(
        updates["batch_stats"]
    )
    assert diverged({**variables, "batch_stats": merged}) == []


def test_copies_are_known_by_their_kernels_and_the_first_is_reported():
    variables = stacked(init(Residual()))
    assert diverged(variables) == []
    assert [layer.shape for layer in report(variables).layers] == [(24,)] * 3
    variables["params"]["BatchNorm_1"]["bias"][2, 7] += 1e-3
    (finding,) = diverged(variables)
    assert (finding.path, finding.severity) == ("BatchNorm_1", "error")
    assert "1 of 4 replicas (2)" in finding.message and "bias by up to 0.001" in finding.message
    assert "pmean" in finding.advice
    variables["batch_stats"]["stem_norm"]["mean"][1, 3] += 0.5
    assert "mean by up to 0.5 deviations" in diverged(variables)[1].message
    variables["batch_stats"]["stem_norm"]["mean"][1, 3] = np.nan
    assert "mean by up to inf deviations" in diverged(variables)[1].message


def test_rounding_is_no_divergence():
    variables = stacked(init(Residual()))
    variables["batch_stats"]["stem_norm"]["var"][1, 3] *= 1 + 2e-7
    assert diverged(variables) == []


def test_layers_of_a_scan_members_of_an_ensemble_and_conditional_scales_are_no_copies():
    members = [init(Residual(), seed) for seed in range(4)]
    rng = np.random.default_rng(0)
    ensemble = jax.tree.map(lambda *leaves: np.stack(leaves), *members)
    ensemble["batch_stats"] = jax.tree.map(
        lambda leaf: rng.uniform(1, 2, leaf.shape), ensemble["batch_stats"]
    )
    assert diverged(ensemble) == []
    assert report(ensemble).layers[0].shape == (4, 24)
    assert len(diverged(ensemble, replicated=True)) == 3
    conditional = (
        {"scale": rng.normal(size=(5, 3)), "bias": np.zeros((5, 3))},
        nj.batch_norm_init(3)[1],
    )
    assert diverged(conditional) == []
    scan = {"norms": {"scale": rng.uniform(1, 2, (4, 6)), "bias": np.zeros((4, 6))}}
    assert diverged(scan) == []
    # feature_axes=(1, -1)
    by_place = {"mean": rng.normal(size=(4, 6)), "var": rng.uniform(1, 2, (4, 6))}
    assert diverged(({"scale": rng.uniform(1, 2, (4, 6))}, by_place)) == []


def test_a_layer_alone():
    params, batch_stats = stacked(nj.batch_norm_init(6))
    batch_stats["mean"][3] = 1
    (finding,) = diverged((params, batch_stats))
    assert "1 of 4 replicas (3)" in finding.message
    assert diverged((params, batch_stats), replicated=False) == []
    with pytest.raises(ValueError, match="replicated.*one size of the first axis"):
        report(
            {"params": params, "batch_stats": {"mean": np.ones(6), "var": np.ones(6)}},
            replicated=True,
        )


def on_devices(copies, mesh, *axes):
    """An array that claims to be replicated along the other axes of the mesh, with these copies."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    shards = [
        jax.device_put(copies[i][index], device)
        for i, (device, index) in enumerate(
            sharding.addressable_devices_indices_map(copies[0].shape).items()
        )
    ]
    return jax.make_array_from_single_device_arrays(copies[0].shape, sharding, shards)


def test_arrays_that_claim_to_be_replicated_and_are_not():
    params, batch_stats = nj.batch_norm_init(6)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    copies = [np.arange(6, dtype=np.float32) for _ in range(DEVICES)]
    assert diverged((params, batch_stats | {"mean": on_devices(copies, mesh)})) == []
    copies[5] = copies[5] + np.array([0, 0, 0.25, 0, 0, 0], np.float32)
    (finding,) = diverged((params, batch_stats | {"mean": on_devices(copies, mesh)}))
    assert "1 of 8 replicas (5)" in finding.message and "mean by up to 0.25" in finding.message
    assert finding.severity == "warning"


def test_arrays_that_are_sharded_along_one_axis_of_the_mesh_and_replicated_along_the_other():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    copies = [np.arange(8, dtype=np.float32) for _ in range(DEVICES)]
    params, batch_stats = nj.batch_norm_init(8)
    array = on_devices(copies, mesh, "model")
    assert diverged((params | {"scale": array}, batch_stats)) == []
    copies[6] = copies[6] + 1  # the second replica's third quarter
    (finding,) = diverged((params | {"scale": on_devices(copies, mesh, "model")}, batch_stats))
    assert (
        "2 replicas" in finding.message
        and "scale" in finding.message
        and finding.severity == "error"
    )


@pytest.mark.slow
def test_the_gap_of_copies_is_the_first_one_s():
    model, x = Residual(), data(64)[0]
    single = init(model)
    a = report(stacked(single), apply_fn=updated(model), batch=x)
    b = report(single, apply_fn=updated(model), batch=x)
    assert [layer.gap for layer in a.layers] == [layer.gap for layer in b.layers]
    assert jnp.isfinite(a.layers[0].gap)
