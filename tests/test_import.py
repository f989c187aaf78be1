"""`import normjax` is light."""

import functools
import subprocess
import sys

import pytest


@functools.cache
def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_normjax_loads_no_framework():
    loaded = run("import sys, normjax; print(*sys.modules)")
    assert "normjax" in loaded and "jax" in loaded
    assert not {"flax", "optax", "matplotlib", "torch", "haiku", "keras"} & set(loaded)


@pytest.mark.slow
def test_packages_load_when_they_are_first_used():
    packages = ("convert", "deploy", "diagnostics", "linen", "nnx", "optim")
    loaded = run("import sys, normjax; print(*sys.modules)")
    assert not {f"normjax.{package}" for package in packages} & set(loaded)
    loaded = run("import sys, normjax; normjax.fold_batch_norm; print(*sys.modules)")
    assert "normjax.deploy" in loaded and "flax" not in loaded


@pytest.mark.slow
def test_the_adapters_load_when_they_are_first_used():
    modules = run(
        "import normjax; print(*[package.BatchNorm.__module__"
        " for package in (normjax.linen, normjax.nnx)])"
    )
    assert modules == ["normjax.linen.batch_norm", "normjax.nnx.batch_norm"]


def test_convert_loads_no_library_that_it_converts_from():
    loaded = run("import sys, normjax; normjax.convert.from_torch({}); print(*sys.modules)")
    assert "normjax.convert.torch" in loaded
    assert not {"flax", "torch", "haiku", "keras", "safetensors"} & set(loaded)


def test_a_name_that_does_not_exist_is_an_attribute_error_that_says_so():
    assert run(
        "import normjax\ntry: normjax.torch\nexcept AttributeError as e: print('torch' in str(e))"
    ) == ["True"]


def test_every_public_name_is_there_and_listed():
    *names, same, there = run(
        "import normjax; names = normjax.__all__\n"
        "print(*names, sorted(names) == dir(normjax), all(hasattr(normjax, n) for n in names))"
    )
    assert "batch_norm" in names and (same, there) == ("True", "True")


def test_lint_and_report_are_functions_whatever_is_imported_first():
    """They have the names of packages, which Python binds in `diagnostics` when it imports them."""
    found = run("""
import sys, jax.numpy as jnp
for first in (
    "import normjax.diagnostics.lint",
    "import normjax.diagnostics.report.page, normjax.diagnostics.lint._graph",
    "from normjax.diagnostics.plot import report",
):
    for name in [name for name in sys.modules if name.split(".")[0] == "normjax"]:
        del sys.modules[name]
    exec(first)
    import normjax as nj
    variables, x = nj.batch_norm_init(3), jnp.ones((32, 3))
    apply_fn = lambda variables, x: nj.batch_norm(*variables, x, train=True)
    print(len(nj.diagnostics.lint(apply_fn, variables, x)))
    print(len(nj.diagnostics.report(variables).layers))
""")
    assert found == ["0", "1"] * 3
