"""What the benchmarks' parts compute, and that each peer is checked before it is timed."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.harness import cases, peers, programs, records, rows, timing
from benchmarks.harness.cases import Case
from benchmarks.harness.timing import Program

SMALL = Case("batch", "forward+backward", (4, 3, 3, 32), "float32", "add+relu")
MASKED_ON_8 = Case("batch", "forward+backward", (16, 2, 2, 16), "float32", devices=8, masked=True)

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")


@functools.cache
def outputs(peer, case):
    """What a peer computes, once for all that are compared with it."""
    return jax.device_get(programs.build(peer, case, programs.Operands(case)).outputs())


@pytest.mark.parametrize(
    ("case", "arrays"),
    [
        (Case("batch", "evaluation", (8, 4), "float32"), 2),  # reads x, writes y
        (Case("batch", "forward", (8, 4), "float32"), 3),  # reads x twice
        (Case("batch", "forward", (8, 4), "float32", "relu"), 3),
        (Case("batch", "forward", (8, 4), "float32", "add+relu"), 4),
        (Case("batch", "forward+backward", (8, 4), "float32"), 3 + 5),  # x and g twice, d_x
        # y, and the residual's gradient
        (Case("batch", "forward+backward", (8, 4), "float32", "add+relu"), 4 + 7),
        (Case("layer", "forward", (8, 4), "float32"), 2),
        (Case("rms", "forward+backward", (8, 4), "float32"), 2 + 3),
        (Case("batch", "backward", (8, 4), "float32"), 5),
        (Case("layer", "backward", (8, 4), "float32"), 3),
    ],
)
def test_the_floor_counts_what_must_be_read_and_written(case, arrays):
    assert cases.arrays_moved(case) == arrays


@pytest.mark.parametrize("name", ["tiny", "cpu", "gpu", "sync", "gpu_static"])
def test_every_row_of_a_suite_has_a_name_of_its_own(name):
    names = [case.name for case in cases.suite(name)]
    assert len(set(names)) == len(names) > 5


def test_the_rows_are_those_of_real_networks():
    for name in ("cpu", "gpu"):
        found = cases.suite(name)
        assert {case.layer for case in found} == {"batch", "layer", "rms", "group", "instance"}
        assert {case.mode for case in found} == {"forward", "forward+backward", "evaluation"}
        assert {case.then for case in found} == {"", "relu", "add+relu"}
        assert {case.dtype for case in found} == {"float32", "bfloat16"}
        assert {(56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)} <= {
            case.shape[1:] for case in found
        }
        assert {(197, 768), (2048, 4096)} <= {case.shape[1:] for case in found}
    assert {case.shape[0] for case in cases.suite("gpu")} >= {32, 64, 128, 256}


def test_the_operands_are_exact_in_bfloat16_and_the_same_every_time():
    first, second = cases.operands(SMALL), cases.operands(SMALL)
    assert set(first) == {"x", "cotangent", "residual", "scale", "bias", "mean", "var"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
        assert (value.shape, value.dtype) == cases.shapes(SMALL)[name]
    for name in ("scale", "bias", "mean", "var"):
        np.testing.assert_array_equal(
            first[name], jnp.asarray(first[name], jnp.bfloat16).astype(jnp.float32)
        )


def test_programs_run_in_turns_as_often_in_each_round():
    seen = []
    made = {name: Program(lambda name=name: seen.append(name), lambda _: None) for name in "ab"}
    times = timing.interleaved(made, rounds=4, sample_seconds=0)
    assert {name: len(each) for name, each in times.items()} == {"a": 4, "b": 4}
    # each called once to warm up, then timed
    turns = ["".join(seen[-16:][i : i + 4]) for i in range(0, 16, 4)]
    assert set(turns) == {"aabb", "bbaa"}


def test_a_summary_is_of_medians_and_of_ratios_within_rounds():
    found = timing.summary([2.0, 4.0, 60.0], [1.0, 2.0, 20.0])
    assert (found["ms"], found["ratio"], found["samples"]) == (4.0, 2.0, 3)
    assert found["ms_low"] <= 4.0 <= found["ms_high"]


def test_bytes_kept_for_the_backward_pass():
    x = jnp.ones((8, 4))
    assert programs.kept_bytes(jnp.sin, x) == 8 * 4 * 4  # cos(x)
    assert programs.kept_bytes(lambda x: 2 * x, x) == 0
    # 2 x at the most; x itself is the caller's
    assert programs.kept_bytes(lambda x: x * x, x) <= 8 * 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "peer", [name for name in peers.PEERS if name not in ("normjax", "tokamax")]
)
@pytest.mark.parametrize("layer", ["batch", "layer", "rms", "group", "instance"])
def test_a_peer_computes_what_normjax_computes(peer, layer):
    modes = (
        ("forward+backward", "forward", "evaluation") if layer == "batch" else ("forward+backward",)
    )
    for mode in modes:
        case = Case(layer, mode, (4, 3, 3, 32), "float32")
        own, other = outputs("normjax", case), outputs(peer, case)
        errors = programs.relative_errors(other, own)
        assert errors.keys() == own.keys()
        assert max(errors.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("peer", [name for name in peers.PEERS if name != "tokamax"])
@pytest.mark.parametrize("layer", ["batch", "layer", "rms", "group", "instance"])
def test_the_backward_pass_alone_has_the_gradients_of_both_passes(peer, layer):
    case = Case(layer, "forward+backward", (4, 3, 3, 32), "float32")
    both, alone = outputs(peer, case), outputs(peer, case._replace(mode="backward"))
    assert alone.keys() == {name for name in both if name.startswith("d_")}
    assert {"d_x", "d_scale"} <= alone.keys()
    assert max(programs.relative_errors(alone, both).values()) < 1e-5


def test_the_backward_pass_alone_reads_what_the_forward_pass_keeps_and_returns_no_y():
    case = Case("layer", "backward", (4, 32), "bfloat16", "add+relu")
    placed = programs.Operands(case).placed(features_first=False)
    run, given = programs.traceable("formula", case, placed)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), placed)
    abstract = programs.traceable("formula", case, shapes)[1]
    sizes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(given)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)] == sizes
    assert ((4, 32), jnp.float32) in sizes  # the deviations from the mean
    assert run(*given).keys() == {"d_x", "d_residual", "d_scale", "d_bias"}


@pytest.mark.slow
def test_a_row_has_times_bytes_and_errors():
    building = rows.Building(limit=60)
    row = rows.row(SMALL, ["flax.linen", "haiku", "torch"], 2, building)
    assert row["name"] == "batch norm + add, relu forward+backward 4x3x3x32 float32"
    assert row["floor_ms"] == pytest.approx(
        cases.arrays_moved(SMALL) * SMALL.nbytes / row["copy_GBps"] / 1e6
    )
    for name, got in row["peers"].items():
        assert got["ms_low"] <= got["ms"] <= got["ms_high"]
        assert name == "normjax" or 0 <= got["error"] < 1e-5
    assert row["peers"]["normjax"]["kept_bytes"] > 0
    assert row["peers"]["flax.linen"]["temporary_bytes"] > 0


@pytest.mark.slow
def test_peers_that_are_wrong_absent_unable_or_slow_are_named_with_the_reason(monkeypatch):
    def wrong(case):
        right = peers.normjax(case)
        return lambda params, stats, x: right(params, stats, 1.5 * x + 1)

    def broken(case):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setitem(peers.PEERS, "flax.nnx", wrong)
    monkeypatch.setitem(peers.PEERS, "keras", broken)
    monkeypatch.setitem(sys.modules, "haiku", None)
    building = rows.Building(limit=60)
    building.spent["torch"] = 61
    case = Case("batch", "forward", (4, 32), "float32")
    row = rows.row(
        case, ["flax.nnx", "keras", "haiku", "tokamax", "torch", "torch channels-last"], 2, building
    )
    reasons = {name: got["skipped"] for name, got in row["peers"].items() if name != "normjax"}
    assert reasons["flax.nnx"].startswith("wrong: ") and "off by" in reasons["flax.nnx"]
    assert reasons["keras"] == "failed: RuntimeError: no kernel for this shape"
    assert reasons["haiku"].startswith("not installed: ")
    assert reasons["tokamax"] == "unable: has no batch norm"
    assert reasons["torch"].startswith("unable: its programs took more than 60 s")
    shown = records.skipped([row])
    assert all(f"skipped: {name}, every row: {reason}" in shown for name, reason in reasons.items())


@pytest.mark.slow
def test_synced_rows_run_on_all_devices_and_agree():
    case = Case("batch", "forward+backward", (8, 2, 2, 16), "float32", devices=8)
    alone = outputs("normjax", case._replace(devices=1))
    for peer in ("normjax", "flax.linen", "haiku", "formula"):
        errors = programs.relative_errors(outputs(peer, case), alone)
        assert max(errors.values()) < 1e-5
    with pytest.raises(peers.Unable, match="distribution"):
        programs.build("keras", case, programs.Operands(case))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward+backward", "backward"])
@pytest.mark.parametrize("peer", peers.MASKED)
def test_masked_rows_leave_examples_out(peer, mode):
    case = Case("batch", mode, (16, 2, 2, 16), "float32", masked=True)
    own, other = outputs("normjax", MASKED_ON_8), outputs(peer, case)
    assert max(programs.relative_errors(other, own).values()) < 1e-5
    unmasked = outputs(peer, case._replace(masked=False))
    assert programs.relative_errors(unmasked, own)["d_scale"] > 1e-2


def test_each_device_of_a_masked_row_leaves_out_another_number_of_examples():
    mask = cases.operands(MASKED_ON_8)["mask"]
    assert mask.shape == (16, 1, 1, 1)
    assert len(set(mask.reshape(8, 2).sum(1))) > 1
    with pytest.raises(peers.Unable, match="takes no mask"):
        programs.build("haiku", MASKED_ON_8, programs.Operands(MASKED_ON_8))


def test_the_header_names_the_machine_and_the_versions():
    found = records.header()
    assert found["versions"]["jax"] == jax.__version__
    assert found["machine"]["backend"] == "cpu" and found["machine"]["cores"] >= 1
    assert found["command"].startswith("python ")
