"""Which backend predicts the steps of a trainer: the one place that chooses."""

from accelerate import DistributedType
from transformers import Trainer

from trl_dynamics.trainers.influence.backend import Backend
from trl_dynamics.trainers.influence.dense import Dense

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def choose_backend(trainer: Trainer) -> Backend:
    """The backend for how this trainer keeps its weights.

    Raises:
        ValueError: If they are split over processes, or the model or its precision is none to predict steps of.
    """
    kind = trainer.accelerator.distributed_type
    if kind in _SHARDED:
        raise ValueError(
            f"akg_every needs whole weights, gradients and optimiser states on every process, which {kind.value} "
            "splits: train data parallel (DDP), or leave akg_every out and look at single steps from the checkpoints "
            "later with `trl-dynamics akg`"
        )
    return Dense(trainer)
