"""The benchmarks as they are called."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks.harness import records

ROOT = pathlib.Path(__file__).parents[2]


def call(script, *arguments, status=0):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what is timed here does not matter
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout + done.stderr


def result(ms, temporary, name="batch norm forward 8x4 float32", **versions):
    figures = {"ms": ms, "ms_low": 0.9 * ms, "ms_high": 1.1 * ms, "ratio": 1, "samples": 5}
    row = {"name": name, "peers": {"normjax": figures | {"temporary_bytes": temporary}}}
    return {
        "machine": {"cores": 2, "load_before": ms},
        "versions": {"jax": "0.10.2"} | versions,
        "rows": [row],
    }


@pytest.fixture
def files(tmp_path):
    def written(**results):
        for name, content in results.items():
            (tmp_path / name).write_text(json.dumps(content))
        return [tmp_path / name for name in results]

    return written


@pytest.mark.slow
def test_compare_shows_what_changed_beyond_the_noise(files):
    assert "2 figures, none changed" in call(
        "compare.py", *files(a=result(1.0, 64), b=result(1.05, 64))
    )
    worse = call("compare.py", *files(a=result(1.0, 64), b=result(2.0, 64, jax="0.11.2")), status=1)
    assert (
        "| batch norm forward 8x4 float32 | ms | 1 | 2 | 2.000x |" in worse
        and "temporary" not in worse
    )
    assert "versions, jax: 0.10.2 -> 0.11.2" in worse
    better = call("compare.py", *files(a=result(1.0, 64), b=result(1.0, 32)))
    assert "| temporary_bytes | 64 | 32 | 0.500x |" in better
    counted = [result(1.0, 64), result(1.0, 64)]
    for each, cycles in zip(counted, (1000, 1060), strict=True):
        each["rows"][0]["peers"]["normjax"]["estimated_cycles"] = cycles
    slower = call("compare.py", *files(a=counted[0], b=counted[1]), status=1)
    assert "| estimated_cycles | 1000 | 1060 | 1.060x |" in slower
    counted = [result(1.0, 64), result(1.0, 64)]
    for each, conditionals in zip(counted, (0, 53), strict=True):
        figures = {"bytes_moved": 300, "estimated_us": 1.5, "conditionals": conditionals}
        each["rows"][0]["peers"]["normjax"] |= figures
    branching = call("compare.py", *files(a=counted[0], b=counted[1]), status=1)
    assert "| conditionals | 0 | 53 | infx |" in branching and "estimated_us" not in branching
    other = call("compare.py", *files(a=result(1.0, 64), b=result(1.0, 64, name="another")))
    assert "not in B: batch norm forward 8x4 float32" in other and "not in A: another" in other


@pytest.mark.slow
def test_layers_writes_json_prints_its_table_last_and_is_plotted(tmp_path):
    out, picture = tmp_path / "layers.json", tmp_path / "layers.svg"
    arguments = ("--suite", "tiny", "--rounds", 2, "--only", "layer norm", "--out", out)
    shown = call(
        "layers.py", *arguments, "--peers", "normjax", "flax.linen", "torch", "torch channels-last"
    )
    assert (
        shown.rstrip()
        .splitlines()[-1]
        .startswith("| layer norm forward+backward 4x6x64 float32 | ")
    )
    assert "skipped: torch channels-last, every row: unable: features are last as it is" in shown
    found = records.read(out)
    assert found["machine"]["backend"] == "cpu" and found["versions"]["torch"]
    assert {name for name, got in found["rows"][0]["peers"].items() if "ms" in got} == {
        "normjax",
        "flax.linen",
        "torch",
    }
    call("plot.py", out, picture)
    text = picture.read_text()
    assert text.startswith("<?xml") and "<dc:date>" not in text
    assert "in its name" in call("layers.py", "--suite", "tiny", "--only", "no such row", status=2)


@pytest.mark.slow
def test_drawn_rows_keep_their_seed_and_end_with_a_summary(tmp_path):
    out = tmp_path / "drawn.json"
    arguments = ("--suite", "drawn", "--seed", 5, "--count", 1, "--rounds", 2, "--out", out)
    shown = call("layers.py", *arguments, "--peers", "normjax", "flax.linen")
    found = records.read(out)
    assert (found["seed"], found["count"], len(found["rows"])) == (5, 1, 3 + 1)
    assert all(row["peers"]["flax.linen"]["ratio"] > 0 for row in found["rows"])
    assert "drawn, 1 rows: fastest library on JAX" in shown


@pytest.mark.slow
def test_overhead_counts_the_same_every_time(tmp_path):
    results = []
    for name in ("first.json", "second.json"):
        shown = call("overhead.py", "--counts", "--json", tmp_path / name)
        results.append(records.read(tmp_path / name)["rows"][0]["peers"])
    assert results[0] == results[1]
    for subject in ("normjax.batch_norm", "normjax.nnx.BatchNorm", "flax.linen.BatchNorm"):
        assert f"| {subject} | " in shown
        figures = results[0][subject]
        assert all(isinstance(figure, int) and figure >= 0 for figure in figures.values())
        assert figures["calls"] >= figures["functions"] >= figures["files"] > 0
        assert figures["calls"] > figures["calls_before_first_sum"] > 0
        assert figures["equations_with_gradients"] > figures["equations"] > 0
    assert results[0]["flax.linen.BatchNorm"]["files"] == 1
    assert results[0]["normjax.batch_norm"]["calls_around"] == 0


@pytest.mark.slow
def test_overhead_times_eager_calls_and_compilation(tmp_path):
    out = tmp_path / "overhead.json"
    call("overhead.py", "--rounds", 2, "--calls", 3, "--compilations", 1, "--json", out)
    layers, compilation = records.read(out)["rows"]
    for figures in layers["peers"].values():
        assert figures["eager_us"] > 0 and figures["eager_cpu_us"] > 0
    ratio = compilation["peers"]["normjax"]["ratio"]
    totals = {name: got["total"] for name, got in compilation["peers"].items()}
    assert ratio == pytest.approx(totals["normjax"] / totals["flax.linen"])


@pytest.mark.slow
def test_the_gpu_call_works_dry(tmp_path):
    out = tmp_path / "gpu.json"
    # The peers are those of layers.py, and a network with each takes seconds to compile.
    shown = call("gpu.py", "--dry-run", "--rounds", 2, "--out", out, "--peers", "normjax")
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith("| inception 4x8x8x1 float32 step | ")
    found = records.read(out)
    assert found["command"].startswith("python ") and found["seconds"] < 480
    assert [row["name"] for row in found["rows"] if row["peers"]["normjax"]["ms"] <= 0] == []
    assert sum("floor_ms" in row for row in found["rows"]) == 10
    assert sum(row["name"].endswith("step") for row in found["rows"]) == 4


@pytest.mark.slow
def test_programs_of_gpus_are_plotted_and_need_jax_with_cuda_to_be_compiled(tmp_path):
    figures = {"bytes_moved": 300, "bytes_in_branches": 50}
    figures |= {"estimated_us": 1.5, "estimated_us_in_branches": 0.5}
    peers = {"normjax": figures, "flax.linen": figures, "equinox": {"skipped": "absent"}}
    row = {"name": "layer norm forward 8x4 float32", "x_bytes": 128, "peers": peers}
    step = {"name": "resnet50 step", "peers": peers}
    results = {"target": "H100", "machine": {}, "versions": {"jax": "0.10.2"}, "rows": [row, step]}
    (tmp_path / "a.json").write_text(json.dumps(results))
    call("plot.py", tmp_path / "a.json", tmp_path / "a.svg", "--peers", "normjax", "formula")
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml") and "programs for H100, not run; jax 0.10.2" in text
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        said = call("gpu_static.py", "--only", "critic", status=2)
        assert "jax[cuda13] is needed" in said


@pytest.mark.slow
def test_passes_of_cpu_programs_are_listed_and_those_of_tpus_need_libtpu(tmp_path):
    said = call("passes.py", "cpu", "--out", tmp_path / "a.json")
    assert "|  | formula | flax.linen | normjax |" in said
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["case"]["layer"] for row in rows] == ["batch", "layer"]
    for row in rows:
        read, written = map(sum, zip(*row["peers"]["normjax"]["steps"], strict=True))
        assert read >= 2 * row["x_bytes"] and written >= row["x_bytes"]
    if importlib.util.find_spec("libtpu") is None:
        said = call("passes.py", "v5e", status=2)
        assert "the compiler for v5e is in libtpu, not installed" in said


@pytest.mark.slow
def test_the_gpu_call_refuses_to_time_a_cpu():
    assert "JAX sees no GPU, but [CpuDevice(id=0)]. Install jax[cuda13], or give --dry-run" in call(
        "gpu.py", status=2
    )
