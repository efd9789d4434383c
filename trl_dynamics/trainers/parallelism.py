"""Several processes: ways to split a sequence or a matrix that would score probes wrongly, and launches that are not
what they say, are refused."""

import os

from accelerate import DistributedType
from transformers import Trainer


def refuse_parallelism(trainer: Trainer) -> None:
    """Refuse a run whose processes do not each hold whole rows of their own.

    Context and sequence parallelism patch attention for rows that are cut over processes, which probes are not; the
    processes of a tensor parallel group must see the same rows, while probes are dealt out to all processes. Sharded
    parameters (FSDP, HSDP, DeepSpeed ZeRO) are fine.

    Args:
        trainer ([`~transformers.Trainer`]): It knows the sizes from its model, its arguments, accelerate's config or
            DeepSpeed's.

    Raises:
        ValueError: If context, sequence or tensor parallelism is on.
    """
    sizes = {
        "context parallelism (cp_size": trainer.get_cp_size(),
        "sequence parallelism (sp_size": trainer.get_sp_size(),
        "tensor parallelism (tp_size": trainer.get_tp_size(),
    }
    given = [f"{name}={size})" for name, size in sizes.items() if size > 1]
    if given:
        raise ValueError(
            f"probes cannot be scored under {' and '.join(given)}, because every process must see whole rows of its "
            "own: train with FSDP2 or DeepSpeed ZeRO instead (recipes/accelerate_configs), or without a probe set and "
            "score the checkpoints with `trl-dynamics track`"
        )


def refuse_silent_fallback(trainer: Trainer) -> None:
    """Refuse processes that train each for itself, and sharding that was asked for and is not there.

    accelerate goes on without a word in both cases, which are those of a machine without accelerators.

    Args:
        trainer ([`~transformers.Trainer`]): What it runs as is compared with what the launcher asked for.

    Raises:
        ValueError: Names the option or the config that helps.
    """
    state = trainer.accelerator.state
    refuse_lone_processes(state.num_processes, "with use_cpu=True (--use_cpu True)")
    asked = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"]
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(
            f"{asked[0]} was asked for, but on a CPU accelerate trains data parallel instead, with the whole model in "
            "every process: take recipes/accelerate_configs/ddp.yaml there"
        )


def refuse_lone_processes(num_processes: int, on_a_cpu: str) -> None:
    """Refuse processes that a launcher started together and that know nothing of each other.

    Args:
        num_processes (`int`): How many accelerate sees.
        on_a_cpu (`str`): What lets processes on a CPU work together.

    Raises:
        ValueError: If more were started than are seen.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and num_processes == 1:
        raise ValueError(
            f"{started} processes were started, but each would work alone: on a CPU, processes work together only "
            f"{on_a_cpu}; on accelerators, start them with `accelerate launch`"
        )
