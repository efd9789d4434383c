"""trl-dynamics sft: supervised fine-tuning with a tracked probe set."""

from trl_dynamics.cli.training import TrainingCommand


def command() -> TrainingCommand:
    """The command with its trainer and config."""
    from trl_dynamics.trainers.config import SFTConfig
    from trl_dynamics.trainers.sft import SFTTrainer

    return TrainingCommand("sft", SFTTrainer, SFTConfig)


def run(argv: list[str]) -> int:
    """Train in this process, or through `accelerate launch` when launch options are given."""
    return command().run(argv)
