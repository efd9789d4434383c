"""Steps of what is split over processes: by central differences where weights are, exactly where states alone are."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from transformers import Trainer

from trl_dynamics import stats_head
from trl_dynamics.akg.one_step import CENTRAL_DIFFERENCES, Influence
from trl_dynamics.akg.split import fsdp, zero
from trl_dynamics.akg.split.differences import CentralDifferences, Shards, refuse_rounded_weights
from trl_dynamics.akg.steps import UPDATE, Step, step_of, whole_norm
from trl_dynamics.akg.task import causal_lm_labels, row_of_label
from trl_dynamics.influence.kind import BATCH
from trl_dynamics.trainers.influence.backend import Batch
from trl_dynamics.trainers.influence.dense import Dense


class FullyShardedData:
    """The backend of FSDP2, whose forwards gather the weights: central differences, in float32 alone.

    Args:
        trainer ([`~transformers.Trainer`]): Its weights are moved while observers run, and put back bit for bit.

    Raises:
        ValueError: If it computes in half precision, or hypothetical updates are asked for.
    """

    method, steps_in_backward = CENTRAL_DIFFERENCES, False

    def __init__(self, trainer: Trainer):
        self.trainer, self._distances = trainer, {}
        refuse_half_compute(trainer)
        refuse_rounded_weights(trainer.model)
        others = [name for name in trainer.args.akg_updates if name != BATCH]
        if others:
            raise ValueError(
                f"akg_updates has {others[0]!r}, but where weights are split over processes only '{BATCH}', the step "
                "that training takes, can be predicted: leave akg_updates out, or train data parallel (DDP) or with "
                "ZeRO-2"
            )
        stats_head.install(trainer.model)

    def step(self) -> Step:
        """As in [`Backend`]: this process' pieces of it."""
        parameters = {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        return fsdp.local_step(step_of(gradients, parameters, self.trainer.optimizer, None, None))

    def predict(self, step: Step, observe: Batch) -> Influence:
        """As in [`Backend`]."""
        label_N, item_N = causal_lm_labels(observe), row_of_label(observe)
        # How far to move for each part is kept from one step to the next.
        differences = CentralDifferences(self._pieces(), step, self._distances)
        return differences.predict(lambda: self.logp(observe), label_N, item_N)

    def logp(self, observe: Batch) -> torch.Tensor:
        """As in [`Backend`]."""
        return fsdp.sharded_label_logp(self.trainer.model, observe)

    def _pieces(self) -> Shards:
        return fsdp.fsdp_shards(self.trainer.model)


class ZeroWeights(FullyShardedData):
    """The backend of DeepSpeed ZeRO-3: as that of FSDP2, from the engine's pieces."""

    steps_in_backward = True

    def step(self) -> Step:
        """As in [`Backend`]: this process' pieces of it."""
        return zero.piecewise_step(self.trainer.model_wrapped)

    def before_step(self, call: Callable[[], None]) -> AbstractContextManager:
        """As in [`Backend`]."""
        return zero.before_step(self.trainer.model_wrapped, call)

    def _pieces(self) -> Shards:
        return zero.zero_shards(self.trainer.model_wrapped)


class ZeroStates(Dense):
    """The backend of DeepSpeed ZeRO-1 and ZeRO-2, where weights are whole and states are not: exact, by forward mode.

    Args:
        trainer ([`~transformers.Trainer`]): Its model and engine are read, never written.

    Raises:
        ValueError: As [`Dense`], and if it computes in half precision.
    """

    steps_in_backward = True

    def __init__(self, trainer: Trainer):
        refuse_half_compute(trainer)
        super().__init__(trainer)

    def step(self) -> Step:
        """As in [`Backend`]."""
        return zero.whole_step(self.trainer.model_wrapped)

    def step_on(self, batches: Sequence[Batch]) -> tuple[Step, float, float]:
        """As in [`Backend`]; every process computes the gradient as a whole."""
        gradients, force_norm = self.sft_gradient(batches)
        step = zero.whole_step(self.trainer.model_wrapped, gradients)
        return Step({UPDATE: step.parts[UPDATE]}, step.clip), force_norm, float(whole_norm(gradients))

    def before_step(self, call: Callable[[], None]) -> AbstractContextManager:
        """As in [`Backend`]."""
        return zero.before_step(self.trainer.model_wrapped, call)


def refuse_half_compute(trainer: Trainer) -> None:
    """Refuse a wrapper that computes in half precision whatever the weights' dtype is.

    Raises:
        ValueError: If it does.
    """
    accelerator = trainer.accelerator
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"akg_every under {accelerator.distributed_type.value} needs float32, but mixed precision is "
            f"{accelerator.mixed_precision}: train with bf16=False and fp16=False, or data parallel (DDP), or leave "
            "akg_every out and look at single steps from the checkpoints later with `trl-dynamics akg`"
        )
