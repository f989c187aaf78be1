"""The gallery shows what its commands make."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pages" / "gallery.md"
SECTIONS = [
    (re.search(r"python examples/(\w+)\.py", text)[1], text)
    for text in re.findall(
        r"^## .+?(?=^\(gallery-|\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL
    )
]


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_examples_are_shown_in_order(gallery):
    assert [name for name, _ in SECTIONS] == list(gallery.EXAMPLES)


@pytest.mark.parametrize(("name", "text"), SECTIONS, ids=lambda value: value[:20])
def test_a_section_has_a_command_and_a_small_picture(name, text):
    assert (
        f"\n    python examples/{name}.py\n" in text and (ROOT / "examples" / f"{name}.py").exists()
    )
    (picture,) = re.findall(r"^!\[[^]]+\]\((images/\w+\.png)\)$", text, flags=re.MULTILINE)
    assert picture == f"images/{name}.png"
    assert 5_000 < (PAGE.parent / picture).stat().st_size <= 100_000


def test_a_picture_keeps_the_plot(gallery, tmp_path):
    plot = np.full((300, 600, 3), 255, np.uint8)
    plot[100:200, 150:450] = (200, 30, 40)
    Image.fromarray(plot).save(tmp_path / "plot.png")
    gallery.shrink(tmp_path / "plot.png", tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == (gallery.WIDTH, gallery.WIDTH // 2) and picture.mode == "P"
        shown = np.asarray(picture.convert("RGB"), int)
    assert abs(shown[300, 600] - (200, 30, 40)).max() <= 2 and (shown[:100] == 255).all()


def test_a_plot_of_many_colours_gets_fewer(gallery, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(gallery, "WIDTH", 150)
    monkeypatch.setattr(gallery, "LIMIT", 10)  # out of reach: the fewest
    noise = rng.integers(0, 256, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "plot.png")
    gallery.shrink(tmp_path / "plot.png", tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(np.unique(np.asarray(picture))) == gallery.COLOURS[-1]
