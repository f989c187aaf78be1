"""Compiles for TPUs without a TPU: libtpu's compiler runs on any x86-64 machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology such as "v5e:16x16", to compile for.

    Call it before JAX is asked for devices, since libtpu is configured when JAX's backends start.
    """
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX would search for a TPU
    return topologies.get_topology_desc(topology, platform="tpu").devices
