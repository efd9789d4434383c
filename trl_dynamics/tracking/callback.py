"""The tracker inside training: schedule -> engine -> store -> scalars, on every process together."""

import functools
import logging
import math

import pyarrow as pa
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_dynamics.compat import log_apart
from trl_dynamics.paths import metrics
from trl_dynamics.paths.kinds import RECORDS, SAMPLES
from trl_dynamics.paths.records import probe_set_files
from trl_dynamics.paths.samples import sample_scalars
from trl_dynamics.paths.step_table import StepTable
from trl_dynamics.probing.layouts import PaddedLayout
from trl_dynamics.probing.schema import ProbeSet
from trl_dynamics.progress import with_bar
from trl_dynamics.scoring.engine import ProbeEngine
from trl_dynamics.scoring.head_check import confirm_head, settle_head
from trl_dynamics.scoring.identity import SAME, SAME_PROBES, model_identity
from trl_dynamics.scoring.layout_check import settle_layout
from trl_dynamics.scoring.sampling import GreedySampler
from trl_dynamics.scoring.setup import recorded_layout
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking import alerts
from trl_dynamics.tracking.budget import check_budget, is_affordable
from trl_dynamics.tracking.forecast import Forecast
from trl_dynamics.tracking.schedule import Schedule, plan, repeated_steps
from trl_dynamics.tracking.series import Series
from trl_dynamics.tracking.threads import tell_threads

logger = logging.getLogger(__name__)

MODEL_NAME = "policy"
OWN_KEYS = ("probe/", "squeeze/", "samples/")
# Under this name a checkpoint's trainer_state.json says which records are its own.
CHECKPOINT_KEY = "trl_dynamics"


