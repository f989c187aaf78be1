"""How XLA compiles the tests' programs: quickly, or as it does for users.

Three quarters of the suite's time was XLA optimizing programs that run once, on a few numbers. What
`quickly` sets compiles them in a tenth of the time, and leaves their arithmetic as it is. Tests of
what XLA makes of a program, and the CPU programs of the fixture `on_platform` (see platforms.py),
are compiled with `AS_FOR_USERS`.
"""

import os

import jaxlib.version

# XLA ends the process on a flag that it does not know, as the newest ones this one.
EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_EMITTERS = jaxlib.version.__version_info__ < (0, 11)
QUICKLY = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_parallel_codegen_split_count": "1",
} | ({EMITTERS: "false"} if HAS_EMITTERS else {})
AS_FOR_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
} | ({EMITTERS: True} if HAS_EMITTERS else {})


def quickly() -> None:
    """Sets the flags, for this process and those it starts. Call it before JAX's backend starts."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.split("=")[0] for flag in flags}
    flags += [f"--{name}={value}" for name, value in QUICKLY.items() if f"--{name}" not in given]
    os.environ["XLA_FLAGS"] = " ".join(flags)
