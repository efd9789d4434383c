"""What TRL's and transformers' trainers do that their public API does not say."""

from accelerate import Accelerator, DistributedType
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers import Trainer as HFTrainer
from trl import RichProgressCallback
from trl.trainer.utils import add_fused_lm_head

# What TRL's DPO asks its fused head for, and what its loss and metrics read.
DPO_HEAD_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
DISPLAYS = (PrinterCallback, ProgressCallback, RichProgressCallback)


def shards_or_casts_parameters(accelerator: Accelerator, *, half_weights: bool) -> bool:
    """Whether FSDP or DeepSpeed decides what dtype a forward computes in, and it is not float32."""
    wrapped = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return wrapped and (half_weights or accelerator.mixed_precision != "no")


def add_sum_sq_to_head(base: PreTrainedModel) -> None:
    """Put a fused head over the one of TRL's DPO whose output also has `log_sum_sq_probs`; the rest is the same bits.

    Calls without `fused_lm_head=True` go to the forward that was there.
    """
    add_fused_lm_head(base, outputs=(*DPO_HEAD_OUTPUTS, "log_sum_sq_probs"))


def log_apart(trainer: HFTrainer, scalars: dict[str, float]) -> None:
    """Log `scalars` as a line of their own: into the log history and to trackers, not to the progress display.

    TRL's `log` would average and clear the training metrics collected so far, and any log event resets the flag that
    asks for the training line of this very step; both are left as they were.
    """
    handler, should_log = trainer.callback_handler, trainer.control.should_log
    everyone = handler.callbacks
    handler.callbacks = [callback for callback in everyone if not isinstance(callback, DISPLAYS)]
    try:
        HFTrainer.log(trainer, dict(scalars))
    finally:
        handler.callbacks = everyone
        trainer.control.should_log = should_log


def log_metric(trainer: HFTrainer, mode: str, name: str, value: float, *, replace: bool = False) -> None:
    """Give TRL a value of a metric; the next log line has the mean of all values since the last one.

    Args:
        trainer ([`~transformers.Trainer`]): One of TRL's.
        mode (`str`): `"train"` or `"eval"`.
        name (`str`): The metric's key, without the `eval_` that TRL puts in front.
        value (`float`): One value of it.
        replace (`bool`): Whether it takes the place of the values since the last log line.
    """
    values = trainer._metrics[mode][name]
    if replace:
        values.clear()
    values.append(value)


def waits_for_log(trainer: HFTrainer, mode: str, name: str) -> bool:
    """Whether a metric has a value that no log line has shown yet."""
    return bool(trainer._metrics[mode].get(name))
