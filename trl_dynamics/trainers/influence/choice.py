"""Which backend predicts the steps of a trainer: the one place that chooses."""

from accelerate import DistributedType
from transformers import Trainer

from trl_dynamics.trainers.influence.backend import Backend
from trl_dynamics.trainers.influence.dense import Dense
from trl_dynamics.trainers.influence.sharded import FullyShardedData, ZeroStates, ZeroWeights

_OF_STAGE = {1: ZeroStates, 2: ZeroStates, 3: ZeroWeights}


def choose_backend(trainer: Trainer) -> Backend:
    """The backend for how this trainer keeps its weights.

    Raises:
        ValueError: If that is in a way whose steps are not known, or the model or its precision is none to predict
            steps of.
    """
    accelerator = trainer.accelerator
    kind, what = accelerator.distributed_type, accelerator.distributed_type.value
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage in _OF_STAGE:
            return _OF_STAGE[stage](trainer)
        what = f"DeepSpeed with zero_stage {stage}"
    elif kind == DistributedType.FSDP:
        if accelerator.is_fsdp2:
            return FullyShardedData(trainer)
        what = "FSDP1"
    elif kind != DistributedType.MEGATRON_LM:
        return Dense(trainer)
    raise ValueError(
        f"akg_every does not know how {what} keeps weights and steps: train data parallel (DDP), with FSDP2 "
        "(fsdp_version: 2) or with DeepSpeed's zero_stage 1, 2 or 3, or leave akg_every out and look at single steps "
        "from the checkpoints later with `trl-dynamics akg`"
    )
