"""What `report` and `lint` have to say about a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


class Finding(NamedTuple):
    """Something that a layer suffers from, and what to do about it.

    Attributes:
      path: of the layer, its parts joined by slashes: `"encoder/BatchNorm_0"`.
      rule: the name of what was looked for: `"dead-channels"`.
      severity: `"error"` for what breaks training or inference, `"warning"` for what costs
        accuracy, else `"note"`.
      message: what was seen, with its values.
      advice: what to do about it, in one line.
    """

    path: str
    rule: str
    severity: Severity
    message: str
    advice: str


def show_findings(findings: Collection[Finding]) -> str:
    """Returns the findings as text, and how many there are."""
    said = [line for group in grouped(findings) for line in lines_of(group)]
    return "\n".join([*said, counted(findings) or "nothing found"])


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Returns the findings, those together that have their advice in common."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.rule, finding.advice), []).append(finding)
    return list(groups.values())


def lines_of(group: Sequence[Finding]) -> list[str]:
    """Returns the lines about findings with one advice, the last of them empty."""
    heading = f"{group[0].severity}: {group[0].rule}"
    return [
        heading,
        *(f"  {finding.path}: {finding.message}" for finding in group),
        f"  -> {group[0].advice}",
        "",
    ]


def counted(findings: Collection[Finding]) -> str:
    """Returns how many findings there are of each severity; nothing for none."""
    counts = [
        (sum(finding.severity == severity for finding in findings), severity)
        for severity in SEVERITIES
    ]
    return ", ".join(
        f"{count} {severity}{'s' * (count > 1)}" for count, severity in counts if count
    )
