"""Programs compiled for TPU pods have one all-reduce each way for synced batch norm."""

import json
import os
import subprocess
import sys

import pytest

from tests.tpu_aot.program import FEATURES

PODS = {"v5e:16x16": 256, "v5p:4x4x4": 64}


# libtpu ends the process on flags that it does not know: those for CPUs of tests/xla.py.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def compiled(*arguments):
    run = subprocess.run(
        [sys.executable, "-m", "tests.tpu_aot.program", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("masked", ["plain", "masked"])
@pytest.mark.parametrize("topology", PODS)
def test_one_all_reduce_each_way(topology, masked):
    found = compiled(topology, "shard_map", masked)
    assert found["devices"] == PODS[topology]
    numbers = 2 * FEATURES + (masked == "masked")
    assert found["forward"] == [["all-reduce", numbers]]
    assert sorted(found["backward"]) == sorted(
        [["all-reduce", numbers], ["all-reduce", 2 * FEATURES]]
    )


def test_plain_jit_with_a_sharded_batch_is_no_different_forward():
    found = compiled("v5e:16x16", "jit", "plain")
    assert [kind for kind, _ in found["forward"]] == ["all-reduce"]
