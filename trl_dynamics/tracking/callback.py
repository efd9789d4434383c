"""The tracker inside training: schedule -> engine -> store -> scalars, on every process together."""

import logging
import time
from collections.abc import Callable

import pandas as pd
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_dynamics.compat import log_apart
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.tracking import findings, metrics
from trl_dynamics.tracking.engine import ProbeEngine
from trl_dynamics.tracking.records import to_table
from trl_dynamics.tracking.schedule import probe_steps
from trl_dynamics.tracking.store import DynamicsStore

logger = logging.getLogger(__name__)

MODEL_NAME = "policy"
OWN_KEYS = ("probe/", "squeeze/")


class ProbeCallback(TrainerCallback):
    """Scores a probe set on a schedule and keeps the records.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose `model` is scored.
        engine ([`ProbeEngine`]): Holds the encoded probes.
        probe_set ([`ProbeSet`]): Copied into the store.
        store ([`DynamicsStore`]): Where the records go.
        meta (`dict`): What produced the numbers; schedule, cost and status are added here.
        config (`dict`): Resolved arguments, written as config.yaml.
    """

    def __init__(
        self,
        trainer: Trainer,
        engine: ProbeEngine,
        probe_set: ProbeSet,
        store: DynamicsStore,
        meta: dict,
        config: dict,
    ):
        self.trainer, self.engine, self.probe_set, self.store = trainer, engine, probe_set, store
        self.meta, self.config = meta, config
        self._steps: frozenset[int] = frozenset()
        self._last_step: int | None = None
        self._star_ids: list[list[int]] | None = None
        self._baseline: pd.DataFrame | None = None
        self._started, self._seconds_before = 0.0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Open the store, or continue it after a checkpoint, and take the baseline."""
        steps = probe_steps(
            state.max_steps,
            args.probe_every,
            log_spaced=args.probe_log_spaced,
            at_start=args.probe_at_start,
            at_end=args.probe_at_end,
        )
        self._steps = frozenset(steps)
        self.meta |= {"status": "running", "schedule": {"steps": steps, "on_save": args.probe_on_save}}
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.meta["probe_seconds"] = 0.0
        self._star_ids, self._baseline, self._last_step = None, None, None
        if state.global_step > 0:
            self._resume(state.global_step)
        else:
            self._on_main(lambda: self.store.create(self.probe_set, self.meta, self.config))
        if state.global_step in self._steps:
            self._probe(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Probe where the schedule says so."""
        if state.global_step in self._steps:
            self._probe(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Probe what was just saved, unless this step has been probed."""
        if args.probe_on_save:
            self._probe(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take the last records of a run that stopped early, close the store and say what was found."""
        # With load_best_model_at_end the model is no longer that of the last step.
        if args.probe_at_end and not args.load_best_model_at_end:
            self._probe(state)
        self.meta |= {"status": "finished"}
        self._on_main(lambda: self._write_progress(state))
        self._on_main(self._report_findings)

    @property
    def train_seconds(self) -> float:
        """Wall time of training without probing, earlier parts of a resumed run included."""
        return self._seconds_before + time.perf_counter() - self._started - self.meta["probe_seconds"]

    def _probe(self, state: TrainerState) -> None:
        if state.global_step == self._last_step:
            return
        began = time.perf_counter()
        scores = self.engine.score(self.trainer.model, self._star_ids)
        num_rows = len(scores.columns["probe_id"])
        keys = {"model": [MODEL_NAME] * num_rows, "step": [state.global_step] * num_rows}
        table = to_table(keys | scores.columns)
        frame = table.to_pandas()
        first = self._baseline is None
        if first:
            self._baseline, self._star_ids = frame, scores.star_ids
            self.meta["baseline_step"] = state.global_step
            self._on_main(lambda: self.store.write_baseline(scores.star_ids))
        self._on_main(lambda: self.store.write_records(table, step=state.global_step))
        self._last_step = state.global_step
        seconds = time.perf_counter() - began
        self.meta["probe_seconds"] += seconds
        scalars = metrics.scalars(frame if first else pd.concat([self._baseline, frame], ignore_index=True))
        log_apart(self.trainer, scalars | {"probe/seconds": seconds})
        self._on_main(lambda: self._write_progress(state))
        if state.is_world_process_zero:
            logger.info(console_line(state.global_step, scalars))

    def _resume(self, step: int) -> None:
        def read() -> tuple:
            self.store.resume(self.probe_set, self.meta["batch_plan"]["fingerprint"], step)
            earlier = self.store.read_meta()
            if not self.store.has_records:
                return None, None, None, earlier
            frame = self.store.read_records()
            baseline = frame[frame["step"] == frame["step"].min()].reset_index(drop=True)
            return self.store.read_baseline(), baseline, int(frame["step"].max()), earlier

        self._star_ids, self._baseline, self._last_step, earlier = self._on_main(read)
        for name in ("created", "probe_seconds", "baseline_step"):
            if name in earlier:
                self.meta[name] = earlier[name]
        self.meta["resumed_at"] = [*earlier.get("resumed_at", []), step]
        self._seconds_before = earlier["train_seconds"] + earlier["probe_seconds"]

    def _write_progress(self, state: TrainerState) -> None:
        self.meta["train_seconds"] = self.train_seconds
        self.store.write_meta(self.meta)
        self.store.write_trainer_log([entry for entry in state.log_history if not is_own_line(entry)])

    def _report_findings(self) -> None:
        if not self.store.has_records:
            return
        found = findings.find(self.store.read_records(), self.meta)
        text = findings.summary_text(found, self.store.output_dir.name)
        harmful = any(finding.severity != "info" for finding in found)
        (logger.warning if harmful else logger.info)(text)

    def _on_main(self, work: Callable[[], object]) -> object:
        """Run `work` on the main process; its result, or its error, reaches every process."""
        accelerator = self.trainer.accelerator
        outcome: list = [None, None]
        if accelerator.is_main_process:
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        if accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def console_line(step: int, scalars: dict[str, float]) -> str:
    """One probe in one line: what happens to chosen, rejected, the likeliest tokens and everybody else, in nats."""
    shown = {
        "chosen": "probe/chosen/logp_mean",
        "rejected": "probe/rejected/logp_mean",
        "argmax": "squeeze/argmax_logp",
        "third parties since start": "squeeze/third_party_logp",
        "entropy": "squeeze/entropy",
    }
    parts = [f"{label} {scalars[key]:+.3f}" for label, key in shown.items() if key in scalars]
    return f"probe at step {step}: {', '.join(parts)} (nats per token)"


def is_own_line(entry: dict) -> bool:
    """Whether a line of the trainer's log history holds nothing but probe scalars."""
    return all(key.startswith(OWN_KEYS) or key in ("step", "epoch", "num_input_tokens_seen") for key in entry)
