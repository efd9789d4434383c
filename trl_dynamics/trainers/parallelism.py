"""Ways to split one sequence or one matrix over processes, under which probes would be scored wrongly: refused."""

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
