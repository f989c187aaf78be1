"""What the built site holds: every name, its arguments, and no markup left as text."""

import html
import importlib
import inspect
import pathlib
import re
import runpy
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest

import normjax as nj
from tests.test_docs import PUBLIC

pytestmark = pytest.mark.slow
CLASSES = [name for name in PUBLIC if name.split(".")[0] in ("linen", "nnx")]


class Page(HTMLParser):
    """The identifiers, links and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.assets, self.text = set(), [], [], []
        self.inside = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.inside.append(tag)
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img", "link", "source", "iframe"):
            self.assets += [found[key] for key in ("src", "href") if key in found]

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style", "code", "pre"} & set(self.inside):
            self.text.append(data)


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_every_public_name_has_its_place(pages):
    ids = set().union(*(page.ids for page in pages.values()))
    assert [name for name in PUBLIC if f"normjax.{name}" not in ids] == []


def test_no_name_leads_to_a_module_or_to_internals(pages):
    ids = set().union(*(page.ids for page in pages.values()))
    ours = [each for each in ids if each.startswith("normjax.")]
    assert ours and not [each for each in ours if re.search(r"\._[a-z]", each)]
    for each in ours:
        parent, _, last = each.rpartition(".")
        owner = nj if parent == "normjax" else _resolve(parent)
        assert not inspect.ismodule(inspect.getattr_static(owner, last, None)), each


def _resolve(dotted):
    value = nj
    for part in dotted.split(".")[1:]:
        found = getattr(value, part, None)
        value = importlib.import_module(f"{value.__name__}.{part}") if found is None else found
    return value


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_shows_the_arguments_of_constructor_and_call(site, name):
    kind = PUBLIC[name]
    (path,) = [
        path
        for path in (site / "reference").glob("*.html")
        if f'id="normjax.{name}"' in path.read_text()
    ]
    text = path.read_text().split(f'id="normjax.{name}"')[1].split("<dt class")[0:2]
    shown = html.unescape(re.sub("<[^>]+>", "", "".join(text)))
    call = path.read_text().split(f'id="normjax.{name}.__call__"')[1]
    call = html.unescape(re.sub("<[^>]+>", "", call))
    hidden = {"self", "parent", "name"}
    for argument in set(inspect.signature(kind.__init__).parameters) - hidden:
        assert re.search(rf"\b{argument}\b", shown), argument
    for argument in set(inspect.signature(kind.__call__).parameters) - hidden:
        assert re.search(rf"\b{argument}\b", call), argument


def test_no_markup_is_left_as_text(pages):
    for path, page in pages.items():
        text = "".join(page.text)
        assert not re.search(r"\.\. math::|:math:|:ref:|:::|^```", text, re.MULTILINE), path.name


def test_each_error_of_a_docstring_has_its_own_line(pages, site):
    text = (site / "reference" / "batch_norm.html").read_text()
    raised = re.findall(r"<strong>(\w*Error)</strong>", text)
    assert "TypeError" in raised and "ValueError" in raised


def test_signatures_have_an_argument_a_line(site):
    for path in (site / "reference").glob("*.html"):
        for line in re.sub("<[^>]+>", "", path.read_text()).splitlines():
            assert not (line.startswith("normjax.") and len(html.unescape(line)) > 120), line


def test_types_are_linked(site):
    text = (site / "reference" / "batch_norm.html").read_text()
    assert {"Params", "BatchStats", "Activations", "Mask"} <= set(
        re.findall(r'href="types\.html#(\w+)"', text)
    )


def test_internal_links_lead_somewhere(pages, site):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", target):
                continue
            aim = (path.parent / unquote(target)).resolve() if target else path
            ids = pages[aim].ids if aim in pages else set()
            if not aim.exists() or (anchor and aim in pages and unquote(anchor) not in ids):
                broken.append((path.name, link))
    assert broken == []


def test_nothing_comes_from_elsewhere(pages):
    assets = [(path.name, each) for path, page in pages.items() for each in page.assets]
    assert assets and [each for each in assets if re.match(r"(https?:)?//", each[1])] == []


def test_a_page_is_not_a_megabyte(site):
    sizes = {path.name: path.stat().st_size for path in site.rglob("*.html")}
    assert max(sizes.values()) < 300_000, sizes


@pytest.mark.parametrize(
    ("origin", "link"),
    [
        ("git@example.org:team/normjax.git", "https://example.org/team/normjax"),
        ("ssh://git@example.org/team/normjax.git", "https://example.org/team/normjax"),
        ("https://me:secret@example.org/team/normjax", "https://example.org/team/normjax"),
        ("/srv/normjax.git", None),
        (None, None),
    ],
)
def test_the_link_to_the_repository_is_where_the_clone_came_from(tmp_path, origin, link):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if origin is not None:
        subprocess.run(["git", "remote", "add", "origin", origin], cwd=tmp_path, check=True)
    conf = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "docs" / "conf.py"))
    assert conf["repository"](tmp_path) == link
