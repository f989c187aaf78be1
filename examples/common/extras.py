"""Says which extra of normjax installs a package that an example lacks."""

from __future__ import annotations

import sys
from typing import NoReturn

from normjax import _extras


def stop_without(error: ImportError) -> NoReturn:
    """Ends the program with one line, which names the package and the extra that it is in."""
    try:
        _extras.raise_for_missing(sys.argv[0], "it takes the package", error)
    except ImportError as explained:
        sys.exit(str(explained))
