"""Findings of `lint` and `report` about layers, and how they are printed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


class Finding(NamedTuple):
    """A problem of a layer, and what to do about it.

    Attributes:
      path: the path of the layer, joined by slashes: `"encoder/BatchNorm_0"`.
      rule: the name of the problem: `"dead-channels"`.
      severity: `"error"` if it breaks training or inference, `"warning"` if it costs accuracy,
        `"note"` otherwise.
      message: what was found, with its values.
      advice: what to do about it, in one line.
    """

    path: str
    rule: str
    severity: Severity
    message: str
    advice: str


def show_findings(findings: Collection[Finding]) -> str:
    """Returns the findings and their number as text."""
    said = [line for group in grouped(findings) for line in lines_of(group)]
    return "\n".join([*said, counted(findings) or "nothing found"])


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Returns the findings, grouped by their advice."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.rule, finding.advice), []).append(finding)
    return list(groups.values())


def lines_of(group: Sequence[Finding]) -> list[str]:
    """Returns the lines about findings with one advice, and an empty line."""
    first = group[0]
    messages = [f"  {finding.path}: {finding.message}" for finding in group]
    return [f"{first.severity}: {first.rule}", *messages, f"  -> {first.advice}", ""]


def counted(findings: Collection[Finding]) -> str:
    """Returns how many findings of each severity there are; an empty string without any."""
    counts = {severity: 0 for severity in SEVERITIES}
    for finding in findings:
        counts[finding.severity] += 1
    parts = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    return ", ".join(parts)
