"""What to do with arrays that no known layer has: the argument `others`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NoReturn, get_args

import numpy as np

from normjax import _checks
from normjax.convert._leaf import Leaf
from normjax.convert._names import first_of

Others = Literal["keep", "refuse"]


def check_others(function: str, others: object) -> None:
    """Raises an error for another word than those of `Others`."""
    _checks.choice(function, "others", others, get_args(Others))


def refuse(function: str, leaves: Iterable[Leaf], known: Iterable[str], others: Others) -> NoReturn:
    """Raises one error for all leaves that no known layer has.

    With `others="keep"` they are refused since their layers would compute something else without.
    """
    leaves = list(leaves)
    fix = "Convert them by hand, and leave them out: their layers compute something else without"
    if others == "refuse":
        fix = 'Pass others="keep" to hand them through unchanged, or leave them out'
    _checks.raise_error(
        function,
        f"{leaves[0].key!r} has no counterpart{first_of(leaves)}",
        expected=f"leaves among {list(known)}",
        got=", ".join(f"{leaf.key!r} of shape {np.shape(leaf.value)}" for leaf in leaves),
        fix=fix,
    )
