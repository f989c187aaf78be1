"""Says which extra of normjax installs a package that an example lacks."""

from __future__ import annotations

import sys
from typing import NoReturn

from normjax import _extras

# The extra `examples` has all that its programs need of other extras.
EXTRAS = _extras.EXTRAS | {"matplotlib": "examples", "rich": "examples"}


def stop_without(error: ImportError) -> NoReturn:
    """Ends the program with one line, which names the package and the extra that it is in."""
    try:
        _extras.raise_for_missing(sys.argv[0], "it needs the package", error, extras=EXTRAS)
    except ImportError as explained:
        if explained is error:  # not a package of an extra
            raise
        sys.exit(str(explained))
