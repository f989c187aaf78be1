"""Which cases of a test `make test-fast` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Marks all but the first cases as slow: those that show little that the first do not."""
    return [
        case if place < count else pytest.param(case, marks=pytest.mark.slow)
        for place, case in enumerate(cases)
    ]