class ProbeCallback(TrainerCallback):
    """Scores a probe set on a schedule and keeps the records.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer whose `model` is scored.
        engine ([`ProbeEngine`]): Holds the encoded probes.
        probe_set ([`ProbeSet`]): Copied into the store.
        store ([`DynamicsStore`]): Where the records go.
        meta (`dict`): What produced the numbers; schedule, cost and status are added here.
        config (`dict`): Resolved arguments, written as config.yaml.
        fallback ([`PaddedLayout`]): For a model that turns out not to allow the engine's layout.
        sampler ([`GreedySampler`], *optional*): Answers prompts whenever the probes are scored.
    """

    def __init__(
        self,
        trainer: Trainer,
        engine: ProbeEngine,
        probe_set: ProbeSet,
        store: DynamicsStore,
        meta: dict,
        config: dict,
        fallback: PaddedLayout,
        sampler: GreedySampler | None = None,
    ):
        check_budget(trainer.args.probe_budget)
        self.trainer, self.engine, self.config, self.fallback = trainer, engine, config, fallback
        self.sampler = sampler
        shown = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
        engine.watch = functools.partial(with_bar, shown=shown)
        meta["model"] |= model_identity(trainer.model)
        self.series = Series(
            store,
            meta,
            config,
            trainer.accelerator,
            trainer.args.probe_on_error,
            attachments=probe_set_files(probe_set),
            same=[*SAME, *SAME_PROBES],
        )
        self._schedule: Schedule | None = None
        self._steps: frozenset[int] = frozenset()
        self._forecast: Forecast | None = None
        self._marks: frozenset[int] = frozenset()
        self._scalars: tuple[int, dict[str, float]] | None = None
        self._running, self._settled = False, False

    @property
    def store(self) -> DynamicsStore:
        """Where the records go."""
        return self.series.store

    @property
    def has_records(self) -> bool:
        """Whether this run has records on disk; to be asked on the main process."""
        return self.series.has_records

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Open the store, or continue it after a checkpoint, and take what is due and not there."""
        resumed, began = state.global_step > 0, self.series.cost.now()
        earlier = self.series.recorded() if resumed else None
        self._schedule = plan(args, state.max_steps, earlier and earlier["schedule"])
        self._steps = self._schedule.steps
        self._settle_layout(earlier and earlier["batch_plan"])
        self.series.meta["batch_plan"] = self.engine.batch_plan
        self.series.meta["schedule"] = self._schedule.description | {"on_save": args.probe_on_save}
        mark = state.stateful_callbacks.get(CHECKPOINT_KEY, {}) if resumed else {}
        self.series.begin(state.global_step, mark, self.series.cost.now() - began)
        self._mark_checkpoints(state)
        self._expect(state)
        if state.is_world_process_zero:
            tell_threads(self.trainer.accelerator.device, self.trainer.accelerator.num_processes)
        self._scalars, self._running = None, True
        # A run that died between a checkpoint and its probe takes the probe when it comes back.
        if self._is_due(state) or (resumed and args.probe_on_save and self._is_affordable(state)):
            self._probe(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Probe where the schedule says so."""
        if state.global_step in self._marks:
            self._say(state, self._forecast.after_step(state.global_step))
        if self._is_due(state):
            self._probe(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Probe what was just saved, unless this step has been probed."""
        if args.probe_on_save and self._is_affordable(state):
            self._probe(state)
        elif state.global_step not in self.series.steps:
            self.series.cost.add(state.global_step, 0.0)
            self._write_progress(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Take the last records of a run that stopped early, close the store and say what was found."""
        # With load_best_model_at_end the model is no longer that of the last step.
        if args.probe_at_end and not args.load_best_model_at_end:
            self._probe(state)
        self._say(state, self._forecast.at_end())
        self._confirm_head()
        self.series.end(training_lines(state))
        self.close()

    def close(self) -> None:
        """Let other runs write into the output_dir; to be called however training ends."""
        self._running = False
        self.series.close()

    def _is_due(self, state: TrainerState) -> bool:
        """Whether this step is to be probed; the same on every process."""
        return state.global_step in self._steps and self._is_affordable(state)

    def _is_affordable(self, state: TrainerState) -> bool:
        """Whether the budget, if there is one, allows a probe now: the main process decides and notes it."""
        share, step, series = self._schedule.limit, state.global_step, self.series
        if share is None or step in series.steps:
            return True
        decisions = series.meta.setdefault("decisions", [])
        if not decisions or decisions[-1]["step"] != step:
            taken = series.decide(
                lambda: is_affordable(
                    series.cost,
                    share,
                    step=step,
                    max_steps=state.max_steps,
                    scheduled=self._steps,
                    decisions=decisions,
                )
            )
            decisions.append({"step": step, "taken": taken})
            if not taken:
                self._write_progress(state)
        return decisions[-1]["taken"]

    def scalars_now(self, state: TrainerState) -> dict[str, float]:
        """The probe scalars of the model as it is, scored now unless this step has been; all processes together."""
        if self._running and state.global_step not in self.series.steps:
            self._probe(state)
        if self._running and self._scalars is not None and self._scalars[0] == state.global_step:
            return self._scalars[1]
        # Before and after training there is no series to add to, and the weights may be those of any step.
        return self._measure(state.global_step)[-1] | self._answer(state.global_step)[1]

    def _probe(self, state: TrainerState) -> None:
        step, series = state.global_step, self.series
        if step in series.steps:
            return
        began = series.cost.now()
        rows, star_ids, table, scalars = self._measure(step)
        samples, answered = self._answer(step)
        scalars |= answered
        if series.baseline is None:
            series.baseline, series.star_ids = table, star_ids
            series.meta["baseline_step"] = step
        decisions = series.meta.get("decisions")
        if decisions and decisions[-1]["step"] == step and not decisions[-1]["taken"]:
            # An evaluation, or the end, asked for what the budget had said no to.
            decisions[-1] |= {"taken": True, "affordable": False}
        series.add(rows, step, samples)
        news = series.look(table, samples)
        self._mark_checkpoints(state)
        seconds = series.cost.now() - began
        series.cost.add(step, seconds)
        self._scalars = step, scalars
        log_apart(self.trainer, scalars | {"probe/seconds": seconds})
        self._write_progress(state)
        if state.is_world_process_zero:
            logger.info(console_line(step, scalars))
            # After meta.json says so: a run that dies here and comes back does not tell it again.
            if self.trainer.args.probe_alerts:
                alerts.tell(news, step, self.trainer.args.report_to)
        self._say(state, self._forecast.after_scoring(step, seconds))

    def _measure(self, step: int) -> tuple[pa.Table, list[list[int]], StepTable, dict[str, float]]:
        """Records of the model as it is, its y* ids, the records once more as a table, and its scalars."""
        if not self._settled:
            self._settle_layout(None)
        baseline = self.series.baseline
        scores = self.engine.score(self.trainer.model, self.series.star_ids)
        num_rows = len(scores.columns["probe_id"])
        rows = RECORDS.table({"model": [MODEL_NAME] * num_rows, "step": [step] * num_rows} | scores.columns)
        table = StepTable.of(rows, self.series.meta["model"]["vocab_size"])
        start = table if baseline is None or baseline.step == step else baseline
        return rows, scores.star_ids, table, metrics.step_scalars(start, table)

    def _answer(self, step: int) -> tuple[pa.Table | None, dict[str, float]]:
        """Greedy answers of the model as it is with their scalars, where any were asked for."""
        if self.sampler is None:
            return None, {}
        columns = self.sampler.sample(self.trainer.model)
        num_rows = len(columns["probe_id"])
        keys = {"model": [MODEL_NAME] * num_rows, "step": [step] * num_rows}
        rows = SAMPLES.table(keys | columns)
        return rows, sample_scalars(rows.drop_columns(["token_ids", "text"]).to_pandas())

    def _settle_layout(self, plan: dict | None) -> None:
        """Decide on the batches before the first scoring: those of the run that goes on, else what a check allows."""
        args = self.trainer.args
        if plan is not None:
            self.engine.use(recorded_layout(plan, args, self.fallback))
        required = args.probe_layout == "shared_prefix"
        settle_head(self.engine, self.trainer.model, self.fallback, required=required)
        if plan is None:
            settle_layout(self.engine, self.trainer.model, self.fallback, required=required)
        self._settled = True

    def _confirm_head(self) -> None:
        """Warn at the end if the model has changed so that the stats head no longer gives its log-probabilities."""
        apart = confirm_head(self.engine, self.trainer.model) if self._settled else None
        if apart is not None and self.trainer.is_world_process_zero():
            logger.warning(
                f"the model has changed in training: log-probabilities of its own logits now differ by up to "
                f"{apart:.2g} nats from those that were recorded. Score the checkpoints anew with `trl-dynamics track`"
            )

    def _write_progress(self, state: TrainerState) -> None:
        self.series.write_progress(training_lines(state))

    def _mark_checkpoints(self, state: TrainerState) -> None:
        state.stateful_callbacks[CHECKPOINT_KEY] = self.series.mark()

    def _expect(self, state: TrainerState) -> None:
        """Count the scorings to come, for the forecast of their cost."""
        args, due = self.trainer.args, set(self._steps)
        if args.probe_on_save:
            due |= repeated_steps(args.save_strategy, state.save_steps, state.max_steps, state.num_train_epochs)
        if args.probe_on_evaluate:
            due |= repeated_steps(args.eval_strategy, state.eval_steps, state.max_steps, state.num_train_epochs)
        self._forecast = Forecast(self.series.cost, self._schedule, due, state.global_step, state.max_steps)
        self._marks = self._forecast.marks

    @staticmethod
    def _say(state: TrainerState, message: tuple[int, str] | None) -> None:
        if message is not None and state.is_world_process_zero:
            logger.log(*message)


def console_line(step: int, scalars: dict[str, float]) -> str:
    """One probe in one line: what happens to chosen, rejected, likeliest tokens and other fluent answers, in nats.

    Args:
        step (`int`): Optimiser steps done.
        scalars (`dict[str, float]`): What [`metrics.step_scalars`] gave.
    """
    shown = {
        "chosen": "probe/chosen/logp_mean",
        "rejected": "probe/rejected/logp_mean",
        "argmax": "squeeze/argmax_logp",
        "other fluent answers since start": "squeeze/other_fluent_logp",
        "entropy": "squeeze/entropy",
    }
    known = {label: scalars[key] for label, key in shown.items() if key in scalars}
    parts = [f"{label} {'not finite' if math.isnan(value) else f'{value:+.3f}'}" for label, value in known.items()]
    share = scalars.get(metrics.NOT_FINITE, 0.0)
    lost = f"; {share:.0%} of the scored answers are NaN or infinite" if share else ""
    return f"probe at step {step}: {', '.join(parts)} (nats per token){lost}"


def training_lines(state: TrainerState) -> list[dict]:
    """The lines of the trainer's log history without those that hold nothing but probe scalars."""
    return [entry for entry in state.log_history if not is_own_line(entry)]


def is_own_line(entry: dict) -> bool:
    """Whether a line of the trainer's log history holds nothing but probe scalars."""
    return all(key.startswith(OWN_KEYS) or key in ("step", "epoch", "num_input_tokens_seen") for key in entry)
