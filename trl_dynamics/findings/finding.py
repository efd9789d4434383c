"""What a finding is: its severity and its parts."""

from collections.abc import Iterable
from dataclasses import dataclass, field

INFO, WARNING, ALERT = "info", "warning", "alert"
SEVERITIES = (ALERT, WARNING, INFO)


@dataclass(frozen=True)
class Finding:
    """One thing that the records of a run say.

    Args:
        name (`str`): Stable identifier, e.g. `squeezing`.
        severity (`str`): `info`, `warning` or `alert`.
        title (`str`): The finding in a few words.
        text (`str`): What happened, with numbers, in plain language.
        evidence (`dict[str, float]`): The numbers the rule looked at.
        rule (`str`): The exact rule with its thresholds.
        remedy (`str`): What to do.
    """

    name: str
    severity: str
    title: str
    text: str
    evidence: dict[str, float] = field(default_factory=dict)
    rule: str = ""
    remedy: str = ""


def by_severity(found: Iterable[Finding]) -> list[Finding]:
    """The most severe first; among equals the order stays."""
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
