"""Sets eight CPU devices, strict promotion, hypothesis and a cache, before JAX's backend starts."""

import gc
import os
import pathlib
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Three quarters of the suite's time is XLA compiling small programs, many of them again and again:
# in another module, in the other worker, in the next run. Set for tests' own processes too.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# PyTorch's threads would wait for work by spinning, on the core that the other worker computes on.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import numpy as np
import pytest

from tests.platforms import PLATFORMS, Platform
from tests.xla import quickly

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = 100_000  # in the cache, a few suites' worth: then it starts anew
DEVICES = int(os.environ.get("NORMJAX_TEST_DEVICES", "8"))

quickly()
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile(
    "normjax",
    deadline=None,
    max_examples=25,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("normjax")


def pytest_configure(config: pytest.Config) -> None:
    own = ROOT / ".jax_cache"
    if not hasattr(config, "workerinput") and own.exists() and len(os.listdir(own)) > PROGRAMS:
        shutil.rmtree(own)


def pytest_sessionstart(session: pytest.Session) -> None:
    if len(jax.devices()) < DEVICES:
        pytest.exit(f"{DEVICES} devices are needed, and {jax.devices()} are there", returncode=1)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collects garbage rarely, and not in what was imported: it took a tenth of the time.

    JAX makes many objects and few cycles. By Python's thresholds there are forty times as many
    collections, and the memory is the same.
    """
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names of settings and dtypes without addresses, the same in every process."""
    if isinstance(val, dict):
        return (
            ",".join(f"{name}={getattr(value, '__name__', value)}" for name, value in val.items())
            or "defaults"
        )
    return val.__name__ if isinstance(val, type) or type(val) is type(jax.numpy.float32) else None


# What `make test-fast` runs: programs for CPUs, and those for TPUs of the tests of every layer.
FAST_PLATFORMS = {"tests.contract.test_contract": ("cpu", "tpu")}


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `on_platform` once for each platform: see tests/platforms.py.

    Last, so that the platforms of a test follow each other, and a program which they share is still
    at hand.
    """
    if "on_platform" in metafunc.fixturenames:
        fast = FAST_PLATFORMS.get(metafunc.module.__name__, ("cpu",))
        platforms = [
            pytest.param(Platform(name), id=name, marks=() if name in fast else pytest.mark.slow)
            for name in PLATFORMS
        ]
        metafunc.parametrize("on_platform", platforms)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the CPU and one accelerator of each case of a test, CUDA and TPU by turns.

    Most of an accelerator's time goes into lowering programs that differ little from case to case.
    ROCm's are CUDA's (test_platforms.py). And every second case is optimized for CPUs as for users,
    which takes five times as long. In a module a case always has the same turn, since its tests may
    share programs.

    A test with one case keeps all platforms, and so do the tests of every layer, test_contract.py.
    """
    tests, turns = {}, {}
    for item in items:
        with_platforms = "on_platform" in getattr(item, "fixturenames", ())
        if with_platforms and item.module.__name__ not in FAST_PLATFORMS:
            platform = item.callspec.params["on_platform"].name
            test, _, case = item.nodeid.removesuffix(f"{platform}]").partition("[")
            tests.setdefault(test, {}).setdefault(case, {})[platform] = item
            cases = turns.setdefault(item.path, {})
            cases.setdefault(case, len(cases))
    dropped = set()
    for cases in tests.values():
        if len(cases) > 1:
            for case, by_platform in cases.items():
                path = next(iter(by_platform.values())).path
                dropped |= _take_turn(by_platform, turns[path][case])
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=list(dropped))


def _take_turn(by_platform: dict[str, pytest.Item], turn: int) -> set[pytest.Item]:
    """Compiles a case for CPUs quickly if the turn is odd. Returns what it is not run on."""
    accelerators = [platform for platform in ("cuda", "tpu") if platform in by_platform]
    kept = {"cpu", *accelerators[turn % 2 :][:1]}
    if turn % 2 and "cpu" in by_platform:
        params = by_platform["cpu"].callspec.params
        params["on_platform"] = params["on_platform"].quickly
    return {item for platform, item in by_platform.items() if platform not in kept}


@pytest.fixture
def rng():
    """A NumPy generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def promotion_as_in_flax():
    """JAX's standard promotion: Flax's layers and the adapters mix bfloat16 and float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield
