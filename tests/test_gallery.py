"""The gallery shows what its commands make."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "pages" / "gallery.md"
SECTIONS = re.findall(r"^## (\d+)\. (\w+)$(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sections_are_in_the_order_of_the_examples(gallery):
    numbers = [int(number) for number, *_ in SECTIONS]
    assert SECTIONS and numbers == sorted(set(numbers))
    assert [gallery.EXAMPLES[number - 1] for number in numbers] == [name for _, name, _ in SECTIONS]


@pytest.mark.parametrize(("name", "text"), [(name, text) for _, name, text in SECTIONS], ids=lambda value: value[:20])
def test_a_section_has_a_command_and_a_small_picture(name, text):
    assert f"\n    python examples/{name}.py\n" in text and (ROOT / "examples" / f"{name}.py").exists()
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
