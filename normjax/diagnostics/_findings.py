"""What `report` and `lint` have to say about a layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


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


def show_findings(findings: Iterable[Finding]) -> str:
    """Returns the findings as text, those together that have their advice in common, and how many there are."""
    findings = tuple(findings)
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.rule, finding.advice), []).append(finding)
    lines = []
    for (severity, rule, advice), group in groups.items():
        said = [f"  {finding.path}: {finding.message}" for finding in group]
        lines += [f"{severity}: {rule}", *said, f"  -> {advice}", ""]
    counts = [(sum(finding.severity == severity for finding in findings), severity) for severity in SEVERITIES]
    summary = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for count, severity in counts if count)
    return "\n".join([*lines, summary or "nothing found"])
