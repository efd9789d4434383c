"""Alerts: findings about a run that is still training, each reported once, on the console and to trackers.

A finding is reported when its rule fires at two recorded steps in a row, each compared with the start; at one step
where the rule says that this is enough. Information is never an alert. Only what is in memory is judged.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from types import ModuleType

from trl_dynamics import chapters
from trl_dynamics.findings.chapter import Chapter
from trl_dynamics.findings.finding import ALERT, INFO, Finding, by_severity
from trl_dynamics.findings.rules import Run

logger = logging.getLogger(__name__)


class Watch:
    """Judges every step that a chapter records, as it comes.

    Args:
        chapter ([`Chapter`]): Whose rules judge; one that has a live subject.
        run ([`Run`]): How the run trains; decides which rules apply.
        told (`Iterable[str]`, *optional*): Names of findings that this run has reported already.
    """

    def __init__(self, chapter: Chapter, run: Run, told: Iterable[str] = ()):
        self.chapter, self.run, self.told = chapter, run, set(told)
        self._live = chapter.live()
        self._held: set[str] = set()

    def add(self, *rows) -> list[Finding]:
        """Findings that fire at this step as at the one before, or at this one where that is enough, and were not told
        yet, the most severe first.

        Args:
            rows: Of the step, as the chapter's live subject takes them.
        """
        subject, run = self._live.add(*rows), Run(self.run.method, self.run.meta)
        firing = [(rule, rule(subject, run)) for rule in self.chapter.rules.values()]
        news = {
            finding.name + rule.phase(subject, run): (rule, finding)
            for rule, finding in firing
            if finding is not None and finding.severity != INFO
        }
        untold = {key: pair for key, pair in news.items() if not {key, pair[1].name} & self.told}
        standing = {key: found for key, (rule, found) in untold.items() if key in self._held or rule.at_once}
        self._held = set(news)
        self.told |= set(standing)
        return by_severity(standing.values())

    def see(self, *rows) -> None:
        """Look at a step that an earlier part of the run has recorded: its findings are still to be reported."""
        told = set(self.told)
        self.add(*rows)
        self.told = told


def tell(found: list[Finding], step: int, report_to: Iterable[str]) -> None:
    """Warn of findings on the console, and raise alerts in the trackers of `report_to` that take them.

    A tracker is imported only if `report_to` names it and it is installed. A trackio that has no alerts yet and a W&B
    without an active run are left out in silence; a tracker that fails is warned about, and training goes on.

    Args:
        found (`list[Finding]`): What stands since `step`.
        step (`int`): The probing step.
        report_to (`Iterable[str]`): Names of trackers, as in `TrainingArguments`.
    """
    senders = {name: SENDERS[name] for name in report_to if name in SENDERS} if found else {}
    trackers = {name: module for name in senders if (module := _imported(name)) is not None}
    rules = [rule for chapter in chapters.load_all() for rule in chapter.rules.values()]
    at_once = {name for rule in rules if rule.at_once for name in rule.gives}
    for finding in found:
        since = "" if finding.name in at_once else ", as at the probing step before"
        text = f"At step {step}{since}: {finding.title}. {finding.text}"
        logger.warning(f"{finding.severity}: {text}")
        for name, module in trackers.items():
            try:
                senders[name](module, finding, f"{text} What to do: {finding.remedy}")
            except Exception as error:  # whatever a tracker's service may raise is no reason to end a training run
                logger.warning(f"{name} did not take the alert {finding.name!r}: {error}")


def title(finding: Finding) -> str:
    """The finding's name in words: W&B takes titles of less than 64 characters and drops repeated ones."""
    return finding.name.replace("_", " ")


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name) if importlib.util.find_spec(name) else None
    except Exception as error:  # its import may fail in any way
        logger.warning(f"no alerts go to {name}, which cannot be imported: {error}")
        return None


def _to_wandb(wandb: ModuleType, finding: Finding, text: str) -> None:
    if wandb.run is not None:
        wandb.run.alert(title=title(finding), text=text, level="ERROR" if finding.severity == ALERT else "WARN")


def _to_trackio(trackio: ModuleType, finding: Finding, text: str) -> None:
    if hasattr(trackio, "alert"):
        levels = trackio.AlertLevel
        level = levels.ERROR if finding.severity == ALERT else levels.WARN
        trackio.alert(title=title(finding), text=text, level=level)


SENDERS: dict[str, Callable[[ModuleType, Finding, str], None]] = {"wandb": _to_wandb, "trackio": _to_trackio}
