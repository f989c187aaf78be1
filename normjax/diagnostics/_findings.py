"""What `report` and `lint` have to say about a layer."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """Something that a layer suffers from, and what to do about it.

    Attributes:
      path: of the layer, its parts joined by slashes: `"encoder/BatchNorm_0"`.
      rule: the name of what was looked for: `"dead-channels"`.
      severity: `"error"` for what breaks training or inference, `"warning"` for what costs accuracy, else `"note"`.
      message: what was seen, with its values.
      advice: what to do about it, in one line.
    """

    path: str
    rule: str
    severity: Severity
    message: str
    advice: str
