"""Alerts: a finding that stands while a run is still training is told once, on the console and where trackers can.

A finding stands when its rule fires at two probing steps in a row, each against the start. What is NaN or infinite
does not heal, and stands at once. Information alone is never an alert. Only what is in memory is looked at: the start,
the step before and this one, not the trainer's log.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable
from types import ModuleType

import pandas as pd

from trl_dynamics.paths import rules
from trl_dynamics.paths.degeneration import got_worse
from trl_dynamics.paths.rules import ALERT, INFO, Finding
from trl_dynamics.paths.samples import Samples
from trl_dynamics.paths.step_table import StepTable
from trl_dynamics.paths.summary import StepSummary, Summary, summarise_step

logger = logging.getLogger(__name__)

AT_ONCE = ("not_finite",)


class Watch:
    """Looks at every probing step as it comes.

    Args:
        method (`str`): How the run trains; decides which rules apply.
        told (`Iterable[str]`, *optional*): Names of findings that this run has told already.
    """

    def __init__(self, method: str, told: Iterable[str] = ()):
        self.method, self.told = method, set(told)
        self._kept: list[tuple[StepTable, StepSummary, pd.DataFrame | None]] = []
        self._held: set[str] = set()

    def add(self, table: StepTable, samples: pd.DataFrame | None = None) -> list[Finding]:
        """Findings that fire at this step as at the one before, or at this one where that is enough, and were not told
        yet, the most severe first.

        Args:
            table ([`StepTable`]): The step's records.
            samples (`pandas.DataFrame`, *optional*): Its greedy answers, with the columns of [`samples.NUMBERS`].
        """
        start = self._kept[0][0] if self._kept else table
        self._kept = [*self._kept, (table, summarise_step(start, table), samples)]
        tables, parts, answers = zip(*self._kept, strict=True)
        taken = [rows for rows in answers if rows is not None and len(rows)]
        own = Samples(pd.concat(taken, ignore_index=True)) if taken else None
        summary = Summary(list(parts), start, {kept.step: kept for kept in tables}.__getitem__, own)
        firing = [f for f in rules.find(summary, {"method": self.method}) if f.severity != INFO]
        news = {_news(f, summary, self.method): f for f in firing}
        untold = {key: f for key, f in news.items() if not {key, f.name} & self.told}
        standing = [f for key, f in untold.items() if key in self._held or f.name in AT_ONCE]
        self._held = set(news)
        self.told |= {key for key, finding in untold.items() if finding in standing}
        self._kept = [self._kept[0], *self._kept[1:][-1:]]
        return standing

    def see(self, table: StepTable, samples: pd.DataFrame | None = None) -> None:
        """Look at a step that an earlier part of the run has recorded: its findings are still to be reported."""
        told = set(self.told)
        self.add(table, samples)
        self.told = told


def _news(finding: Finding, summary: Summary, method: str) -> str:
    """The key under which a finding is reported once: its name, but loops since the start have a key of their own."""
    was_so = finding.name == "degeneration" and not got_worse(summary, method)
    return f"{finding.name} from the start" if was_so else finding.name


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
    for finding in found:
        since = "" if finding.name in AT_ONCE else ", as at the probing step before"
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
