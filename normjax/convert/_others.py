"""The argument `others`: what to do with arrays that do not belong to a known layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NoReturn, get_args

import numpy as np

from normjax import _checks
from normjax.convert._leaf import Leaf
from normjax.convert._names import first_of

Others = Literal["keep", "refuse"]


def check_others(function: str, others: object) -> None:
    """Raises an error for a value that is not in `Others`."""
    _checks.choice(function, "others", others, get_args(Others))


def refuse(function: str, leaves: Iterable[Leaf], known: Iterable[str], others: Others) -> NoReturn:
    """Raises one error for all leaves that do not belong to a known layer.

    With `others="keep"`, they are refused because they change what their layers compute.
    """
    leaves = list(leaves)
    fix = "Convert them by hand, and leave them out here: they change what their layers compute"
    if others == "refuse":
        fix = 'Pass others="keep" to pass them through unchanged, or leave them out'
    _checks.raise_error(
        function,
        f"{leaves[0].key!r} has no counterpart{first_of(leaves)}",
        expected=f"leaves among {list(known)}",
        got=", ".join(f"{leaf.key!r} of shape {np.shape(leaf.value)}" for leaf in leaves),
        fix=fix,
    )
