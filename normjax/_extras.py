"""Optional packages, and the extras of normjax that install them."""

from __future__ import annotations

from collections.abc import Mapping
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
# What pip calls packages that are imported under another name.
DISTRIBUTIONS = {"PIL": "pillow", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn"}


def raise_for_missing(
    function: str,
    need: str,
    error: ImportError,
    *,
    otherwise: str = "",
    extras: Mapping[str, str] = EXTRAS,
) -> NoReturn:
    """Raises an error for a missing package, which names the extra that installs it.

    If the package is not in any extra, such as a broken part of one, the error is re-raised as it
    is.

    Args:
      function: the name that the error begins with.
      need: the feature that needs the package, and a verb: "progress=True shows a bar of".
      error: the error that the import raised.
      otherwise: the text about how to do without the package.
      extras: the extra of each package, by the name that is imported.
    """
    package = (error.name or "").split(".")[0]
    if package not in extras:
        raise error
    alone = DISTRIBUTIONS.get(package, package)
    raise_error(
        function,
        f"{need} {package}, which is not installed",
        expected=f"the package {package}, of the extra {extras[package]!r}",
        got=str(error),
        fix=f'Run: pip install "normjax[{extras[package]}]", or pip install {alone}{otherwise}',
        kind=ImportError,
    )
