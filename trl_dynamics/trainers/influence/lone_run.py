"""The store of a run that tracks no probe set and only records influence: begun, marked in checkpoints, ended."""

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_dynamics.paths.records import probe_set_files
from trl_dynamics.scoring.identity import SAME, SAME_PROBES, model_identity
from trl_dynamics.scoring.setup import LIMITS, changed_fields, describe_origin
from trl_dynamics.store.store import DynamicsStore
from trl_dynamics.tracking.callback import CHECKPOINT_KEY, training_lines
from trl_dynamics.tracking.series import Series
from trl_dynamics.trainers.influence.observed import Observed


class LoneRun(TrainerCallback):
    """Keeps the store of a run without records, as [`ProbeCallback`] does that of a run with records.

    Args:
        trainer ([`~transformers.Trainer`]): Whose run.
        observed ([`Observed`]): Its probe set is copied into the store, and must be the same after a resume.
        method (`str`): `"sft"`, `"dpo"` or `"grpo"`.
    """

    def __init__(self, trainer: Trainer, observed: Observed, method: str):
        args, accelerator = trainer.args, trainer.accelerator
        meta = describe_origin(trainer.model, observed.probe_set, method)
        meta["model"] |= model_identity(trainer.model)
        meta |= {
            "batch_plan": {"fingerprint": observed.encoded.fingerprint, "num_items": len(observed.encoded.items)},
            "mixed_precision": accelerator.mixed_precision,
            "probe_dtype": args.probe_dtype,
            "limits": {name: getattr(args, name) for name in LIMITS},
            "seed": args.seed,
            "num_processes": accelerator.num_processes,
        }
        store = DynamicsStore(args.output_dir)
        self.config = changed_fields(args)
        self.series = Series(
            store,
            meta,
            self.config,
            accelerator,
            args.probe_on_error,
            attachments=probe_set_files(observed.probe_set),
            same=[*SAME, *SAME_PROBES],
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Open the store, or continue it after a checkpoint."""
        mark = state.stateful_callbacks.get(CHECKPOINT_KEY, {}) if state.global_step > 0 else {}
        self.series.begin(state.global_step, mark)
        state.stateful_callbacks[CHECKPOINT_KEY] = self.series.mark()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Bring meta.json up to date."""
        self.series.cost.add(state.global_step, 0.0)
        self.series.write_progress(training_lines(state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Close the store."""
        self.series.end(training_lines(state))
        self.close()

    def close(self) -> None:
        """Let other runs write into the output_dir; to be called however training ends."""
        self.series.close()
