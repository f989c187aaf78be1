"""Imports in normjax: packages only import packages below them, and no others' private modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "normjax").rglob("*.py"))

# From the bottom up. A file may import from its own floor and from those below.
FLOORS = (
    ("_typing", "_checks", "_extras", "_foreign", "_leaves"),
    ("_trees", "_jaxpr"),
    ("platforms", "kernels"),
    ("statistics",),
    ("layers", "weights"),
    ("linen", "nnx", "deploy", "convert", "optim", "diagnostics"),
    ("__init__",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# Frameworks that these packages may import when they are loaded; others import them in functions.
FRAMEWORKS = {"flax": {"linen", "nnx"}, "optax": {"optim"}}


# The packages of diagnostics, and which of the others each of them may import.
DIAGNOSTICS = {
    "lint": set(),
    "report": set(),
    "instruments": set(),
    "plot": {"report", "instruments"},
}


def package_of(file):
    return file.relative_to(ROOT / "normjax").parts[0].removesuffix(".py")


def imports(tree):
    """Yields each imported name in full, and whether it is imported when the module is loaded."""

    def walk(node, loaded):
        if isinstance(node, ast.Import):
            yield from ((alias.name, loaded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports inside normjax name the whole module"
            yield from ((f"{node.module}.{alias.name}", loaded) for alias in node.names)
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.iter_child_nodes(node):
            yield from walk(inner, loaded and not in_function and not for_types)

    return list(walk(tree, True))


def problems(package, source):
    """Returns what is wrong with the imports of a file of a package."""
    found = []
    for name, loaded in imports(ast.parse(source)):
        first, *parts = name.split(".")
        if loaded and first in FRAMEWORKS and package not in FRAMEWORKS[first]:
            found.append(f"imports {name} when it is loaded")
        if first != "normjax" or not parts or parts[0] == package:
            continue
        if FLOOR.get(parts[0], 0) > FLOOR[package]:
            found.append(f"imports {name}, which is above {package}")
        if any(part.startswith("_") for part in parts[1:]):
            found.append(f"imports {name}, which is private to {parts[0]}")
    return found


def problems_in_diagnostics(package, source):
    """Returns what is wrong with the imports of a file of a package of diagnostics."""
    found = []
    for name, _ in imports(ast.parse(source)):
        if not name.startswith("normjax.diagnostics."):
            continue
        other, *parts = name.split(".")[2:]
        if other == package:
            continue
        if other in DIAGNOSTICS and other not in DIAGNOSTICS[package]:
            found.append(f"imports {name}, which is apart from {package}")
        if any(part.startswith("_") for part in (other, *parts)):
            found.append(f"imports {name}, which is private to {other}")
    return found


def test_every_package_has_a_floor():
    assert len(FILES) > 100
    assert {package_of(file) for file in FILES} <= set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports(file):
    assert problems(package_of(file), file.read_text()) == []


@pytest.mark.parametrize(
    ("package", "source", "problem"),
    [
        ("statistics", "from normjax.layers.batch_norm import batch_norm", "above statistics"),
        ("layers", "def f():\n    from normjax import linen", "above layers"),
        ("_checks", "from normjax import _trees", "above _checks"),
        ("diagnostics", "from normjax.optim._transformations import x", "private to optim"),
        ("diagnostics", "from normjax.optim import _transformations", "private to optim"),
        ("deploy", "import normjax.convert._trees", "private to convert"),
        ("deploy", "from normjax.layers._renorm import correct", "private to layers"),
        ("deploy", "from flax import linen", "imports flax.linen when"),
        ("convert", "class A:\n    import flax", "imports flax when"),
        ("diagnostics", "import optax", "imports optax when"),
    ],
)
def test_what_points_up_or_looks_into_a_neighbour_is_found(package, source, problem):
    (found,) = problems(package, source)
    assert problem in found


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("optim", "from normjax._trees import plain"),
        ("optim", "from normjax.optim._transformations import transformation\nimport optax"),
        ("diagnostics", "from normjax.optim.directions import norm"),
        ("deploy", "def f():\n    from flax import nnx"),
        ("convert", "if TYPE_CHECKING:\n    from flax import nnx"),
        ("nnx", "from flax import nnx\nfrom normjax.layers.batch_step import BatchStep"),
    ],
)
def test_what_is_in_order_is_not(package, source):
    assert problems(package, source) == []


@pytest.mark.parametrize("package", DIAGNOSTICS)
def test_the_packages_of_diagnostics_are_told_apart(package):
    files = sorted((ROOT / "normjax" / "diagnostics" / package).glob("*.py"))
    assert len(files) > 5
    assert [problems_in_diagnostics(package, file.read_text()) for file in files] == [[]] * len(
        files
    )


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from normjax.diagnostics.lint import Lint", "apart from plot"),
        ("from normjax.diagnostics import lint", "apart from plot"),
        ("def f():\n    from normjax.diagnostics.report._text import span", "private to report"),
        ("from normjax.diagnostics.report import _text", "private to report"),
        ("from normjax.diagnostics import _findings", "private to _findings"),
    ],
)
def test_what_a_package_of_diagnostics_may_not_import_is_found(source, problem):
    (found,) = problems_in_diagnostics("plot", source)
    assert problem in found
