"""Compiled layers: on CPUs no float32 copy of a bfloat16 x; a branch only on one device."""

import os
import pathlib
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests.xla import AS_FOR_USERS

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = (16, 14, 14, 64)
LAYERS = {
    "batch_norm": (nj.batch_norm_init, nj.batch_norm),
    "layer_norm": (nj.layer_norm_init, nj.layer_norm),
    "rms_norm": (nj.rms_norm_init, nj.rms_norm),
    "group_norm": (nj.group_norm_init, nj.group_norm),
    "instance_norm": (nj.instance_norm_init, nj.instance_norm),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def traced(layer, shape=SHAPE, dtype=jnp.bfloat16, seeds=()):
    init, apply = LAYERS[layer]
    params, batch_stats = init(shape[-1])
    run = partial(apply, params, batch_stats, train=True)
    for _ in seeds:
        run = jax.vmap(run)
    return jax.jit(run).trace(jax.ShapeDtypeStruct((*seeds, *shape), dtype))


def entry(compiled):
    return compiled.as_text().split("ENTRY")[1]


@each_layer
def test_a_cpu_writes_no_wide_copy_of_a_narrow_x(layer):
    program = entry(traced(layer).lower().compile(AS_FOR_USERS))
    assert "bf16[16,14,14,64]" in program
    assert not re.findall(r"%\S+ = f32\[16,14,14,64\]", program)


@each_layer
def test_other_platforms_know_nothing_of_it(layer):
    program = traced(layer).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.reduce" in program
    assert "optimization_barrier" not in program


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_examples_share_a_branch_on_one_device_alone(devices):
    code = """
from tests.layers.test_programs import branches
print(branches("layer_norm"), branches("group_norm"), branches("instance_norm"))
"""
    assert in_process(devices, "-c", code).split() == [str(int(devices == 1))] * 3


def branches(layer, shape=SHAPE, dtype=jnp.bfloat16, seeds=()):
    program = traced(layer, shape, dtype, seeds).lower().compile(AS_FOR_USERS)
    return entry(program).count(" conditional(")


@pytest.mark.slow
def test_a_batch_norm_of_a_small_array_has_no_branch_on_one_device():
    code = """
import jax.numpy as jnp
from tests.layers.test_programs import branches
print(*[branches("batch_norm", (size, 256), jnp.float32) for size in (128, 129)])
print(branches("batch_norm", (128, 256), jnp.float32, seeds=(2,)))
"""
    assert in_process(1, "-c", code).split() == ["0", "1", "1"]
    assert branches("batch_norm", (128, 256), jnp.float32) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(3,), (2, 3)])
def test_all_seeds_take_one_branch(seeds):
    assert branches("batch_norm", seeds=seeds) == 1


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_one_seed_far_from_zero_gives_all_their_variances(devices):
    code = "from tests.layers.test_programs import seeds_differ; print(seeds_differ())"
    error = float(in_process(1, "-c", code)) if devices == 1 else seeds_differ()
    assert error < 5e-5


def seeds_differ():
    """Returns the largest relative error of variances over two axes of seeds, one far from zero."""
    x = np.random.default_rng(0).standard_normal((2, 3, 64, 4), np.float32)
    x[1, 0] += 1e4
    params, batch_stats = nj.batch_norm_init(4)
    run = lambda x: nj.batch_norm(params, batch_stats, x, True, momentum=0.0)[1]["var"]  # noqa: E731
    expected = np.float64(x).var(2)
    found = np.float64(jax.jit(jax.vmap(jax.vmap(run)))(x))
    return np.abs(found / expected - 1).max()


@pytest.mark.slow
def test_the_family_on_one_device():
    """What other tests say of these layers holds for the way that they go on one device, too."""
    files = [
        "tests/layers/test_family_reference.py",
        "tests/contract/test_contract.py",
        "tests/contract/test_under_transformations.py",
    ]
    layers = "(batch_norm or layer_norm or group_norm or instance_norm)"
    tests = "(formula or offset or constant or derivatives or masked or vmap)"
    chosen = f"{layers} and {tests} and (cpu or tpu)"
    done = in_process(1, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert " passed" in done and "failed" not in done


def in_process(devices, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": str(devices), "NORMJAX_TEST_DEVICES": str(devices)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
