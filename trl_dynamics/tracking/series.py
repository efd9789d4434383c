"""The records of one run as its training sees them: begun or continued, added to, ended; all processes agree.

Only the main process touches the store. What it read, or why it failed, reaches every process, and so does the choice
of what a failed write does: with `on_error="warn"` it is told and training goes on, with `"stop"` every process stops.
"""

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
from accelerate.utils import broadcast_object_list

from trl_dynamics.findings.finding import INFO, Finding
from trl_dynamics.findings.rules import Run
from trl_dynamics.findings.verdicts import by_model, calm_of, findings_of, judge, summary_text
from trl_dynamics.paths.chapter import CHAPTER
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import read_baseline, read_records, write_baseline
from trl_dynamics.paths.samples import NUMBERS
from trl_dynamics.paths.step_table import StepTable, split_frame
from trl_dynamics.store.aside import command_of
from trl_dynamics.store.identity import Same
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.alerts import Watch
from trl_dynamics.tracking.cost import CostLedger
from trl_dynamics.tracking.schedule import DEFAULT_EVERY

logger = logging.getLogger(__name__)

ON_ERROR = ("warn", "stop")


@dataclass
class Position:
    """Where a series stands when training begins; the same on every process.

    Args:
        run_id (`str`): Of the run that the records are of.
        star_ids (`list[list[int]]` or `None`): The frozen y*, once there are records.
        baseline (`pandas.DataFrame` or `None`): The first records.
        steps (`set[int]`): Steps that have records.
        meta (`dict`): What meta.json said when the series was left.
    """

    run_id: str
    star_ids: list[list[int]] | None
    baseline: pd.DataFrame | None
    steps: set[int]
    meta: dict


