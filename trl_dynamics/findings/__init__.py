"""findings: what a finding is, what a rule is, and the one judge over all chapters; no subject is known here.

finding.py: a finding and its severities. rules.py: a rule, and what it may know of the run. effects.py: how sure a
change over probes is. chapter.py: what a subject gives to be judged and shown. verdicts.py: every finding of a store.
A rule belongs to the room of its subject. This room may import statistics, store and chapters (names of modules).
"""

from typing import TYPE_CHECKING

from trl_dynamics import lazy

if TYPE_CHECKING:
    from trl_dynamics.findings.chapter import Chapter, Comparison, Overview
    from trl_dynamics.findings.finding import Finding
    from trl_dynamics.findings.rules import Rule, Run, rule
    from trl_dynamics.findings.verdicts import Judged, judge

__getattr__, __dir__, __all__ = lazy.exports(
    __name__,
    {
        "Chapter": "chapter",
        "Comparison": "chapter",
        "Finding": "finding",
        "Judged": "verdicts",
        "Overview": "chapter",
        "Rule": "rules",
        "Run": "rules",
        "judge": "verdicts",
        "rule": "rules",
    },
)
