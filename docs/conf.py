"""Configures Sphinx for the site: `make docs`."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import normjax
from normjax import _typing

HERE = pathlib.Path(__file__).parent

project = "normjax"
author = "the authors of normjax"
release = normjax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name for name in _typing.__all__ if name[0].isupper()}
autodoc_typehints_format = "short"
maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # it evaluates types, which jaxtyping does not support for some
napoleon_custom_sections = ["Returns"]

copybutton_prompt_text = r">>> |\.\.\. "  # without it, copied examples of docstrings have prompts
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "normjax"
html_favicon = "favicon.svg"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["formulas.css"]
html_show_sphinx = False
html_show_copyright = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}


def repository(clone: pathlib.Path = HERE) -> str | None:
    """Returns the address on the web of the repository that a clone is of, or None."""
    command = ["git", "config", "--get", "remote.origin.url"]
    found = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    address = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", found.stdout.strip())
    address = re.sub(r"^https://[^/]*@", "https://", address)  # a password is nobody's business
    return address.removesuffix(".git") if address.startswith("https://") else None


if address := repository():
    link = {"name": "Repository", "url": address, "html": "Repository", "class": ""}
    html_theme_options["footer_icons"] = [link]
