"""Compiles for H100 GPUs without a GPU, from XLA's description of the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    # Otherwise, JAX's CUDA plugin does not load without a driver.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
FLAGS = (
    "--xla_gpu_autotune_level=0",  # autotuning would need a GPU
    "--xla_gpu_collect_cost_model_stats=true",  # writes the estimates that gpu_programs.py reads
    # Uses cuBLAS for matrix products. Without autotuning, XLA would use its own kernels, and fail
    # if it finds no tiling, as in a ViT with 197 tokens (jax 0.10.2).
    "--xla_gpu_enable_triton_gemm=false",
)
DESCRIPTION = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(count: int = 1) -> Sequence[Any]:
    """Returns several H100s of one host, to compile for.

    Call it before JAX is asked for devices, since XLA reads its flags when backends start.

    Raises:
      RuntimeError: if `jax[cuda13]` is not installed.
    """
    os.environ.update(ENVIRONMENT)
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([given, *(flag for flag in FLAGS if flag not in given)])
    jax.config.update("jax_platforms", "cpu")  # otherwise JAX would warn that it finds no GPU
    return topologies.get_topology_desc(
        platform="cuda", target_config=DESCRIPTION, topology=f"1x1x{count}"
    ).devices
