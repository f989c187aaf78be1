"""The programs that the compilers for CPU, CUDA, ROCm and TPU are given, run on this machine.

JAX may phrase a function differently for each platform (`lax.platform_dependent`). A test that
takes the argument `on_platform` runs once for each platform, or, with many cases, each case on the
CPU and on one of the others, by turns (conftest.py sees to that):

    def test_values(on_platform):
        y, batch_stats = on_platform(partial(nj.batch_norm, train=True), params, batch_stats, x)

`on_platform(function, *arguments)` compiles the function as `jax.jit` would on that platform, and
runs it here. What is static is closed over. Take derivatives inside the function: then the
platform's own backward program runs. `on_platform.compiled(function, *arguments)` returns the
program, to run it on several arguments of the same shapes. `on_platform.quickly` does as
`on_platform` does, without optimizing the program: for large ones whose values other tests check.

The program for CPUs is that of `jax.jit`, optimized as for users. The others come from
`jax.export`, and are compiled quickly (see xla.py): their own compilers would optimize differently.
Equal programs are compiled once, and a function is traced once for all platforms if it is the same
object each time.

Arguments may be pytrees of any dtype, also typed keys. The function may map over devices with
`jax.shard_map`, `jax.pmap` and `jax.vmap`, or take arguments that lie on a mesh; `jax.set_mesh`
then goes around the call, not into the function. JAX exports no host callbacks. What only an
accelerator has cannot run here: custom calls (cuSOLVER's, say), and Pallas kernels that are not
interpreted.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.xla import AS_FOR_USERS

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ELSEWHERE = [export.DisabledSafetyCheck.platform()]


@dataclasses.dataclass(frozen=True)
class Platform:
    """What a test does on one platform; hashable, so that its programs may be kept by it."""

    name: str
    optimized: bool = True

    @property
    def quickly(self) -> "Platform":
        """The same platform, whose programs for CPUs are not optimized either."""
        return dataclasses.replace(self, optimized=False)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what the platform's program of `function(*arguments)` gives."""
        return self.compiled(function, *arguments)(*arguments)

    def compiled(self, function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
        """Returns the platform's program for arguments like these."""
        jitted = jax.jit(function)
        if self.name == "cpu":
            options = tuple(AS_FOR_USERS.items()) if self.optimized else ()
            return _compiled_here(_Here.of(jitted.lower(*arguments)), options)
        exported = export.export(jitted, platforms=[self.name], disabled_checks=ELSEWHERE)
        return _compiled_elsewhere(_Elsewhere.of(exported(*arguments)))


@dataclasses.dataclass(frozen=True)
class _Here:
    """A program for CPUs; equal to another one that computes the same from the same arguments."""

    text: str
    kinds: tuple[Any, ...]
    lowered: Any = dataclasses.field(compare=False)

    @classmethod
    def of(cls, lowered: Any) -> "_Here":
        given = jax.tree.map(str, lowered.in_avals)
        kinds = (str(given), lowered.out_tree)
        return cls(_bare(lowered.as_text()), kinds, lowered)


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """A program for another platform; equal to that of a third one which is phrased alike."""

    text: str
    kinds: tuple[Any, ...]
    exported: export.Exported = dataclasses.field(compare=False)

    @classmethod
    def of(cls, exported: export.Exported) -> "_Elsewhere":
        kinds = (exported.in_tree, exported.out_tree, exported.in_avals, exported.out_avals)
        return cls(_bare(exported.mlir_module()), kinds, exported)


@functools.lru_cache(maxsize=256)
def _compiled_here(program: _Here, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return program.lowered.compile(dict(options))


@functools.lru_cache(maxsize=256)
def _compiled_elsewhere(program: _Elsewhere) -> Callable[..., Any]:
    run = jax.jit(program.exported.call)
    return lambda *arguments: run(*_placed(arguments, program.exported.nr_devices))


def _placed(arguments: Any, devices: int) -> Any:
    """Puts arguments onto all devices of a program, unless they lie there."""
    leaves = jax.tree.leaves(arguments)
    lie_there = any(isinstance(a, jax.Array) and len(a.sharding.device_set) > 1 for a in leaves)
    if devices == 1 or lie_there:
        return arguments
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))
    return jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))


LOCATION = r' ?loc\((?:#loc\d*|unknown|"[^"]*"(?:\(#loc\d*\))?)\)'


def _bare(text: str) -> str:
    """The text of a module without its name and the lines of Python that it was made from."""
    lines = [line for line in text.splitlines() if not line.startswith("#loc")]
    text = re.sub(LOCATION, "", "\n".join(lines))
    return re.sub(r"^module @\S+", "module @program", text)