class Series:
    """One run's records.

    Args:
        store ([`DynamicsStore`]): Where they go.
        meta (`dict`): What produced the numbers; schedule, cost and status are added here.
        config (`dict`): Resolved arguments, written as config.yaml.
        accelerator ([`~accelerate.Accelerator`]): The processes that must agree.
        on_error (`str`): `"warn"` or `"stop"`.
        attachments (`Mapping[str, bytes]`): Files of a new store, see [`DynamicsStore.attach`].
        same (`list[Same]`): Entries of `meta` that must be those of the run that goes on; more may be added.
    """

    def __init__(
        self,
        store: DynamicsStore,
        meta: dict,
        config: dict,
        accelerator,
        on_error: str,
        *,
        attachments: Mapping[str, bytes],
        same: list[Same],
    ):
        if on_error not in ON_ERROR:
            raise ValueError(f"probe_on_error is {on_error!r}, expected one of {', '.join(ON_ERROR)}")
        self.store, self.meta, self.config = store, meta, config
        self.attachments, self.same = attachments, same
        self.accelerator, self.on_error, self._asked = accelerator, on_error, meta.get("samples")
        self.cost = CostLedger()
        self.star_ids: list[list[int]] | None = None
        self.baseline: StepTable | None = None
        self.watch = Watch(CHAPTER, Run.of(meta))
        self._latest: pd.DataFrame | None = None
        self.steps: set[int] = set()
        self._inherited: set[str] = set()
        self._is_open, self._failing = False, set()
        self._prepare: Callable[[], None] = lambda: None

    @property
    def has_records(self) -> bool:
        """Whether the store holds records of this run; to be asked on the main process."""
        return self._is_open and bool(self.store.steps(RECORDS))

    def begin(self, step: int, mark: dict, setup_seconds: float = 0.0) -> None:
        """Start a new series, or continue one after the checkpoint of `step`.

        Args:
            step (`int`): Optimiser steps done so far.
            mark (`dict`): What [`mark`] gave when the checkpoint was written, empty for a new run.
            setup_seconds (`float`): What probing took before this call.

        Raises:
            ValueError: If there is nothing to continue, something else made it, or another run is writing there.
        """
        self._is_open, self._failing = False, set()
        for name in ("decisions", "resumed_at", "baseline_step", "alerts", *self._inherited):
            self.meta.pop(name, None)
        part = {"after_step": step, "num_processes": self.accelerator.num_processes}
        self.meta |= {"run_id": mark.get("run_id"), "status": "running", "parts": [part], "lost_steps": []}
        self.meta["samples"] = self._asked
        self.cost.restart(step, [])
        self._note_cost()
        position = self._on_main(lambda: self._begin(step, mark))
        self.star_ids, self.steps = position.star_ids, position.steps
        self.baseline = None if position.baseline is None else self.table(position.baseline)
        self.meta["run_id"] = position.run_id
        if step > 0:
            self._take_over(position.meta, step)
        self._begin_watch()
        self.cost.restart(
            step, _timeline(position.meta, step), setup_seconds + position.meta.get("setup_seconds", 0.0)
        )
        self._note_cost()

    def _take_over(self, earlier: dict, step: int) -> None:
        """What meta.json said as of the checkpoint's step."""
        self.meta |= {name: earlier[name] for name in ("created", "baseline_step", "alerts") if name in earlier}
        # What an earlier part recorded stays described where this one records none, but not in a new run.
        self._inherited = {"akg"} & (set(earlier) - set(self.meta))
        self.meta |= {name: earlier[name] for name in self._inherited}
        # Answers that were taken are described, and not mixed with others later, where this part takes none.
        self.meta["samples"] = self._asked or earlier.get("samples")
        # Each part of a run says how many processes took its records.
        self.meta["parts"] = [p for p in earlier.get("parts", []) if p["after_step"] < step] + self.meta["parts"]
        self.meta["lost_steps"] = [lost for lost in earlier.get("lost_steps", []) if lost <= step]
        self.meta["resumed_at"] = [*earlier.get("resumed_at", []), step]
        if "decisions" in earlier:
            self.meta["decisions"] = [choice for choice in earlier["decisions"] if choice["step"] <= step]

    def _begin_watch(self) -> None:
        """What was told stays told, whatever step the run goes on from; what fires at its last records, against the
        start, is seen."""
        told = [alert["name"] for alert in self.meta.get("alerts", [])]
        self.watch = Watch(CHAPTER, Run.of(self.meta), told)
        if self.baseline is not None and self.accelerator.is_main_process:
            tables = [self.baseline, *([] if self._latest is None else [self.table(self._latest)])]
            for table in tables:
                self.watch.see(table, self.store.read(SAMPLES, {table.step}, NUMBERS))
        self._latest = None

    def table(self, records: pd.DataFrame) -> StepTable:
        """Records of one step of this run, as metrics and findings take them."""
        return split_frame(records, self.meta["model"]["vocab_size"])[0]

    def look(self, table: StepTable, samples: pa.Table | None = None) -> list[Finding]:
        """Findings that stand with the records of this step, and its greedy answers if any were taken, and were not
        told before; all processes together."""
        return self._on_main(lambda: self._look(table, samples))

    def _look(self, table: StepTable, samples: pa.Table | None) -> list[Finding]:
        wanted = [*SAMPLES.keys, *NUMBERS]
        found = self.watch.add(table, None if samples is None else samples.select(wanted).to_pandas())
        news = [{"name": finding.name, "severity": finding.severity, "step": table.step} for finding in found]
        self.meta["alerts"] = [*self.meta.get("alerts", []), *news]
        return found

    def mark(self) -> dict:
        """What a checkpoint keeps, to tell on a resume whether the records in its place are its own."""
        return {"run_id": self.meta["run_id"], "has_store": self._is_open}

    def add(self, table: pa.Table, step: int, samples: pa.Table | None = None) -> None:
        """Write the records of one step, and greedy answers if any were taken; y* before the first ones."""

        def write() -> None:
            self._reopen()
            if not self.store.steps(RECORDS):
                write_baseline(self.store, self.star_ids)
            self.store.write(step, {RECORDS: table, SAMPLES: samples})
            self.meta["lost_steps"] = [lost for lost in self.meta["lost_steps"] if lost != step]
            if "records" in self._failing:
                logger.warning(f"probe records are written again, from step {step} on")
            self._failing.discard("records")

        self.steps.add(step)
        self._on_main(write, lost=f"the records of step {step}", what="records", lost_step=step)

    def write(self, write: Callable[[], object], lost: str) -> None:
        """Let the main process write something beside the records; `lost` names it, should that fail."""

        def work() -> None:
            self._reopen()
            write()
            self._failing.discard("more")

        self._on_main(work, lost=lost, what="more")

    def recorded(self) -> dict | None:
        """Batch plan and schedule of the run that is about to be continued; None where there are none to read."""
        return self._on_main(self._recorded)

    def _recorded(self) -> dict | None:
        if not self.store.exists:
            return None
        earlier = self.store.read_meta()
        if command_of(earlier):
            return None  # which is refused when the series begins
        schedule = earlier.get("schedule", {})
        if "every" not in schedule:
            # Older versions kept no spacing: config.yaml has the one that was given, else it was this default.
            every = (self.store.read_config() or {}).get("probe_every", DEFAULT_EVERY)
            schedule = {"budget": None} | schedule | {"every": every, "thinned": False}
        return {"batch_plan": earlier["batch_plan"], "schedule": schedule}

    def decide(self, choose: Callable[[], bool]) -> bool:
        """A choice that the main process makes for all."""
        return self._on_main(choose)

    def write_progress(self, log: list[dict]) -> None:
        """Bring meta.json and the copy of the trainer's log up to date."""

        def write() -> None:
            if self._is_open:
                self.store.write_meta(self.meta)
                self.store.write_trainer_log(log)
                self._failing.discard("progress")

        self._note_cost()
        self._on_main(write, lost="an update of meta.json and trainer_log.json; the records are there")

    def end(self, log: list[dict]) -> None:
        """Close the series: status, fewer files, what was found, where the records are."""
        self.meta["status"] = "finished"
        self.write_progress(log)
        self._on_main(self._end, lost="the summary of what was found")

    def close(self) -> None:
        """Let others write there; to be called however training ends."""
        self.store.close()

    def _begin(self, step: int, mark: dict) -> Position:
        self._prepare = lambda: None
        failure = self._try_to_open()
        position, prepare = Position("", None, None, set(), {}), self._create
        if step > 0 and (mark.get("has_store", True) or self._is_own_store()):
            earlier = self.store.check_resume(self.meta, self.same)
            position, prepare = self._read(step, earlier), lambda: self.store.drop_after(step)
        elif step > 0:
            logger.warning(
                f"no records could be written before step {step}: they begin here, and so does every change"
            )
        position.run_id = self.meta["run_id"] = self.meta["run_id"] or position.run_id or uuid.uuid4().hex
        self._prepare, self._is_open = prepare, False
        if failure := failure or self._try_to_open():
            self._warn(failure, "nothing yet")
        return position

    def _try_to_open(self) -> OSError | None:
        try:
            self._reopen()
        except OSError as error:
            if self.on_error == "stop":
                raise
            return error
        return None

    def _create(self) -> None:
        self.store.create(self.meta, self.config, self.attachments)

    def _is_own_store(self) -> bool:
        return self.store.exists and self.store.read_meta().get("run_id") == self.meta["run_id"]

    def _read(self, step: int, earlier: dict) -> Position:
        run_id, steps = earlier.get("run_id", ""), {other for other in self.store.steps(RECORDS, 0) if other <= step}
        if not steps:
            return Position(run_id, None, None, steps, {k: v for k, v in earlier.items() if k != "baseline_step"})
        self._latest = read_records(self.store, {max(steps)}) if len(steps) > 1 else None
        return Position(run_id, read_baseline(self.store), read_records(self.store, {min(steps)}), steps, earlier)

    def _reopen(self) -> None:
        if not self._is_open:
            self.store.open()
            self._prepare()
            self._is_open = True

    def _note_cost(self) -> None:
        self.meta["timeline"], self.meta["setup_seconds"] = self.cost.timeline, self.cost.setup_seconds
        self.meta["probe_seconds"], self.meta["train_seconds"] = self.cost.probe_seconds, self.cost.train_seconds

    def _end(self) -> None:
        if self.has_records:
            try:
                self.store.compact()
            except (OSError, ValueError) as error:
                logger.warning(f"the record files stay as many as they are: {error}")
            if lost := self.meta["lost_steps"]:
                logger.warning(f"the records of {len(lost)} probing steps could not be written: {lost}")
        for judged in by_model(judge(self.store)).values() if self._is_open else ():
            found = findings_of(judged)
            self._tell(found, summary_text(found, self.store.output_dir.name, calm_of(judged)))

    def _tell(self, found: list[Finding], text: str) -> None:
        harmful = any(finding.severity != INFO for finding in found)
        (logger.warning if harmful else logger.info)(text)
        logger.info(f"records: {self.store.root}")
        logger.info(f"page:    trl-dynamics report {self.store.output_dir} -o report.html")

    def _on_main(
        self,
        work: Callable[[], object],
        lost: str | None = None,
        what: str = "progress",
        lost_step: int | None = None,
    ) -> object:
        """Run `work` on the main process; its result, or its error, reaches every process.

        With `lost`, an error in the way of writing is one that `on_error` decides about; `what` is the kind of it.
        """
        outcome: list = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = work()
            except Exception as error:
                if lost and self.on_error == "warn" and isinstance(error, OSError | ValueError):
                    self._warn(error, lost, what)
                    self.meta["lost_steps"] += [] if lost_step is None else [lost_step]
                else:
                    outcome[1] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _warn(self, error: Exception, lost: str, what: str = "records") -> None:
        """Tell a failure once; until the same is written again, later ones only in short."""
        if self._failing & {what, "records"}:
            logger.info(f"lost: {lost} ({error})")
            return
        self._failing.add(what)
        logger.warning(
            f"{error}. Lost: {lost}. Training goes on and every later probe tries again (probe_on_error='stop' would "
            "end the run instead)"
        )


def _timeline(earlier: dict, step: int) -> list[list[float]]:
    """The costs up to `step`; of a store that kept totals only, these as one entry."""
    if "timeline" in earlier:
        return [entry for entry in earlier["timeline"] if entry[0] <= step]
    if "probe_seconds" in earlier:
        return [[min(step, earlier.get("baseline_step", 0)), earlier["probe_seconds"], earlier["train_seconds"]]]
    return []
