"""What README, docs and docstrings show is executed."""

import doctest
import inspect
import pathlib
import re

import jax
import pytest

import normjax as nj
from tests.marks import slow_after

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
PUBLIC = {name: getattr(nj, name) for name in nj.__all__ if callable(getattr(nj, name))}
OWN = len(PUBLIC)
for package in (
    nj.convert,
    nj.deploy,
    nj.diagnostics,
    nj.diagnostics.plot,
    nj.linen,
    nj.nnx,
    nj.optim,
    nj.weights,
):
    PUBLIC |= {
        f"{package.__name__.removeprefix('normjax.')}.{name}": getattr(package, name)
        for name in package.__all__
    }

NUMBER = r"\d+(?:\.\d+)?"


def blocks(page: pathlib.Path) -> str:
    return "\n".join(
        re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_the_blocks_of_a_page_run_in_turn_and_print_what_they_say(
    page, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, page.name, "exec"), {"__name__": page.stem})
    said = re.findall(r"^ *print\(.*\)  # (.+)$", code, flags=re.MULTILINE)
    numbers = iter(re.findall(NUMBER, capsys.readouterr().out))
    for number in re.findall(NUMBER, " ".join(said)):
        assert number in numbers, f"{number} was not printed, or not in this order"


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["functions", "linen", "nnx"])
def test_each_tab_of_the_front_page_needs_only_the_code_above_the_tabs(tab):
    text = (ROOT / "docs" / "pages" / "index.md").read_text()
    shared = re.search(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    own = re.search(
        rf"^::::{{tab-item}} {tab}\n```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL
    )
    assert shared and own
    with jax.numpy_dtype_promotion("standard"):
        exec(shared[1] + own[1], names := {"__name__": tab})
    assert names["value"] < 0.1


@pytest.mark.parametrize("name", slow_after(OWN, PUBLIC))
def test_the_example_of_a_docstring_prints_what_it_says(name):
    found = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={})
    with jax.numpy_dtype_promotion("standard"):  # as users have it; optax needs it
        results = [doctest.DocTestRunner().run(test) for test in found]
    shown = sum(result.attempted for result in results)
    assert shown > 0 or isinstance(PUBLIC[name], type) and issubclass(PUBLIC[name], tuple), (
        "every public name shows an example"
    )
    assert not any(result.failed for result in results)


def test_each_make_target_says_what_it_does_and_what_it_installs():
    text = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"^\.PHONY: (.+)$", text, flags=re.MULTILINE)
    said = dict(re.findall(r"^([a-z-]+):.*## (.+)$", text, flags=re.MULTILINE))
    assert [each for each in targets.split() if each not in said] == []
    installing = re.findall(r"^([a-z-]+): \$\(VENV\)/", text, flags=re.MULTILINE)
    assert installing and [each for each in installing if "install" not in said[each]] == []


def test_formulas_in_docstrings_are_marked_as_math():
    """The site shows other backticks as code, and without the backslashes."""
    as_code = r"(?<!:math:)`[^`\n]*\\[a-z][^`\n]*`"
    texts = {name: inspect.getdoc(value) or "" for name, value in PUBLIC.items()}
    assert {name: found for name in texts if (found := re.findall(as_code, texts[name]))} == {}


def test_links_and_pictures_of_the_readme_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert [
        target for target in targets if "://" not in target and not (ROOT / target).exists()
    ] == []
