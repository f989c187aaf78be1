"""Optional packages, and the extras of normjax that install them."""

from __future__ import annotations

from typing import NoReturn

from normjax._checks import raise_error

# The extra of pyproject.toml, by the name of the imported package.
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
    """Raises an error for a missing package, which names the extra that installs it.

    If the package is not in any extra, such as a broken part of one, the error is re-raised as it
    is.

    Args:
      function: the name that the error begins with.
      need: the feature that needs the package, and a verb: "progress=True shows a bar of".
      error: the error that the import raised.
      otherwise: the text about how to do without the package.
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
