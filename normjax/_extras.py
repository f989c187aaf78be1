"""Optional packages, and the extras of normjax that install them."""

from __future__ import annotations

from typing import NoReturn

from normjax._checks import raise_error

# By the name that is imported; the extras are those of pyproject.toml.
EXTRAS = {
    "matplotlib": "diagnostics",
    "rich": "diagnostics",
    "safetensors": "diagnostics",
    "orbax": "diagnostics",
    "qwix": "quantize",
    "torch": "torch",
    "keras": "keras",
    "grain": "train",
    "PIL": "train",
    "tensorboardX": "train",
    "sklearn": "examples",
}


def raise_for_missing(
    function: str, need: str, error: ImportError, *, otherwise: str = ""
) -> NoReturn:
    """Raises the error for a package that is not installed, with the extra that installs it.

    Errors for packages that are in no extra, such as a broken part of one, are raised as they are.

    Args:
      function: the name that the error begins with.
      need: what needs the package, and a verb: "progress=True shows a bar of".
      error: what the import raised.
      otherwise: what to do without the package.
    """
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        raise error
    raise_error(
        function,
        f"{need} {package}, which is not installed",
        expected=f"the package {package}, of the extra {EXTRAS[package]!r}",
        got=str(error),
        fix=f'Run: pip install "normjax[{EXTRAS[package]}]", or pip install {package}{otherwise}',
        kind=ImportError,
    )
