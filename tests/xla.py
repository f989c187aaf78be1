"""How XLA compiles the tests' programs: quickly, or as it does for users.

Three quarters of the suite's time was XLA optimizing programs that run once, on a few numbers. What
`quickly` sets compiles them in a tenth of the time, and leaves their arithmetic as it is. Tests of
what XLA makes of a program, and the CPU programs of the fixture `on_platform` (see platforms.py),
are compiled with `AS_FOR_USERS`.
"""

import mmap
import os
import pathlib

import jaxlib.version

EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_EMITTERS = jaxlib.version.__version_info__ < (0, 11)
QUICKLY = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    EMITTERS: "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}
AS_FOR_USERS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
} | ({EMITTERS: True} if HAS_EMITTERS else {})


def quickly() -> None:
    """Sets the flags, for this process and those it starts. Call it before JAX's backend starts."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    given = {flag.split("=")[0] for flag in flags}
    for name, value in QUICKLY.items():
        if f"--{name}" not in given and _is_known(name):
            flags.append(f"--{name}={value}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def _is_known(flag: str) -> bool:
    """Whether this version of XLA has the flag; one that it does not know ends the process."""
    if flag == EMITTERS:  # the newest ones name it without knowing it as a flag
        return HAS_EMITTERS
    library = pathlib.Path(jaxlib.__file__).with_name("libjax_common.so")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(flag.encode()) >= 0
